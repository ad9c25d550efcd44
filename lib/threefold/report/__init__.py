"""The write-up: a run's executed notebooks published, checked and rendered. It computes nothing."""

from threefold.report.check import check, require
from threefold.report.publish import assemble, publish, rendered
from threefold.report.render import render, render_folder

__all__ = ["assemble", "check", "publish", "render", "render_folder", "rendered", "require"]
