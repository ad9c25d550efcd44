"""A Hugging Face hub of one data set on localhost: enough of its HTTP API for `datasets` and `huggingface_hub`.

    with FakeHub("openai/gsm8k", files, commits=["a" * 40]) as hub: ...  # hub.url for HF_ENDPOINT

`hub.commits[-1]` is main; all commits have the same files. `hub.served`: the names of the files it sent, in order.
"""

import hashlib
import http.server
import io
import json
import threading
from urllib.parse import parse_qs, unquote

import pyarrow
import pyarrow.parquet


def parquet(rows: list[dict]) -> bytes:
    """Rows as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def card(config: str, splits: list[str]) -> bytes:
    """A data card that declares one config with its splits under a folder of the config's name."""
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    return f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n".encode()


class FakeHub:
    def __init__(self, repo: str, files: dict[str, bytes], commits: list[str]):
        self.repo, self.files, self.commits = repo, files, commits
        self.served: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                status, headers, content = hub.answer(path, body)
                if self.command == "GET" and status == 200 and "/resolve/" in path:
                    hub.served.append(unquote(path).partition("/resolve/")[2].partition("/")[2])
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, dict, bytes]:
        api, resolve = f"/api/datasets/{self.repo}", f"/datasets/{self.repo}/resolve/"
        if path.startswith(resolve):
            commit, _, name = unquote(path.removeprefix(resolve)).partition("/")
            if name not in self.files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            tag = hashlib.sha1(self.files[name]).hexdigest()
            return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, self.files[name]
        if not path.startswith(api):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        _, what, commit, folder = [*path.removeprefix(api).split("/", 3), "", "", ""][:4]
        if what in ("", "revision"):
            commit = commit or self.commits[-1]
            if commit not in self.commits:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            return self.json({"id": self.repo, "sha": commit, "tags": [], "siblings": []})
        if what == "paths-info":
            return self.json(
                [self.entry(name) for name in parse_qs(body.decode()).get("paths", []) if name in self.files]
            )
        if what == "tree":
            base = f"{folder}/" if folder else ""
            inside = [name for name in self.files if name.startswith(base)]
            folders = {base + rest.partition("/")[0] for name in inside if "/" in (rest := name.removeprefix(base))}
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)]
            return self.json(entries + [self.entry(name) for name in inside if "/" not in name.removeprefix(base)])
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def entry(self, name: str) -> dict:
        oid = hashlib.sha1(self.files[name]).hexdigest()
        return {"type": "file", "oid": oid, "size": len(self.files[name]), "path": name}

    @staticmethod
    def json(value) -> tuple[int, dict, bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
