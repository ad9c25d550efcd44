"""From a fake run to a self-contained page, by Pandoc and by a stand-in for Quarto."""

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from report_fixtures import cell, execute_compare, make_run, notebook, output
from shared import flip

from basics import paths
from basics.errors import MissingInput, ReportError
from papertrail.report import assemble, check, pandoc, publish, render, render_folder, rendered, sources
from papertrail.report.render import inspect


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_run(tmp_path_factory.mktemp("runs") / "fake")
    execute_compare(made, paths.NOTEBOOKS / "percent" / "06_compare.py")
    return made


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "fake")


@pytest.fixture(autouse=True)
def without_quarto(monkeypatch, tmp_path):
    """A PATH that holds nothing but what a test puts there."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    if shutil.which("quarto"):
        monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def page(run):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        path = render(run, paths.REPORT, say=said.append)
    assert said == ["Quarto is not on the PATH: rendering the same sources with Pandoc."]
    return path.read_text(encoding="utf-8")


def test_one_changed_byte_of_a_rendered_page_is_named(copy):
    render(copy, paths.REPORT, say=lambda line: None)
    assert rendered(copy, paths.REPORT) == []
    for name in ("index.html", "index.qmd", "_variables.yml", "executed/06_compare.ipynb", "rendered.json"):
        changed = copy / "report" / name
        before = changed.read_bytes()
        flip(changed, len(before) // 2)
        assert [line.partition(":")[0] for line in rendered(copy, paths.REPORT)] == [f"report/{name}"]
        changed.write_bytes(before)
    for name in ("mine.html", "executed/mine.ipynb"):  # and so is a file that was not rendered
        shutil.copy(copy / "report" / "index.html", copy / "report" / name)
        assert [line.partition(":")[0] for line in rendered(copy, paths.REPORT)] == [f"report/{name}"]
        (copy / "report" / name).unlink()


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone(page):
    assert inspect(page) == []
    assert "<script" not in page and not re.search(r"""src=["']?https?:""", page)
    assert page.count('src="data:image/png;base64,') == 7
    assert "<math" in page and "<style" in page


def test_the_styles_stand_in_the_head_and_nothing_of_them_in_the_text(page):
    def bare(style):  # Pandoc leaves comments out
        return re.sub(r"/\*.*?\*/|\s", "", style, flags=re.DOTALL)

    head, body = page.split("</head>")
    styles = [bare(style) for style in re.findall(r"<style[^>]*>(.*?)</style>", head, re.DOTALL)]
    for name in ("report.css", "pandoc.css"):
        assert bare((paths.REPORT / name).read_text(encoding="utf-8")) in styles
    assert "{=html}" not in body and "border-collapse" not in body


def test_every_section_of_the_design_is_there(page):
    text = re.sub(r"<[^>]+>", "", page)
    for title in (
        "Findings", "What is compared", "Confounds", "Methods in short", "Against the baselines", "Stage by stage",
        "Components", "Past the training length", "The original comparison", "Claims ledger", "Limitations",
        "Appendix: full tables", "Provenance", "References",
    ):  # fmt: skip
        assert title in text


def test_tables_and_figures_are_numbered_captioned_and_linked(page, run):
    source = sources.read(run / "report")
    names = pandoc.numbers(source)
    assert names["tbl-models"] == "Table 1" and names["fig-findings"] == "Figure 1"
    for label, name in names.items():
        if label.startswith(("tbl", "fig")):
            assert f'id="{label}"' in page and f"{name}: " in page, label
    for reference in source.crossrefs:
        assert f'href="#{reference.key}"' in page
    assert names["sec-results"] == "Section 3"
    assert re.search(r'data-number="3"[^>]*>\s*<h1|number="3" id="sec-results"', page)
    assert "@tbl" not in page and "@fig" not in page and "{{" not in re.sub(r"<style.*?</style>", "", page, flags=re.S)


def test_every_link_leads_to_a_place_in_the_page_or_to_an_address(page):
    links = set(re.findall(r'href="([^"]+)"', page))
    assert {"#fig-baselines", "#sec-confounds", "#tbl-claims"} <= links
    identifiers = set(re.findall(r'id="([^"]+)"', page))
    for link in links:
        assert link.startswith("https://") or (link[0] == "#" and link[1:] in identifiers), link


def body(page):
    """The page's text before its appendix, without contents, tables and formulas."""
    text = page.split("<body", 1)[1].split('id="sec-appendix"')[0]
    text = re.sub(r"<(nav|table|math|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", text)


def test_the_page_opens_with_its_findings_and_stays_short(page):
    """Captions and generated sentences included; before its findings came first, the page had 5,905 such words."""
    text = body(page)
    assert text.index("Findings") < text.index("Table 1") and text.index("is better than GPT-2") < text.index(
        "What is compared"
    )
    assert len(text.split()) <= 2200
    assert len(text.split("Findings")[0].split()) < 120


def test_every_claim_stands_with_what_the_original_asserted(page):
    assert (
        "“SFT +26% perplexity” (report/ACL_REPORT.md:363)" in page and "scripts/evaluation/eval_sst2.py:76-77" in page
    )
    assert 'id="ref-mahfuz2026comparison"' in page


def test_variables_and_citations_are_filled_in(page):
    assert "Radford et al. 2019" in page and "citeproc" not in page.lower()
    assert "1.05M parameters" in page and 'id="ref-holm1979simple"' in page


def test_figures_have_alternative_text(page):
    assert re.search(
        r'<img[^>]* alt="Training loss against tokens; mean of the last ten steps: GPT-2 \(trained here\)', page
    )
    alternatives = re.findall(r'<img[^>]* alt="([^"]*)"', page)
    assert len(set(alternatives)) == len(alternatives) == 7 and all(re.search(r"\d", text) for text in alternatives)


def test_rendering_again_replaces_the_page_and_leaves_nothing_else(copy):
    first = render(copy, paths.REPORT, say=lambda line: None)
    before = first.read_bytes()
    assert render(copy, paths.REPORT, say=lambda line: None).read_bytes() == before
    assert sorted(path.name for path in copy.iterdir() if path.name.startswith(".")) == []
    assert not paths.REPORT.joinpath("index.html").exists()


# Failures ------------------------------------------------------------------------------------------------------------


def test_a_report_that_does_not_hold_together_leaves_no_page(copy):
    page = render(copy, paths.REPORT, say=lambda line: None)
    assert page.is_file()
    path = copy / "notebooks" / "00_data.ipynb"
    made = nbformat.read(path, as_version=4)
    made.cells = made.cells[1:]
    nbformat.write(made, path)
    with pytest.raises(ReportError, match=r"00_data\.ipynb has no cell labelled 'tbl-sources'"):
        render(copy, paths.REPORT, say=lambda line: None)
    assert not page.exists()
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("without", ["notebook", "record"])
def test_a_run_without_comparison_is_an_error_that_names_the_command(copy, without):
    comparison = copy / "notebooks" / "06_compare.ipynb"
    comparison.unlink()
    if without == "record":
        notebook(comparison, cell("x", output("a", {}, "x")))
    with pytest.raises(
        MissingInput, match=r"no executed notebook with the record 'variables'.*threefold run --run fake"
    ):
        render(copy, paths.REPORT, say=lambda line: None)


def test_what_pandoc_refuses_is_one_line(tmp_path, copy):
    folder = tmp_path / "report"
    assemble(copy, paths.REPORT, folder)
    (folder / "references.bib").write_text(
        (folder / "references.bib").read_text() + "\n@article{broken,\n  title = {x\n"
    )
    with pytest.raises(ReportError, match="Pandoc could not render") as error:
        render_folder(folder, say=lambda line: None)
    assert "\n" not in str(error.value) and not (folder / "index.html").exists()


@pytest.mark.parametrize(
    ("html", "pattern"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "would fetch"),
        ('<link rel="stylesheet" href="//fonts.example/css">', "would fetch"),
        ("<style>@import 'https://fonts.example/css';</style>", "would fetch"),
        ('<img src="figure.png">', "would fetch"),
        ("<p>?@tbl-x</p>", "unresolved cross-reference"),
        ("<p>{{&lt; var x &gt;}}</p>", "unexpanded shortcode"),
        ('<p><a href="https://example.org">x</a><img src="data:image/png;base64,AA"></p>', None),
    ],
)
def test_a_page_that_fetches_or_holds_loose_ends_is_refused(html, pattern):
    found = inspect(html)
    assert (found == []) if pattern is None else (len(found) == 1 and pattern in found[0])


# Quarto --------------------------------------------------------------------------------------------------------------


def fake_quarto(folder, script):
    path = folder / "quarto"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def test_quarto_is_used_where_it_is_on_the_path(copy, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    fake_quarto(
        tmp_path / "bin", '[ "$*" = "render --to html" ] && mkdir -p .quarto && echo "<p>by quarto</p>" > index.html'
    )
    said = []
    page = render(copy, paths.REPORT, say=said.append)
    assert page.read_text() == "<p>by quarto</p>\n" and said == [] and not (page.parent / ".quarto").exists()


def test_quarto_renders_in_a_folder_whose_path_is_a_pattern(run, tmp_path, monkeypatch):
    """It takes a path with brackets for a pattern, so it is given none."""
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    copied = shutil.copytree(run, tmp_path / "exp[1]" / "fake")
    fake_quarto(tmp_path / "bin", 'case "$*" in *[*) exit 1;; esac; echo "<p>by quarto</p>" > index.html')
    assert render(copied, paths.REPORT).read_text() == "<p>by quarto</p>\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_renderer_ends_with_the_report_and_leaves_no_folder(copy, tmp_path, monkeypatch, number):
    """And so does whatever it has started. What a SIGKILL leaves, the next rendering removes."""
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(paths.PACKAGES))
    fake_quarto(tmp_path / "bin", f"echo $$ > {tmp_path}/one; sleep 600 & echo $! > {tmp_path}/two; wait")
    code = f"""
from pathlib import Path
from basics.processes import terminable
from papertrail.report import render
with terminable():
    render(Path({str(copy)!r}), Path({str(paths.REPORT)!r}))"""
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    files = [tmp_path / name for name in ("one", "two")]
    while not all(file.is_file() and file.read_text().endswith("\n") for file in files):
        time.sleep(0.05)
        assert child.poll() is None
    family = [psutil.Process(int(file.read_text())) for file in files]
    child.send_signal(number)
    assert child.wait(60) == (128 + number if number == signal.SIGTERM else -number)
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert (copy / ".report.partial").exists() == (number == signal.SIGKILL)
    fake_quarto(tmp_path / "bin", 'echo "<p>by quarto</p>" > index.html')
    assert render(copy, paths.REPORT) == copy / "report" / "index.html" and not list(copy.glob(".report*"))


def test_a_run_that_cannot_be_written_is_rendered_elsewhere(copy, monkeypatch):
    mkdir = Path.mkdir

    def refused(path, *arguments, **options):
        if path.is_relative_to(copy):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    before, said = sorted(copy.rglob("*")), []
    page = render(copy, paths.REPORT, say=said.append)
    assert page.is_file() and not page.is_relative_to(copy) and sorted(copy.rglob("*")) == before
    assert said[0] == f"{copy} cannot be written: rendering into {page.parent}"
    shutil.rmtree(page.parents[1])


@pytest.mark.parametrize(
    ("script", "pattern"),
    [
        ('echo "<p>half" > index.html; echo "ERROR: bad" >&2; exit 3', r"quarto render failed \(3\).*ERROR: bad"),
        ('echo "<p>?@tbl-x</p>" > index.html', "unresolved cross-reference"),
        ("exit 0", "quarto render failed"),
    ],
)
def test_a_failing_quarto_leaves_no_page(copy, tmp_path, monkeypatch, script, pattern):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (copy / "report").mkdir(exist_ok=True)
    (copy / "report" / "index.html").write_text("stale")
    fake_quarto(tmp_path / "bin", script)
    with pytest.raises(ReportError, match=pattern):
        render(copy, paths.REPORT)
    assert not (copy / "report" / "index.html").exists()


# Publishing ----------------------------------------------------------------------------------------------------------


def test_publishing_writes_scrubbed_notebooks_and_variables(copy, tmp_path):
    report = tmp_path / "report"
    sources_only = shutil.ignore_patterns("executed", "_variables.yml", "index.html")
    shutil.copytree(paths.REPORT, report, ignore=sources_only)
    (report / "executed").mkdir()
    (report / "executed" / "old.ipynb").write_text("{}")
    path = copy / "notebooks" / "02_sft.ipynb"
    made = nbformat.read(path, as_version=4)
    made.cells.insert(0, cell('data_dir = "/srv/someone/data"'))
    made.cells.insert(1, cell(f'folder = "{tmp_path}/runs/fake"'))
    nbformat.write(made, path)
    shutil.copy(path, copy / "notebooks" / "03_dpo.failed.ipynb")
    published = publish(copy, report)
    assert [one.name for one in published] == sorted(
        p.name for p in (copy / "notebooks").glob("*.ipynb") if not p.name.endswith(".failed.ipynb")
    )
    text = (report / "executed" / "02_sft.ipynb").read_text()
    assert "/srv/someone" not in text and str(tmp_path) not in text and "./runs/fake" in text
    assert check(report) == []
    assert sources.read_variables(report)["parameters"] == "1.05M"
    page = render_folder(report, say=lambda line: None)
    assert page.is_file()


def test_publishing_a_run_that_does_not_hold_together_changes_nothing(copy, tmp_path):
    report = tmp_path / "report"
    shutil.copytree(paths.REPORT, report, ignore=shutil.ignore_patterns("executed", "_variables.yml", "index.html"))
    (report / "executed").mkdir()
    (report / "executed" / "old.ipynb").write_text("{}")
    (copy / "notebooks" / "00_data.ipynb").unlink()
    with pytest.raises(ReportError, match=r"00_data\.ipynb does not exist"):
        publish(copy, report)
    assert [path.name for path in (report / "executed").iterdir()] == ["old.ipynb"]
    assert not (report / "_variables.yml").exists() and not list(tmp_path.glob(".report*"))
