"""One HTML file from a report folder, by Quarto where it is installed, else by Pandoc. A failure leaves no page."""

import contextlib
import errno
import re
import shutil
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from basics.errors import ReportError
from basics.files import atomic_write, replace_folder, sha256_tree, write_note
from papertrail.notebook_files import ANSI
from papertrail.processes import run_supervised
from papertrail.report import pandoc
from papertrail.report.check import require
from papertrail.report.publish import RENDERED, assemble

PAGE = "index.html"
# Attributes whose address is fetched when the page opens, on whatever element; of `href` see `_Loads`.
LOADED = {"src", "srcset", "imagesrcset", "poster", "data", "background"}
LOADED |= {"manifest", "codebase", "archive", "ping", "xlink:href"}
STYLE_LOADS = re.compile(r"""(?:@import\s+(?:url\()?|url\(\s*)["']?(?!data:|#)([^\s"')]+)""", re.IGNORECASE)


class _Loads(HTMLParser):
    """Collect what a page would fetch when it opens; the target of a link in the text (`<a href>`) is not."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            address = (value or "").strip()
            loaded = name in LOADED or (name == "href" and tag not in ("a", "area"))
            if loaded and address and not address.lower().startswith(("data:", "#")):
                self.found.append(f"<{tag} {name}={address[:100]!r}>")
            inside = STYLE_LOADS.findall(address) if name == "style" else []
            inside += _Loads(address).found if name == "srcdoc" else []  # a page in the page
            self.found += [f"<{tag} {name}: {found[:100]}>" for found in inside]
            if (tag, name, address.lower()) == ("meta", "http-equiv", "refresh"):
                self.found.append("<meta http-equiv=refresh>")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.found += [f"<style>: {found[:100]}" for found in STYLE_LOADS.findall(data)]


def render(run: Path, report: Path, *, say: Callable[[str], None] = print) -> Path:
    """Render a run's own report to `<run>/report/index.html` and return that path.

    The sources are copied beside the run's executed notebooks, checked, rendered in a scratch folder and moved into
    place whole. When anything fails, no report is left from an earlier render. Where the run's folder cannot be
    written (an archive), the report is rendered into a new folder for temporary files.

    Args:
        run: the run's folder.
        report: the folder of the report's sources.
        say: receives the lines that report a missing Quarto, and another place than the run's folder.

    Raises:
        ReportError: what does not hold together, one line a problem.
    """
    target, work, home = run / "report", run / ".report.partial", None
    try:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        if target.exists():
            shutil.rmtree(target)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        home = Path(tempfile.mkdtemp(prefix=f"threefold-{run.name}-"))
        target, work = home / "report", home / ".report.partial"
        say(f"{run} cannot be written: rendering into {target}")
    with contextlib.ExitStack() as unfinished:
        unfinished.callback(shutil.rmtree, home or work, ignore_errors=True)
        assemble(run, report, work)
        render_folder(work, say=say)
        write_note(work / RENDERED, {"files": sha256_tree(work)})
        replace_folder(work, target)
        unfinished.pop_all()
    return target / PAGE


def render_folder(folder: Path, *, say: Callable[[str], None] = print) -> Path:
    """Check and render a report folder in place, e.g. the published `report/`; return the HTML's path."""
    page = folder / PAGE
    page.unlink(missing_ok=True)
    require(folder)
    if quarto := shutil.which("quarto"):
        command = [quarto, "render", "--to", "html"]  # without a path: one with [ or ] would be a pattern
        status, said, complaint = run_supervised(command, cwd=folder)
        shutil.rmtree(folder / ".quarto", ignore_errors=True)
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        page.unlink(missing_ok=True)
        if status or not text:
            message = " ".join(ANSI.sub("", complaint or said).split())[-800:]
            raise ReportError(f"quarto render failed ({status}): {message}")
    else:
        say("Quarto is not on the PATH: rendering the same sources with Pandoc.")
        text = pandoc.render(folder)
    if problems := inspect(text):
        raise ReportError("the rendered page is not whole:\n" + "\n".join(f"- {line}" for line in problems))
    atomic_write(page, text)
    return page


def inspect(html: str) -> list[str]:
    """Problems of a rendered page that its renderer does not report, one line each."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL | re.IGNORECASE)
    found = [f"would fetch {what}" for what in _Loads(html).found]
    found += [f"unresolved cross-reference {name}" for name in sorted(set(re.findall(r"\?@[\w-]+", text)))]
    found += [f"unexpanded shortcode {code}" for code in sorted(set(re.findall(r"\{\{(?:<|&lt;).{0,80}", text)))]
    return found
