"""Evaluation: one adapter for every model, named protocols, one module a measure, intervals and paired tests.

A notebook needs four names: `LanguageModel` (from_checkpoint, from_location, random), `evaluate`, `save_items` and
`Evaluation`, whose `record()` is what it publishes.
"""

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
