"""What a run did not measure is left out of its report, and what is left reads well."""

import re
import shutil

import pytest
from report_fixtures import execute_compare, make_run

from basics import paths
from papertrail.report import assemble, pandoc, partial, require, sources

TEXT = """---
title: x
---

Always. {{< var a >}} is known; so is {{< var b >}} (and [@one; @two]). See @tbl-a; @tbl-b shows the rest.

# First {#sec-first}

It follows here:

{{< embed executed/x.ipynb#tbl-c >}}

{{< embed executed/x.ipynb#tbl-a >}}

## Inner {#sec-inner measured="b"}

Inside.

# Second {#sec-second}

As @sec-first and @sec-inner say. Method.

::: {measured="a"}
Of a.

{{< embed executed/x.ipynb#tbl-b >}}
:::

The end."""


@pytest.mark.parametrize(
    ("names", "gone", "kept"),
    [
        ({"a"}, ["is known", "Second", "tbl-b"], ["So is {{< var b >}} (and [@one; @two]).", "See @tbl-a."]),
        ({"b"}, ["so is", "Inner", "Inside.", "@sec-first"], ["{{< var a >}} is known.", "# First", "Method."]),
        ({"tbl-a", "tbl-c"}, ["First", "Inner", "@sec"], ["@tbl-b shows the rest.", "# Second", "Method.", "Of a."]),
        ({"tbl-c"}, ["It follows", "tbl-c"], ["@tbl-b shows the rest.", "## Inner", "@sec-inner"]),
        ({"tbl-b"}, ["Second", "The end"], ["See @tbl-a.", "# First", "It follows here:"]),
        (set(), [], TEXT.split("\n")),
    ],
)
def test_what_refers_to_nothing_is_left_out(names, gone, kept):
    left = partial.leave_out(TEXT, names)
    assert [part for part in gone if part in left] == [] and [part for part in kept if part not in left] == []
    assert left.startswith("---\ntitle: x\n---\n\nAlways.") and "\n\n\n" not in left


# Notebooks that a run lacks, what its report must not hold, and what it must.
PARTS = {
    "pretraining alone": (
        ["01_pretrain-*", "02_*", "03_*", "04_*", "05_*"],
        ["SFT", "GPT-2 (", "counterpart, alone", "Claims ledger", "Confounds", "seed-", "answer the same"],
        ["Threefold is a decoder of 1.05M parameters, pretrained on 2.5M tokens. This page reports run `fake`"],
    ),
    "no baselines, no speed": (
        ["*gpt2*", "04_speed*"],
        ["(trained here)", "(hub)", "fig-baselines"],
        ["4 models answer the same test items: random control, Threefold pretrain", "Components", "Claims ledger"],
    ),
    "no preferences, no ablations": (
        ["03_*", "*dpo*", "05_*"],
        ["Threefold DPO", "frozen", "Past the training length", "counterpart, alone", "DPO loss of a prompt"],
        ["Threefold SFT is worse than Threefold pretrain", "5 models answer the same test items"],
    ),
    "no evaluations": (
        ["04_*"], ["Against the baselines", "paired", "majority class", "Tasks {"], ["Components", "Claims ledger"]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "fake")


@pytest.mark.parametrize("part", PARTS)
def test_the_report_of_a_part_holds_no_gap(whole, tmp_path, part):
    absent, unwanted, wanted = PARTS[part]
    run, report = shutil.copytree(whole, tmp_path / "fake"), tmp_path / "report"
    for path in {path for pattern in absent for path in (run / "notebooks").glob(f"{pattern}.ipynb")}:
        path.unlink()
        shutil.rmtree(run / path.stem.partition("_")[2].removeprefix("pretrain-"), ignore_errors=True)
    execute_compare(run, paths.NOTEBOOKS / "percent" / "06_compare.py")
    assemble(run, paths.REPORT, report)
    require(report)
    text = pandoc.expand(report)
    gaps = ("not measured after", "Not measured in this run", "No loss curve", "No ablation", "–,", "( ", " ,", " .")
    prose = "\n".join(line for line in text.split("\n") if not line.startswith(("|", "![", "$$", "\\", ":")))
    assert [gap for gap in (*gaps, *unwanted) if gap in prose] == []
    assert [one for one in wanted if one not in prose] == []
    variables = sources.read_variables(report)
    assert [one.key for one in sources.read(report).variables if variables[one.key] == "not measured"] == []


def test_the_paragraphs_of_the_report_are_lines_that_end_with_their_sentences():
    text = paths.REPORT.joinpath("index.qmd").read_text(encoding="utf-8")
    lines = [
        line for line in text.split("---\n", 2)[2].split("\n") if line and not re.match(r"#|:::|\$\$|\\|\{\{", line)
    ]
    sentences = [sentence for line in lines for sentence in partial.SENTENCE_END.split(line)]
    assert len(lines) > 20 and [one for one in sentences if not re.search(r"[.?!:,$][)”*]*$", one)] == []
    pairs = [(one.count(left), one.count(right)) for one in sentences for left, right in ("()", "[]", "“”")]
    assert all(opened == closed for opened, closed in pairs)
