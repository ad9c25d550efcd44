"""One HTML file from a report folder: by Quarto where it is installed, else by Pandoc; never a half-written or stale
one."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from threefold.errors import ReportError
from threefold.provenance import atomic_write, recover_folder, replace_folder
from threefold.report import pandoc
from threefold.report.check import require
from threefold.report.publish import assemble, run_path

PAGE = "index.html"
# What would be fetched when the page opens. Links in the text (`<a href>`) are not fetched.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc\s*=\s*["']?(?!data:|\#)[^\s"'>]+"""
    r"""|<link\b[^>]*\bhref\s*=\s*["']?(?:https?:)?//[^\s"'>]+"""
    r"""|(?:@import\s+|url\(\s*)["']?(?:https?:)?//[^\s"')]+""",
    re.IGNORECASE,
)


def render(run, *, say: Callable[[str], None] = print) -> Path:
    """Render a run's own report to `<run>/report/index.html` and return that path.

    The sources are copied beside the run's executed notebooks, checked, rendered in a scratch folder and moved into
    place whole. When anything fails, no `index.html` is left from an earlier render.

    Args:
        run: a `threefold.run.Run` or its folder.
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
    found = [f"would fetch {match.group()[:120]}" for match in FETCHED.finditer(html)]
    found += [f"unresolved cross-reference {name}" for name in sorted(set(re.findall(r"\?@[\w-]+", text)))]
    found += [f"unexpanded shortcode {code}" for code in sorted(set(re.findall(r"\{\{(?:<|&lt;).{0,80}", text)))]
    return found
