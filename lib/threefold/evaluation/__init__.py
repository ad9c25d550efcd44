"""Evaluation: one adapter for every model, named protocols, a module for each measure, intervals and paired tests.

A notebook needs four names: `LanguageModel` (from_checkpoint, from_location, random), `evaluate`, `save_items` and
`Evaluation`, whose `record()` is what it publishes. They are imported when they are first used (PEP 562), so that
readers of records can use `evaluation.statistics` without waiting for torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "adapter": ("LanguageModel", "sha256_state"),
    "protocols": ("PROTOCOLS", "Protocol", "describe", "evaluate", "headline", "summary"),
    "results": ("Dataset", "Evaluation", "Scoring", "save_items"),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
