"""What an evaluation yields: metrics with intervals, the items behind them, and the settings."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from basics.errors import EvaluationError
from basics.files import atomic_write, sha256_bytes
from threefold.evaluation import statistics
from threefold.evaluation.statistics import Interval

if TYPE_CHECKING:  # readers of records import this module without waiting for torch
    from threefold.evaluation.adapter import LanguageModel, Request

Metric = dict[str, Any]
Items = Sequence[Mapping]  # of a task, as `data.readers` describes them
# Here, for readers of records that load no model:
PRECEDENT_ITEMS = 200  # sentiment items of the precedent's protocol
RECOMPUTED = "recomputed"  # mode of `length`: windows of the context, each computed on its own
LENGTH_TOLERANCE = 0.05  # share of items that may exceed the context before the setting itself is refused


@dataclass(frozen=True)
class Evaluation:
    """One model under one protocol.

    metrics: name -> {"value", "low", "high", "n", "unit", "interval"}; low and high are a 95% interval or None.
    items: one row a task item, document, pair or timing; its columns are described by the protocol.
    settings: JSON values: protocol version, data and its fingerprint, shots, counts of what was cut or left out.
    """

    protocol: str
    model: str
    weights_sha256: str
    metrics: dict[str, Metric]
    items: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def items_file(self) -> str:
        """File name of the items: the protocol's name with its slashes as underscores."""
        return self.protocol.replace("/", "_") + ".parquet"

    def record(self, items_sha256: str | None = None) -> dict[str, Any]:
        """The values published as `evaluation/<model>/<protocol>`."""
        keys = ("model", "protocol", "weights_sha256", "metrics", "settings")
        record: dict[str, Any] = {key: getattr(self, key) for key in keys}
        if items_sha256 is not None:
            record["items"] = {"file": self.items_file, "sha256": items_sha256, "rows": len(self.items)}
        return record


def save_items(folder: str | Path, evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """Write each evaluation's items to `folder/<protocol with / as _>.parquet`; returns {protocol: SHA-256 of its
    file}.
    """
    hashes = {}
    for evaluation in evaluations:
        content = evaluation.items.to_parquet(index=False)
        atomic_write(Path(folder) / evaluation.items_file, content)
        hashes[evaluation.protocol] = sha256_bytes(content)
    return hashes


def metric(interval: Interval, unit: str, method: str | None = None) -> Metric:
    """A metric from an interval; `method` says how the interval was made."""
    if not math.isfinite(interval.value):
        raise EvaluationError(
            f"a metric came out as {interval.value} {unit}: no protocol yields that from sound log-likelihoods"
        )
    return {**interval._asdict(), "unit": unit, "interval": method}


def point(value: float, unit: str, n: int) -> Metric:
    """A point estimate, a metric without an interval: a spread, a lowest value, a rate."""
    return metric(Interval(float(value), None, None, n), unit)


def proportion(correct: ArrayLike, unit: str) -> Metric:
    """The share of items that are right (1, or 1/2 for a tie), with Wilson's interval."""
    return metric(statistics.wilson(float(np.sum(correct)), len(correct)), unit, "Wilson")


def too_long(lengths: Sequence[int], limit: int, *, what: str, keys: str) -> np.ndarray:
    """Mask of the items longer than `limit` positions.

    A few long items are the items' own fault and count as wrong; where more than one in twenty does not fit, the
    protocol would measure the context and not the task, so it is refused. `keys` names the preset keys that decide.
    """
    lengths_N = np.asarray(lengths)
    mask_N = lengths_N > limit
    if mask_N.mean() > LENGTH_TOLERANCE:
        raise EvaluationError(
            f"{what}: {int(mask_N.sum())} of {len(mask_N)} items need more than the model's {limit} positions "
            f"(the longest {int(lengths_N.max())}); change {keys}"
        )
    return mask_N


@dataclass(frozen=True)
class Dataset:
    """What a protocol measures a model on.

    name: first part of the evaluation's name, such as "sst2". items: texts for perplexity, for tasks one mapping per
    item, as `data.readers` describes them. demonstrations: items of the same form for few-shot prompts. wikitext:
    whether the texts are articles in WikiText's raw form. Raises EvaluationError if there are no items.
    """

    name: str
    items: Sequence
    demonstrations: Sequence = ()
    wikitext: bool = False

    def __post_init__(self) -> None:
        if not self.items:
            raise EvaluationError(f"{self.name}: no items, its data are empty")


@dataclass(frozen=True)
class Scoring:
    """What all protocols share: positions in one batch, and the bootstrap behind the intervals."""

    batch_tokens: int = 16384
    bootstrap: int = 10_000
    seed: int = 0  # of the bootstrap and of demonstration draws

    def totals(
        self, model: "LanguageModel", requests: Sequence["Request"], describe: Callable[[int], str]
    ) -> np.ndarray:
        """Log-likelihood in nats of each whole target; see `LanguageModel.loglikelihoods`."""
        spans = model.loglikelihoods(requests, batch_tokens=self.batch_tokens, describe=describe)
        return np.array([span.sum() for span in spans])

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike, unit: str, over: str, **options: Any) -> Metric:
        """The metric of `statistics.bootstrap_ratio`, whose `clusters` and `transform` are the options. `over` names
        the resampled units.
        """
        options |= {"resamples": self.bootstrap, "seed": self.seed}
        return metric(statistics.bootstrap_ratio(numerators, denominators, **options), unit, f"bootstrap over {over}")


SCORING = Scoring()

Progress = Callable[[str], None]


def quiet(_message: str) -> None:
    """The progress function of callers that want none."""
