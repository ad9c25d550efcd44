import json
import re
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pypandoc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, new_output

from basics.errors import RecordError
from papertrail import records
from papertrail.records import MIME, Markdown, publish, read, table


def notebook(tmp_path, *outputs):
    """A notebook file of one code cell an output."""
    cells = [new_code_cell("x", outputs=[output]) for output in outputs]
    file = tmp_path / "06_compare.ipynb"
    nbformat.write(new_notebook(cells=cells), file)
    return file


def output(name, values, **shown):
    data, metadata = records.bundle(name, values, **shown)
    return new_output("display_data", data=data, metadata=metadata)


def figure() -> Figure:
    drawn = Figure(figsize=(4, 2))
    drawn.subplots().plot([1, 2], [3, 1])
    return drawn


# Publishing and reading


def test_published_in_a_kernel_and_read_back(tmp_path):
    code = """
import matplotlib.pyplot as plt
import numpy as np
from papertrail.records import publish, table
publish("evaluation/sft/sst2", {"n": np.int64(872), "accuracy": np.float32(0.5)}, markdown=table([{"n": 872}]))
figure, axes = plt.subplots()
axes.plot([1, 2])
publish("curve/sft", {"step": np.arange(3), "none": None}, figure=figure, text="Loss falls from 3 to 1")
"""
    opening = new_code_cell('from study.run import open_stage\nopen_stage("sft", learning_rte=1)')
    book = new_notebook(cells=[new_code_cell("%matplotlib inline"), new_code_cell(code), opening])
    NotebookClient(book, kernel_name="python3", allow_errors=True).execute()
    kinds = [kind.output_type for kind in book.cells[1].outputs]
    assert kinds == ["display_data", "display_data"]  # one each, and the figure not a second time
    shown = book.cells[1].outputs[1]
    assert set(shown.data) == {"text/plain", "image/png", MIME}
    assert shown.data["text/plain"] == shown.metadata["image/png"]["alt"] == "Loss falls from 3 to 1"
    error = book.cells[2].outputs[0]  # a user's fault is one line, not a page of frames
    assert error.ename == "ConfigError" and "did you mean learning_rate?" in error.evalue
    assert len(error.traceback) == 1

    nbformat.write(book, tmp_path / "x.ipynb")
    with pytest.raises(RecordError, match=r"x.ipynb: cell 2 ended in ConfigError: unknown parameter learning_rte"):
        read(tmp_path / "x.ipynb")
    del book.cells[2]
    nbformat.write(book, tmp_path / "x.ipynb")
    found = read(tmp_path / "x.ipynb")
    assert list(found) == ["evaluation/sft/sst2", "curve/sft"]
    first = found["evaluation/sft/sst2"]
    assert first.values == {"n": 872, "accuracy": 0.5}
    assert (first.notebook, first.cell) == ("x.ipynb", 1)
    assert first.markdown == table([{"n": 872}])
    assert found["curve/sft"].values == {"step": [0, 1, 2], "none": None} and found["curve/sft"].markdown is None


def test_a_figure_is_a_png_of_160_dpi_shown_at_its_size():
    data, metadata = records.bundle("x", {}, figure=figure(), text="a line")
    assert data["image/png"].startswith("iVBORw0KGgo")
    assert 3 * 96 < metadata["image/png"]["width"] < 4.5 * 96
    assert data == records.bundle("x", {}, figure=figure(), text="a line")[0]  # nothing of the day in it


def test_outside_a_notebook_the_text_is_printed(capsys):
    publish("x", {"a": 1}, markdown="| a |\n", text="a is 1")
    assert capsys.readouterr().out == "a is 1\n"


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"loss": [1.0, float("nan")]}, r"x\.loss\[1\] is nan"),
        ({"a": {"b": np.float64("inf")}}, r"x\.a\.b is inf"),
        ({"a": np.array([[1.0], [np.nan]])}, r"x\.a\[1\]\[0\] is nan"),
        ({"a": pd.Series([0.5, None])}, r"x\.a\[1\] is nan"),
        ({1: 2}, "x: key 1 is not a string"),
        ({"a": object()}, r"x\.a: object is not JSON"),
        ({"a": {1, 2}}, r"x\.a: set is not JSON"),
        ({"a": "\ud800"}, r"x\.a: half of a surrogate pair"),
        ([1], "values must be a mapping"),
    ],
)
def test_values_are_finite_json(values, place):
    with pytest.raises(RecordError, match=place):
        publish("x", values)


def test_what_cannot_be_published():
    for name in ("", "../x", "a//b", "/a", "a b", "a/"):
        with pytest.raises(RecordError, match="record name"):
            publish(name, {})
    with pytest.raises(RecordError, match="two outputs"):
        publish("x", {}, markdown="a", figure=figure())
    with pytest.raises(RecordError, match="alternative text"):
        publish("x", {}, figure=figure())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a notebook"),
        ("[]", "not a notebook of format 4"),
        ('{"nbformat": 3, "worksheets": []}', "not a notebook of format 4"),
        (
            '{"nbformat": 4, "cells": [{"outputs": [{"data": {"%s": {"version": 1, "values": NaN}}}]}]}',
            "NaN is not JSON",
        ),
        (
            '{"nbformat": 4, "cells": [{"outputs": [{"data": {"%s": {"version": 2}}}]}]}',
            "cell 0: a record of another version",
        ),
        (
            '{"nbformat": 4, "cells": [{"outputs": [{"data": {"%s": {"version": 1, "name": "x"}}}]}]}',
            "without a name or values",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path, content, message):
    (tmp_path / "x.ipynb").write_text(content.replace("%s", MIME))
    with pytest.raises(RecordError, match=f"^x.ipynb.*{message}"):
        read(tmp_path / "x.ipynb")


def test_a_missing_notebook_and_a_name_that_appears_twice(tmp_path):
    with pytest.raises(RecordError, match=r"none.ipynb: no such notebook"):
        read(tmp_path / "none.ipynb")
    file = notebook(tmp_path, output("x", {"a": 1}), output("y", {}), output("x", {"a": 2}))
    with pytest.raises(RecordError, match="record x is in cell 0 and in cell 2"):
        read(file)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_values_come_back_as_they_went(tmp_path_factory, values):
    file = notebook(tmp_path_factory.mktemp("nb"), output("x", values, markdown="a\nb"))
    record = read(file)["x"]
    assert record.values == values and record.markdown == "a\nb"


# Tables


def test_a_table_is_aligned_with_numbers_to_the_right():
    rows = [
        {"model": "gpt2", "ppl": 29.9412, "n": 1319, "accuracy": "0.91 [0.90, 0.92]", "same": True},
        {"model": "ours, longer", "ppl": None, "n": 4, "accuracy": None, "same": False},
    ]
    assert table(rows, {"model": "Model", "ppl": "Perplexity", "n": "n", "accuracy": "Acc.", "same": "Same"}) == (
        r"""
| Model        | Perplexity |     n |                Acc. | Same |
| ------------ | ---------: | ----: | ------------------: | ---- |
| gpt2         |       29.9 | 1,319 | 0.91 \[0.90, 0.92\] | yes  |
| ours, longer |          – |     4 |                   – | no   |
""".lstrip()
    )


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *(
            (text, True)
            for text in ("-3", "−3.1", "1,319", "12%", "253M", "1.4×", "0.9 ± 0.1", "0.9 (n 872)", "12/20", "<0.001")
        ),
        *((text, False) for text in ("3-shot", "2 shots", "", "gpt2", "v1", "2024-01-01", "yes")),
    ],
)
def test_which_texts_read_as_numbers(text, right):
    assert table([{"a": text}]).splitlines()[1].endswith(": |") == right


def test_rows_in_any_form():
    expected = table([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    assert table(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})) == expected
    assert table(iter([{"b": "x", "a": 1}, {"b": "y", "a": 2}]), ["a", "b"]) == expected
    assert table([], ["a", "b"]) == "| a   | b   |\n| --- | --- |\n"


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"a": float("nan")}], None, "nan in a table at a\\[0\\]"),
        ([{"a": np.float32("inf")}], None, "inf in a table"),
        ([{"a": 1}], ["b"], "row 0 has no column 'b'; it has a"),
        ([], None, "without columns"),
    ],
)
def test_tables_that_would_mislead(rows, columns, message):
    with pytest.raises(RecordError, match=message):
        table(rows, columns)


def test_formats():
    rows = [{"a": 0.123456, "b": 0.123456, "c": 0.123456, "d": 0.0}]
    text = table(rows, formats={"a": ".1f", "b": ".4%", "c": lambda value: f"*{value:.2f}*", "d": ".2f"})
    assert text.splitlines()[2].replace(" ", "") == "|0.1|12.3456%|\\*0.12\\*|0.00|"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (252_818_432, "252,818,432"),
        (29.9412, "29.9"),
        (0.91234, "0.912"),
        (0.0123456, "0.0123"),
        (12345.6, "12,346"),
        (-3.14159, "-3.14"),
        (1.5e-5, "1.50e-05"),
        (2.5e9, "2.50e+09"),
    ],
)
def test_numbers_for_a_reader(value, text):
    assert records.number(value) == text


NASTY = [
    "a | b",
    "<script>alert(1)</script>",
    "{{< include /etc/passwd >}}",
    "{{< var x >}} {{{{< y >}}}} {{{x}}}",
    "?@tbl-models",
    "[link](http://x) ![image](y)",
    "**bold** _it_ `code` ~sub~ ^sup^",
    "$x$ \\alpha @citation [@key] #tag",
    "&lt; &amp; \\| \\\\",
    "two\nlines\tand\x00nothing",
    "`{=html}<b>`{=html}",
    "```{=html}",
    "::: {.note}",
    "[a](javascript:alert(1)) <img src=x onerror=alert(1)>",
    r"\(x^2\) \[y\] \begin{align}x\end{align} \ref{a} \$z\$",
    "@@0@@ someone@example.org",
    "https://example.org/x www.example.org WWW.example.org",
    'it\'s "so" -- --- ---- ... ....',
    "<!-- no comment --> # no heading",
    "\u202edesrever \u200bnothing",
]


@pytest.mark.parametrize("text", NASTY)
def test_text_of_a_model_stays_text(text):
    """Pandoc reads each cell back as exactly the text that went in, and as nothing but words; a `$` or backslash in an
    element of its own, or JupyterLab's MathJax would pair it with the next; so are the second brace of a shortcode and
    what Quarto says of a lost reference.
    """
    source = table([{"text": text, "n": 1}])
    assert "{{<" not in source and len(source.splitlines()) == 3
    tree = json.loads(pypandoc.convert_text(source, "json", format="markdown"))
    (block,) = tree["blocks"]
    assert block["t"] == "Table"
    (body,) = block["c"][4]
    (row,) = body[3]
    assert len(row[1]) == 2
    read_back = ""
    for inline in (inline for part in row[1][0][4] for inline in part["c"]):
        if inline["t"] == "Span":
            attributes, ((alone),) = inline["c"]
            assert attributes == ["", [], []] and alone["t"] == "Str" and alone["c"] in ("$", "\\", "{", "@")
            read_back += alone["c"]
        else:
            assert inline["t"] in ("Str", "Space")
            assert inline["t"] == "Space" or not re.search(r"[$\\]|\{\{|\?@", inline["c"])
            read_back += inline.get("c", " ")
    assert read_back.split() == "".join(char if char.isprintable() else " " for char in text).split()


def test_what_jupyterlab_would_read_before_the_page_stands():
    """Its renderer takes mathematics out of the source, makes links of bare addresses and puts mathematics back at its
    own marks: none of that is in the source of a cell (observed in JupyterLab 4 with these texts)."""
    source = table([{"text": text} for text in NASTY])
    assert not re.search(r"(?<!\\)\$|\\\\[()\[\]]|\\(begin|end)\{|@@\d+@@|\w@|https?://|www\.", source, re.IGNORECASE)


def test_the_authors_own_markdown_is_left_as_it_is():
    assert "**bold** \\*" in table([{"a": Markdown("**bold** \\*")}])
    assert "**bold**" not in table([{"a": "**bold**"}])


def test_importing_records_is_light():
    """The report and the CLI read records; that must not cost a second of IPython or Matplotlib."""
    heavy = "{'torch', 'IPython', 'matplotlib', 'pandas'}"
    code = f"import sys, papertrail.records, papertrail.run; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
