"""The write-up: a run's executed notebooks published, checked and rendered. It computes nothing."""

from papertrail.report.check import check, require
from papertrail.report.publish import assemble, publish, rendered
from papertrail.report.render import render, render_folder

__all__ = ["assemble", "check", "publish", "render", "render_folder", "rendered", "require"]
