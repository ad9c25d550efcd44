"""The checker: every fault of a report folder is one clear line, and a sound folder has none."""

import re

import nbformat
import pytest
from report_fixtures import cell, notebook, output, sha

from basics import paths
from basics.errors import ReportError
from papertrail.report import check, require, sources

QMD = """---
title: "A title"
---

# First {#sec-first}

In @tbl-a and @fig-b, see @sec-first [@known; @other]; {{< var n >}} models, `@tbl-not-a-reference`.

{{< embed executed/one.ipynb#tbl-a >}}

{{< embed executed/one.ipynb#fig-b >}}

{{< embed executed/two.ipynb#txt-c >}}

```
{{< var unknown >}} @tbl-nowhere [@nobody]
```

<!-- {{< embed executed/none.ipynb#tbl-x >}} -->
"""
BIB = "@article{known,\n  title = {x}\n}\n\n@misc{other,\n  title = {y}\n}\n"
TABLE = "| a | b |\n| - | - |\n| 1 | 2 |\n"


def figure():
    from matplotlib.figure import Figure

    made = Figure(figsize=(1, 1))
    made.subplots().plot([0, 1])
    return made


@pytest.fixture
def folder(tmp_path):
    """A sound report folder."""
    (tmp_path / "index.qmd").write_text(QMD)
    (tmp_path / "references.bib").write_text(BIB)
    (tmp_path / "_variables.yml").write_text('"n": "6"\n')
    write(tmp_path)
    return tmp_path


def write(folder, one=None, two=None):
    executed = folder / "executed"
    weights = {"weights_sha256": sha("w")}
    one = one or [
        cell("#| label: tbl-a\n#| tbl-cap: A table.\nshow()", output("stage/sft", weights, TABLE)),
        cell("#| label: fig-b\n#| fig-cap: A figure.\nshow()", output("b", {}, figure=figure(), text="A line.")),
    ]
    two = two or [cell("#| label: txt-c\nshow()", output("evaluation/sft/p", weights, "- a sentence"))]
    notebook(executed / "one.ipynb", *one)
    notebook(executed / "two.ipynb", *two)


def only(folder, pattern):
    """The one problem there is, and it is one line."""
    problems = check(folder)
    assert len(problems) == 1, problems
    assert re.search(pattern, problems[0]), problems[0]
    assert "\n" not in problems[0]
    with pytest.raises(ReportError, match=pattern):
        require(folder)


def test_a_sound_folder_has_no_problems(folder):
    assert check(folder) == []
    require(folder)


@pytest.mark.parametrize(
    ("old", "new", "pattern"),
    [
        ("one.ipynb#tbl-a", "gone.ipynb#tbl-a", r"line 9: executed/gone\.ipynb does not exist"),
        ("one.ipynb#tbl-a", "one.ipynb#tbl-z", r"no cell labelled 'tbl-z' \(labels there: fig-b, tbl-a\)"),
        ("executed/two.ipynb#txt-c", "../two.ipynb#txt-c", "outside the report folder"),
        ("see @sec-first", "see @sec-last", "@sec-last refers to nothing"),
        ("@fig-b,", "@fig-c,", "@fig-c refers to nothing"),
        ("@known", "@unknown", "citation @unknown is not in references.bib"),
        ("var n ", "var m ", r"line 7: variable m is not in _variables\.yml"),
        ("{{< var n >}}", "{{< meta n >}}", "neither|not an embed alone on its line"),
        ("# First {#sec-first}", "# First {#sec-first}\n\n# Again {#sec-first}", "section #sec-first appears 2 times"),
    ],
)
def test_what_the_text_refers_to_must_be_there(folder, old, new, pattern):
    text = QMD.replace(old, new)
    if "tbl-z" in new or "gone" in new:
        text = text.replace("In @tbl-a and", "In")
    (folder / "index.qmd").write_text(text)
    only(folder, pattern)


def test_an_embed_shares_its_line_with_nothing(folder):
    (folder / "index.qmd").write_text(QMD.replace("{{< embed executed/two", "See {{< embed executed/two"))
    only(folder, "not an embed alone on its line")


def test_a_label_is_embedded_once(folder):
    (folder / "index.qmd").write_text(QMD + "\n{{< embed executed/two.ipynb#txt-c >}}\n")
    only(folder, "txt-c is embedded 2 times")


def test_a_caption_is_needed(folder):
    write(folder, two=[cell("#| label: txt-c\nshow()", output("x", {}, "text"))])
    one = [
        cell("#| label: tbl-a\nshow()", output("a", {}, TABLE)),
        cell("#| label: fig-b\n#| fig-cap: A figure.\nshow()", output("b", {}, figure=figure(), text="A line.")),
    ]
    write(folder, one=one)
    only(folder, r"one\.ipynb cell 1 \(tbl-a\): has no `#\| tbl-cap:`")


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ([], "exactly one displayed output, this one has no output"),
        ([output("a", {}, "x"), output("b", {}, "y")], "exactly one displayed output"),
        ([output("a", {}, text="only plain")], "displays text/markdown, this one has none"),
    ],
)
def test_an_embedded_cell_has_one_output_of_its_kind(folder, outputs, pattern):
    write(folder, two=[cell("#| label: txt-c\nshow()", *outputs)])
    only(folder, pattern)


def test_a_figure_needs_an_image(folder):
    one = [
        cell("#| label: tbl-a\n#| tbl-cap: A table.\nshow()", output("a", {}, TABLE)),
        cell("#| label: fig-b\n#| fig-cap: A figure.\nshow()", output("b", {}, "no image")),
    ]
    write(folder, one=one)
    only(folder, "displays an image/png")


def test_labels_are_unique_over_notebooks_and_well_formed(folder):
    two = [
        cell("#| label: txt-c\nshow()", output("x", {}, "text")),
        cell("#| label: tbl-a\n#| tbl-cap: Twice.\nshow()", output("y", {}, TABLE)),
        cell("#| label: Nice_Table\nshow()", output("z", {}, TABLE)),
    ]
    write(folder, two=two)
    problems = "\n".join(check(folder))
    assert "label 'tbl-a' appears more than once: executed/one.ipynb cell 1, executed/two.ipynb cell 2" in problems
    assert "label 'Nice_Table' must be tbl-, fig- or txt-" in problems


def test_an_error_output_is_found_wherever_it_stands(folder):
    broken = cell("1 / 0")
    broken.outputs = [
        nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=["a"])
    ]
    write(folder, two=[cell("#| label: txt-c\nshow()", output("x", {}, "text")), broken])
    problems = check(folder)
    assert any("two.ipynb cell 2: holds the error ZeroDivisionError: division by zero" in one for one in problems)


def test_options_that_are_not_yaml_are_said(folder):
    write(folder, two=[cell("#| label: txt-c\n#| cap: [open\nshow()", output("x", {}, "text"))])
    assert any("not YAML" in one for one in check(folder))


def test_a_file_that_is_no_notebook_is_said(folder):
    (folder / "executed" / "two.ipynb").write_text("{")
    assert any("two.ipynb" in one and "notebook" in one for one in check(folder))


def test_weights_must_agree_between_records(folder):
    wrong = {"weights_sha256": sha("other")}
    write(folder, two=[cell("#| label: txt-c\nshow()", output("evaluation/sft/p", wrong, "- x"))])
    evaluated, made = sha("other")[:12], sha("w")[:12]
    only(folder, f"two.ipynb: evaluated sft with weights {evaluated}, but one.ipynb made weights {made}")


def test_two_evaluations_of_one_model_must_agree(folder):
    cells = [
        cell("#| label: txt-c\nshow()", output("evaluation/x/p", {"weights_sha256": sha("1")}, "- x")),
        cell("show()", output("evaluation/x/q", {"weights_sha256": sha("2")}, "- x")),
    ]
    write(folder, two=cells)
    only(folder, rf"evaluation/x/q: evaluated weights {sha('2')[:12]}.*{sha('1')[:12]}")


def test_a_machine_path_in_a_notebook_is_found(folder):
    write(folder, two=[cell("#| label: txt-c\nshow('/srv/someone/data')", output("x", {}, "text"))])
    only(folder, r"two\.ipynb cell 1: a path or name of the machine.*/srv/someone/data")


def test_a_key_twice_in_the_bibliography_and_broken_variables_are_said(folder):
    (folder / "references.bib").write_text(BIB + BIB)
    (folder / "_variables.yml").write_text("- a list\n")
    problems = "\n".join(check(folder))
    assert "references.bib: known appears 2 times" in problems and "_variables.yml: must map" in problems


def test_variables_are_those_of_the_comparisons_record(folder):
    notebook(folder / "executed" / "06_compare.ipynb", cell("show()", output("variables", {"n": 6, "m": "x"}, "-")))
    (folder / "_variables.yml").write_text('"n": "6"\n"m": "x"\n')
    assert check(folder) == []
    (folder / "_variables.yml").write_text('"n": "7"\n"m": "x"\n')
    only(folder, r"_variables\.yml: n is '7', but the record in executed/06_compare\.ipynb says '6'$")


def test_front_matter_must_close(folder):
    (folder / "index.qmd").write_text("---\ntitle: x\n")
    with pytest.raises(ReportError, match="never closed"):
        check(folder)


# The project's own sources -------------------------------------------------------------------------------------------


def test_the_reports_own_sources_refer_to_what_exists():
    source = sources.read(paths.REPORT)
    keys = sources.read_bibliography(paths.REPORT)
    assert len(set(keys)) == len(keys) and not source.unknown
    assert {reference.key for reference in source.citations} <= set(keys)
    targets = {embed.label for embed in source.embeds} | {section.identifier for section in source.sections}
    assert {reference.key for reference in source.crossrefs} <= targets
    assert all(section.identifier for section in source.sections if section.number)


def test_every_embedded_label_of_the_comparison_is_in_its_notebook():
    script = (paths.NOTEBOOKS / "percent" / "06_compare.py").read_text()
    labels = set(re.findall(r"^#\| label: (\S+)", script, re.MULTILINE))
    embedded = {e.label for e in sources.read(paths.REPORT).embeds if e.notebook == "executed/06_compare.ipynb"}
    assert embedded == labels


def test_quarto_project_keeps_to_what_was_observed():
    import yaml

    project = yaml.safe_load((paths.REPORT / "_quarto.yml").read_text())
    assert project["project"]["render"] == ["index.qmd"] and project["execute"]["enabled"] is False
    html = project["format"]["html"]
    assert html["embed-resources"] is True and html["theme"] == "default" and html["html-math-method"] == "mathml"


def test_section_numbers_follow_levels():
    source = sources.parse("# A\n\n## B {#sec-b}\n\n## C\n\n# D {.unnumbered}\n\n# E {#sec-e}\n\n## F\n")
    assert [section.number for section in source.sections] == ["1", "1.1", "1.2", "", "2", "2.1"]


# Scrubbing -----------------------------------------------------------------------------------------------------------
