"""`threefold doctor`: checks this machine for a run, and writes nothing."""

import argparse

from study import doctor as checkup
from study.cli.common import say
from study.cli.run import opened_for


def doctor(options: argparse.Namespace) -> int:
    """Exit status 1 if something would stop the run."""
    marks = []
    for row in checkup.rows(*opened_for(options)):
        say(str(row))
        marks.append(row.mark)
    return 1 if "stop" in marks else 0
