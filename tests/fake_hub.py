"""A Hugging Face hub on localhost: enough of its HTTP API for `datasets`, `huggingface_hub` and `transformers`.

    with FakeHub({"datasets/openai/gsm8k": files}, commits=["a" * 40]) as hub: ...  # hub.url for HF_ENDPOINT

A repository is named as in the hub's addresses: data sets below datasets/, models by themselves. Files are bytes, or
the path of a file with them. `hub.commits[-1]` is main; all commits have the same files. `hub.served`: the names of the
files it sent, in order.
"""

import hashlib
import http.server
import io
import json
import threading
from pathlib import Path
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
    def __init__(self, repositories: dict[str, dict[str, bytes | Path]], commits: list[str]):
        self.repositories, self.commits = repositories, commits
        self.served: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path, _, query = self.path.partition("?")
                status, headers, content = hub.answer(path, body, "recursive=true" in query.lower())
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

    def answer(self, path: str, body: bytes, recursive: bool) -> tuple[int, dict, bytes]:
        path = unquote(path)
        for repository, files in self.repositories.items():
            api = f"/api/{repository}" if repository.startswith("datasets/") else f"/api/models/{repository}"
            if path.startswith(f"/{repository}/resolve/"):
                return self.file(files, *path.removeprefix(f"/{repository}/resolve/").split("/", 1))
            if path == api or path.startswith(f"{api}/"):
                name = repository.removeprefix("datasets/")
                return self.facts(name, files, path.removeprefix(api), body, recursive)
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def file(self, files: dict[str, bytes | Path], commit: str, name: str) -> tuple[int, dict, bytes]:
        commit = self.commits[-1] if commit == "main" else commit
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        content = self.content(files[name])
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}, content

    def facts(
        self, name: str, files: dict[str, bytes | Path], rest: str, body: bytes, recursive: bool
    ) -> tuple[int, dict, bytes]:
        _, what, commit, folder = [*rest.split("/", 3), "", "", ""][:4]
        entries = {path: self.entry(path, content) for path, content in files.items()}
        if what in ("", "revision"):
            commit = self.commits[-1] if commit in ("", "main") else commit
            if commit not in self.commits:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            siblings = [{"rfilename": path, "size": entry["size"]} for path, entry in entries.items()]
            return self.json({"id": name, "sha": commit, "tags": [], "siblings": siblings})
        if what == "paths-info":
            asked = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            return self.json([entries[path] for path in asked if path in entries])
        if what == "tree":
            base = f"{folder}/" if folder else ""
            inside = [path.removeprefix(base) for path in files if path.startswith(base)]
            parents = {str(parent) for path in inside for parent in Path(path).parents if str(parent) != "."}
            found = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": base + path} for path in sorted(parents)]
            found += [entries[base + path] for path in inside]
            return self.json([entry for entry in found if recursive or "/" not in entry["path"].removeprefix(base)])
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    @staticmethod
    def content(file: bytes | Path) -> bytes:
        return file if isinstance(file, bytes) else file.read_bytes()

    @staticmethod
    def entry(path: str, file: bytes | Path) -> dict:
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        return {"type": "file", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": size, "path": path}

    @staticmethod
    def json(value) -> tuple[int, dict, bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
