"""How large what a preset asks for would be. Absurd sizes are refused when the preset is read, by the memory and the
files that they would take at the least; whether this machine has as much is asked when a run starts."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from basics.errors import ConfigError
from basics.names import shown

TRAINING_BYTES = 16  # of a parameter in training: fp32 weight, gradient and two moments
STATE_BYTES = 12  # of these on the disk, to resume from: without the gradient
TOKEN_BYTES = 2  # on the disk
ROW_BYTES = 65  # kept for the backward pass by position, layer and width, eager in bf16: 795,500 a token of `full`
MEMORY, METRICS = 10**12, 2 * 10**10  # bytes; of metrics.jsonl, whose lines have about 200
Demand = tuple[str, int, tuple[str, ...], Callable[..., float]]  # what, the most, keys, how much the keys' values ask


def parameters(layers: int, width: int, ff: int, context: int, vocabulary: int) -> int:
    """The parameters of a model with SwiGLU, full heads and learned positions, norms and biases left out."""
    return (vocabulary + context) * width + layers * (4 * width**2 + 3 * width * ff)


def _batch(rows: int, context: int, layers: int, width: int, vocabulary: int) -> int:
    """Bytes of one forward pass: each layer's output, the logits, and which positions see each other."""
    return rows * context * (4 * (layers * width + vocabulary) + context)


_MODEL = ("model.n_layer", "model.d_model", "model.d_ff", "model.context")
_PASS = ("model.context", "model.n_layer", "model.d_model")
_SPEED = ("evaluation.speed_batch_sizes", "evaluation.speed_prompt", "evaluation.speed_new_tokens")
_VARIANTS = ("ablations.seeds", "ablations.variants", "ablations.chain")
_LENGTH = ("ablations.length_factor", *_PASS)


def _demands(vocabulary: str, trainings: tuple[str, ...]) -> Iterator[Demand]:
    """vocabulary: the key of the vocabulary's size. trainings: the sections that say how something is trained."""
    yield "notebooks", 1000, ("seeds", "baselines.external"), lambda seeds, external: 6 * seeds + external + 8
    yield "bytes of tokenizer.json", 10**8, (vocabulary,), lambda size: 30 * size
    training = "bytes of weights, gradients and optimizer states"
    yield training, MEMORY, (*_MODEL, vocabulary), lambda *sizes: TRAINING_BYTES * parameters(*sizes)
    for name in trainings:
        batch = (f"{name}.batch_size", *_PASS, vocabulary)
        yield "bytes for one batch", MEMORY, batch, _batch
        step = (f"{name}.batch_size", f"{name}.accumulate", "model.context")
        yield "bytes of tokens in a step", MEMORY, step, lambda rows, times, context: 8 * rows * times * context
        for length in ("steps", "epochs"):
            yield "bytes of metrics", METRICS, (f"{name}.{length}",), lambda steps: 200 * steps
        tokens = (f"{name}.tokens", *step)
        yield (
            "bytes of metrics",
            METRICS,
            tokens,
            lambda tokens, rows, times, context: 200 * tokens / max(1, rows * times * context),
        )
    yield "trainings in one notebook", 10**4, _VARIANTS, lambda seeds, variants, chain: seeds * (variants + chain + 1)
    yield (
        "bytes of metrics",
        METRICS,
        (*_VARIANTS, "ablations.steps"),
        lambda seeds, variants, chain, steps: 200 * seeds * (variants + chain + 1) * steps,
    )
    timed = ("ablations.rounds", "ablations.variants")
    yield "timed steps", 10**6, timed, lambda rounds, variants: rounds * (variants + 1)
    yield (
        "bytes for a stream of text",
        MEMORY,
        (*_LENGTH, vocabulary),
        lambda times, context, layers, width, size: 4 * times * context * (layers * width + size),
    )
    streams = ("ablations.length_streams", "ablations.length_factor", "model.context")
    yield "bytes of tokens", MEMORY, streams, lambda streams, times, context: 8 * streams * times * context
    for key in ("batch_tokens", "window"):
        scored = (f"evaluation.{key}", "model.n_layer", "model.d_model", vocabulary)
        yield (
            "bytes for one batch",
            MEMORY,
            scored,
            lambda positions, layers, width, size: 4 * positions * (layers * width + size),
        )
    cached = (*_SPEED, "model.n_layer", "model.d_model")
    yield (
        "bytes of cached keys and values",
        MEMORY,
        cached,
        lambda rows, prompt, new, layers, width: 8 * rows * (prompt + new) * layers * width,
    )
    yield "bytes of resamples", MEMORY, ("evaluation.bootstrap",), lambda resamples: 8000 * resamples
    for key in ("speed_repeats", "sentiment_draws", "sentiment_templates"):
        yield "repetitions", 10**6, (f"evaluation.{key}",), lambda repetitions: repetitions
    for key in ("sentiment_shots", "problem_shots"):
        yield "tokens of a prompt", 10**6, (f"evaluation.{key}",), lambda shots: shots


def check(preset: Mapping[str, Any], trainings: tuple[str, ...]) -> None:
    """Raise ConfigError that names the key for a preset (as a table) that no machine could hold."""
    numbers = dict(_numbers(preset))
    own = numbers["tokenizer.vocab_size"] >= numbers["model.vocab_size"]
    for what, most, keys, amount in _demands("tokenizer.vocab_size" if own else "model.vocab_size", trainings):
        values = {key: max(0, numbers[key]) for key in keys}
        if (size := amount(*values.values())) > most:
            # the key without which it would be least
            culprit = min(values, key=lambda key: amount(*{**values, key: 1}.values()))
            raise ConfigError(
                f"{culprit} = {shown(numbers[culprit])}: asks for {float(size):.3g} {what}, allowed are at most "
                f"{float(most):.3g}"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(dotted key, number) of a table: of a list of numbers the largest, of another list its length."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        yield key, max(value, default=0) if all(isinstance(item, int | float) for item in value) else len(value)
    elif isinstance(value, int | float):
        yield key, value
