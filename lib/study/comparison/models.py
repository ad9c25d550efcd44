"""The models of a comparison: their order, names and colours, the same in every table and figure."""

from collections.abc import Iterable

from study.preset import LINEAGE, OWN_MODELS

BASELINES = ("gpt2", "distilgpt2")

# Okabe & Ito's palette (2008), safe for colour-blind readers.
_COLOURS = {
    "random": "#7F7F7F",
    "gpt2": "#0072B2",
    "distilgpt2": "#56B4E9",
    "pretrain": "#E69F00",
    "sft": "#009E73",
    "dpo": "#D55E00",
}
_EXTERNAL_COLOURS = ("#CC79A7", "#000000", "#B8A700")
MARKERS = {"random": "x", "gpt2": "s", "distilgpt2": "D", "pretrain": "o", "sft": "^", "dpo": "v"}

_NAMES = {
    "random": "random control",
    "pretrain": "Threefold pretrain",
    "sft": "Threefold SFT",
    "dpo": "Threefold DPO",
}
_BASELINE_NAMES = {"gpt2": "GPT-2", "distilgpt2": "DistilGPT-2"}


def ordered(models: Iterable[str]) -> list[str]:
    """Known models in the fixed order, then externals as they come."""
    present = list(dict.fromkeys(models))
    return [name for name in OWN_MODELS if name in present] + [name for name in present if name not in OWN_MODELS]


def lineage(models: Iterable[str]) -> list[str]:
    """The stages of this run's model that are among `models`, first to last."""
    present = set(models)
    return [stage for stage in LINEAGE if stage in present]


def name(model: str, *, trained_here: bool = False) -> str:
    """What a reader is shown. A baseline says where its weights come from."""
    if model in _BASELINE_NAMES:
        return f"{_BASELINE_NAMES[model]} ({'trained here' if trained_here else 'hub'})"
    return _NAMES.get(model, model)


def colour(model: str, models: Iterable[str] = ()) -> str:
    """The model's colour; externals take theirs in the order in which they stand among `models`."""
    if model in _COLOURS:
        return _COLOURS[model]
    externals = [one for one in ordered(models) if one not in OWN_MODELS]
    place = externals.index(model) if model in externals else 0
    return _EXTERNAL_COLOURS[place % len(_EXTERNAL_COLOURS)]
