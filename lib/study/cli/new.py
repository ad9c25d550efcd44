"""`threefold new`: a preset for own data."""

import argparse

from study.cli import common
from study.new import create


def new(options: argparse.Namespace) -> int:
    for line in create(options.study, options.text, options.instructions, options.preferences, options.model):
        common.say(line)
    return 0
