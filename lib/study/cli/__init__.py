"""The command line. Wrong input: one line on stderr and exit 2; a failed stage: exit 1; a signal: 128 + its number.

The commands and their options are data (commands.toml). The module of a command is imported when it runs, so that help
and status do not wait for torch.
"""

import argparse
import contextlib
import errno
import importlib
import io
import os
import re
import signal
import sys
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from basics import paths
from basics.errors import DISK_FULL, ThreefoldError
from basics.processes import terminable

# Errors of the operating system that the environment causes, not the program.
ENVIRONMENT = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)

STAGES = "data, tune-MODEL, pretrain, gpt2, gpt2-adamw, distilgpt2, sft, dpo, evaluate-MODEL, ablations, speed, compare"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that ends with where to look."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from threefold import __version__

    table = tomllib.loads(Path(__file__).with_name("commands.toml").read_text(encoding="utf-8"))
    shared = table.pop("shared")
    top = Parser(
        prog="threefold",
        description="A small language model through three stages, compared and written up.",
        epilog=_epilog(table),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"threefold {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, entry in table.items():
        text = entry["help"]
        description, example = f"{text[0].upper()}{text[1:]}.", f"example: {entry['example']}"
        command = commands.add_parser(name, help=text, description=description, epilog=example)
        command.set_defaults(module=entry["module"])
        groups = {}
        for flag, given in entry["options"].items():
            settings = dict(shared[given] if isinstance(given, str) else given)
            group = settings.pop("group", None)
            if "least" in settings:
                settings["type"] = whole_number(settings.pop("least"))
            elif settings.pop("number", False):
                settings["type"] = float
            if group and group not in groups:
                groups[group] = command.add_mutually_exclusive_group(required=group == "needed")
            groups.get(group, command).add_argument(flag, **settings)
    return top


def _epilog(table: Mapping[str, Any]) -> str:
    """An example of each command, the presets and the stages."""
    presets = []
    for path in sorted(paths.PRESETS.glob("*.toml")):
        try:
            described = tomllib.loads(path.read_text(encoding="utf-8")).get("description", "")
        except ValueError:  # said by the command that reads it
            described = "(cannot be read)"
        presets.append(f"  {path.stem:<11}{textwrap.shorten(str(described), 100, placeholder=' ...')}")
    examples = [f"  {entry['example']}" for entry in table.values()]
    return "\n".join(["examples:", *examples, "\npresets:", *presets, f"\nstages: {STAGES}"])


def whole_number(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers of at least `least` that 64 bits hold."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"-?\d{1,19}", text) else 2**63
        if not least <= value < 2**63:
            expected = "a whole number" if least < 0 else f"a whole number of at least {least}"
            raise argparse.ArgumentTypeError(f"{text!r:.40}: expected {expected}")
        return value

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `threefold`; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal's encoding does not have becomes a question mark
    top = parser()
    options = top.parse_args(arguments)
    if options.command is None:
        top.print_help()
        return 0
    try:
        from study import existing

        if options.command not in ("run", "doctor") and not getattr(options, "check", False):
            for name in filter(None, [*getattr(options, "runs", []), getattr(options, "run", "")]):
                existing.run_folder(name)  # before the command's module, whose imports can take seconds
        module = importlib.import_module(f"study.cli.{options.module}")
        # `run` and `train` handle signals themselves
        with contextlib.nullcontext() if options.command in ("run", "train") else terminable():
            return getattr(module, options.command)(options)
    except ThreefoldError as error:
        message, status = str(error), 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or (paths.PACKAGES / package).exists():
            raise
        message, status = f"package {package} is missing: `pip install -c requirements.lock -e .` in {paths.PROJECT}", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output has gone; the rest cannot be flushed
        return 1
    except OSError as error:
        if error.errno not in ENVIRONMENT:
            raise
        message, status = str(ThreefoldError(f"{error.strerror}: {error.filename or 'the disk'}")), 2
    print(f"threefold: {message}", file=sys.stderr)
    return status
