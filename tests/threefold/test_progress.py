"""What a training says: one line that rewrites itself where that can be seen, rare lines elsewhere, never a flood."""

import io
import math
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from papertrail.scrub import scrub
from threefold.training.progress import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str, columns: int = 200) -> list[str]:
    """The lines a terminal shows: a carriage return goes back to the line's beginning, and what follows overwrites."""
    lines = []
    for line in written.split("\n"):
        cells, at = [" "] * columns, 0
        for char in line:
            at = 0 if char == "\r" else at
            if char != "\r":
                cells[at], at = char, at + 1
        lines.append("".join(cells).rstrip())
    return lines


def talk(console: Console) -> None:
    console("sft: 20 steps")
    for step in range(1, 20):
        console.state(f"sft {step}/20: loss {2 / step:.3f}", step / 20)
    console("sft: done")
    console("end")


def test_in_a_terminal_states_replace_each_other_and_messages_stay(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "80")
    console = Console()
    talk(console)
    assert screen(out.getvalue()) == ["sft: 20 steps", "sft: done", "end", ""]
    console.state("sft 1/2: a long state", 0.5)
    console.state("short", 0.75)
    assert screen(out.getvalue())[-1] == "━" * 15 + "╌" * 5 + "  75% short"
    console.state("x" * 200, 1.0)
    assert len(screen(out.getvalue())[-1]) == 79, "a line that wraps could not be rewritten"
    console.close()
    assert screen(out.getvalue())[-1] == ""


def test_in_a_pipe_a_state_is_a_line(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    talk(Console())
    assert "\r" not in out.getvalue() and out.getvalue().count("\n") == 22


def test_whoever_wants_lines_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    lines = []
    talk(Console(lines.append))
    assert len(lines) == 22 and lines[1] == "sft 1/20: loss 2.000"


@pytest.mark.parametrize(("out", "most"), [(io.StringIO, 60), (Terminal, 180)])
def test_an_hour_has_few_states_and_a_day_hardly_more(monkeypatch, out, most):
    monkeypatch.setattr(sys, "stdout", out())
    console = Console()

    def states(seconds: float) -> int:
        now, count = 0.0, 0
        while (now := now + console.pause(now)) < seconds:
            count += 1
        return count

    assert states(3600) <= most and states(86400) - states(3600) <= most * math.log(24) / 3
    assert states(60) >= 4


@pytest.mark.slow
def test_an_executed_notebook_shows_messages_alone(tmp_path):
    """In a kernel, whose stream no terminal is: what the notebook keeps is played as the pipeline and JupyterLab do."""
    source = "from threefold.training.progress import Console\nconsole = Console()\nassert console.rewrites\n"
    source += "console('begun')\nfor n in range(300): console.state(f'{n}/300', n / 300)\nconsole('done')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    kept = scrub(notebook, {})
    (output,) = kept["cells"][0]["outputs"]
    assert output["text"] == "begun\ndone\n"
