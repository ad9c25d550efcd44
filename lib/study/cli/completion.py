"""`threefold completion`: the shell asks `threefold completion words` for the words that are possible at the cursor."""

import argparse
import os
import re

from basics import paths
from study.cli import parser
from study.cli.common import say
from study.run import run_names

# zsh reads bash's command (bashcompinit). Where nothing fits, the shell offers files.
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
BASH = "complete -o default -C 'threefold completion words' threefold"


def completion(options: argparse.Namespace) -> int:
    if options.shell == "words":
        point = os.environ.get("COMP_POINT", "")
        line = os.environ.get("COMP_LINE", "")[: int(point) if re.fullmatch("[0-9]{1,9}", point) else 0]
        *before, word = line.split(" ")
        possible = words([part for part in before if part][1:])
        say("\n".join(option for option in possible if option.startswith(word)))
    else:
        say(ZSH + BASH if options.shell == "zsh" else BASH)
    return 0


def words(before: list[str]) -> list[str]:
    """The words that can follow these on a command line after `threefold`: commands, options, choices, presets and
    names of runs; none where a file, a number or a text is expected."""
    top = parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    if not before:
        return [*commands.choices, *top._option_string_actions]
    command = commands.choices.get(before[0])
    if command is None:
        return []
    given = command._option_string_actions.get(before[-1])
    if given is not None and given.nargs != 0:
        return _values(given)
    places = [word for action in command._actions if not action.option_strings for word in _values(action)]
    return places + [flag for action in command._actions for flag in action.option_strings]


def _values(action: argparse.Action) -> list[str]:
    if action.dest in ("run", "runs"):
        return run_names()
    if action.dest == "preset":
        return sorted(path.stem for path in paths.PRESETS.glob("*.toml"))
    return [str(choice) for choice in action.choices or () if choice != "words"]
