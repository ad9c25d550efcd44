"""One HTML file from a report folder: by Quarto where it is installed, else by Pandoc; never a half-written or stale
one."""

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from basics.errors import ReportError
from basics.files import atomic_write, recover_folder, replace_folder, sha256_tree, write_note
from papertrail.report import pandoc
from papertrail.report.check import require
from papertrail.report.publish import RENDERED, assemble, run_path

PAGE = "index.html"
# Attributes whose address is fetched when the page opens, on whatever element; of `href` see `_Loads`.
LOADED = {"src", "srcset", "imagesrcset", "poster", "data", "background"}
LOADED |= {"manifest", "codebase", "archive", "ping", "xlink:href"}
STYLE_LOADS = re.compile(r"""(?:@import\s+(?:url\()?|url\(\s*)["']?(?!data:|#)([^\s"')]+)""", re.IGNORECASE)


class _Loads(HTMLParser):
    """Collects what a page would fetch when it opens. What a link in the text (`<a href>`) leads to is not fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            address = (value or "").strip()
            loaded = name in LOADED or (name == "href" and tag not in ("a", "area"))
            if loaded and address and not address.lower().startswith(("data:", "#")):
                self.found.append(f"<{tag} {name}={address[:100]!r}>")
            elif name == "style":
                self.found += [f"<{tag} {name}: {found[:100]}>" for found in STYLE_LOADS.findall(address)]
            elif name == "srcdoc":  # a page in the page
                inside = _Loads()
                inside.feed(address)
                inside.close()
                self.found += [f"<{tag} {name}: {found}>" for found in inside.found]
        if tag == "meta" and any(name == "http-equiv" and (value or "").lower() == "refresh" for name, value in attrs):
            self.found.append("<meta http-equiv=refresh>")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.found += [f"<style>: {found[:100]}" for found in STYLE_LOADS.findall(data)]


def render(run, *, say: Callable[[str], None] = print) -> Path:
    """Render a run's own report to `<run>/report/index.html` and return that path.

    The sources are copied beside the run's executed notebooks, checked, rendered in a scratch folder and moved into
    place whole. When anything fails, no `index.html` is left from an earlier render.

    Args:
        run: a `papertrail.run.Run` or its folder.
        say: takes the one line about a missing Quarto.

    Raises:
        ReportError: what does not hold together, one line a failure.
    """
    path = run_path(run)
    target = path / "report"
    recover_folder(target)
    (target / PAGE).unlink(missing_ok=True)
    work = path / ".report.partial"
    shutil.rmtree(work, ignore_errors=True)
    try:
        assemble(path, work)
        render_folder(work, say=say)
        write_note(work / RENDERED, {"files": sha256_tree(work)})
        replace_folder(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target / PAGE


def render_folder(folder: Path, *, say: Callable[[str], None] = print) -> Path:
    """Check and render a report folder in place, e.g. the published `report/`; returns the HTML's path."""
    page = folder / PAGE
    page.unlink(missing_ok=True)
    require(folder)
    quarto = shutil.which("quarto")
    if quarto:
        text = _quarto(quarto, folder)
    else:
        say("Quarto is not on the PATH: rendering the same sources with Pandoc.")
        text = pandoc.render(folder)
    if found := inspect(text):
        page.unlink(missing_ok=True)
        raise ReportError("the rendered page is not whole:\n" + "\n".join(f"- {line}" for line in found))
    if not quarto:
        atomic_write(page, text)
    return page


def _quarto(quarto: str, folder: Path) -> str:
    """`quarto render`, and the page it wrote. What Quarto leaves on a failure is removed."""
    page = folder / PAGE
    result = subprocess.run([quarto, "render", str(folder)], capture_output=True, text=True, encoding="utf-8")
    shutil.rmtree(folder / ".quarto", ignore_errors=True)
    if result.returncode or not page.is_file():
        page.unlink(missing_ok=True)
        said = " ".join((result.stderr or result.stdout).split())[-800:]
        raise ReportError(f"quarto render failed ({result.returncode}): {said}")
    return page.read_text(encoding="utf-8")


def inspect(html: str) -> list[str]:
    """What is wrong with a rendered page although its renderer was content: one line each."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL | re.IGNORECASE)
    loads = _Loads()
    loads.feed(html)
    loads.close()
    found = [f"would fetch {what}" for what in loads.found]
    found += [f"unresolved cross-reference {name}" for name in sorted(set(re.findall(r"\?@[\w-]+", text)))]
    found += [f"unexpanded shortcode {code}" for code in sorted(set(re.findall(r"\{\{(?:<|&lt;).{0,80}", text)))]
    return found
