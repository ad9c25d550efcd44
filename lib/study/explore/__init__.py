"""Exploring a finished or unfinished run: views, which are plain functions, and controls that call them.

from study.explore import Show, open_run, view

run = open_run("smoke")
view.continuations(run, ["sft", "dpo"], "The old miller")                 shown where it is a cell's last line
show = Show(run)
show(view.continuations, stages=["sft", "dpo"], prompt="The old miller")  the same under controls (ipywidgets)
"""

from study.explore import view
from study.explore.controls import Show
from study.explore.read import open_run

__all__ = ["Show", "open_run", "view"]
