"""Evaluation: one adapter for every model, named protocols, one module a measure, intervals and paired tests.

A notebook needs four names: `LanguageModel` (from_checkpoint, from_location, random), `evaluate`, `save_items` and
`Evaluation`, whose `record()` is what it publishes. They are imported when they are first used (PEP 562), so that
readers of records can use `evaluation.statistics` without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from threefold.evaluation.adapter import LanguageModel, ScoredSpan, sha256_state
    from threefold.evaluation.protocols import PROTOCOLS, Protocol, describe, evaluate, headline, summary
    from threefold.evaluation.results import Evaluation, save_items

__all__ = [
    "PROTOCOLS",
    "Evaluation",
    "LanguageModel",
    "Protocol",
    "ScoredSpan",
    "describe",
    "evaluate",
    "headline",
    "save_items",
    "sha256_state",
    "summary",
]

_HOMES = {
    "adapter": ("LanguageModel", "ScoredSpan", "sha256_state"),
    "protocols": ("PROTOCOLS", "Protocol", "describe", "evaluate", "headline", "summary"),
    "results": ("Evaluation", "save_items"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
