"""Errors a person can act on: one line that says what is wrong, where, and the way out.

Everything a user can cause raises a `ThreefoldError`; anything else that escapes is a bug and keeps its traceback.
"""

import errno
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write says where there is no room: disk, quota, limit
_SHA256 = re.compile(r"(?<![\w/.-])([0-9a-f]{12})[0-9a-f]{52}(?![\w/-])")  # not where it is part of a path
_ENDLESS = re.compile(r"(\S{200})\S{100,}(\S{100})")


class ThreefoldError(Exception):
    """Base of every error with a cause the user can mend. The CLI prints it as one line and exits with status 2.

    What a message quotes may come from anywhere: characters that end a line, colour a terminal or turn its text around
    are shown as their escapes, words without end by their ends, and hashes by their first twelve digits.
    """

    _shown = "\u00a0"  # unprintable characters that are shown as they are

    def __init__(self, message: str = ""):
        message = _ENDLESS.sub(r"\1…\2", _SHA256.sub(r"\1", message))
        super().__init__(
            "".join(char if char.isprintable() or char in self._shown else ascii(char)[1:-1] for char in message)
        )

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: in a notebook the error is its one line, not a page of frames."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(ThreefoldError):
    """A preset, key, parameter or value that cannot be meant."""


class SourceError(ThreefoldError):
    """A data source or model that could not be found, read or matched with its pinned revision."""


class DataError(ThreefoldError):
    """A row, file or split whose content is not what its reader expects."""


class MissingInput(ThreefoldError):
    """A stage's input does not exist yet; the message names the notebook that makes it."""


class CheckpointError(ThreefoldError):
    """A checkpoint with missing, extra or misshapen weights, or one that no standard class can hold."""


class TrainingError(ThreefoldError):
    """Training cannot go on."""


class DivergedError(TrainingError):
    """The loss or the gradient of a training is not finite."""


class EvaluationError(ThreefoldError):
    """An evaluation that would not mean what its name says."""


class RecordError(ThreefoldError):
    """A notebook or record that cannot be read as a result."""


class ReportError(ThreefoldError):
    """A report whose sources do not hold together; one line a fault."""

    _shown = "\u00a0\n"
