"""The registry of protocols, and the one call that evaluates a model under all those a preset asks for.

Every number of the comparison is measured under one of these, the same code for every model. A protocol's version is
raised when a number would come out differently. `{source}` is the name of its data, `{window}`, `{stride}` and
`{shots}` are the preset's. Every evaluation keeps the result of each item, document or timing as Parquet, hashed in the
run; a log-likelihood that is not a finite number stops it and names the item.

Models run in fp32. On a GPU with bf16, a sample of a protocol's items (an eighth, 8 to 64 of them) is first evaluated
in both: where no metric differs by more than a tenth of its 95% interval, the protocol runs in bf16. `precision` and
`precision_check` in the settings say which, and how far the two were apart.
"""

import functools
import inspect
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from basics.errors import EvaluationError
from threefold.config import EvaluationConfig, SourceConfig
from threefold.data import sources
from threefold.evaluation import length, pairs, perplexity, precision, problems, sentiment, speed
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import Dataset, Evaluation, Progress, Scoring, quiet


@dataclass(frozen=True)
class Protocol:
    """One way to measure: `key` names it in `only=`; its docstring begins with the names of its evaluations.

    source, demonstrations: keys of [evaluation] that name its data. version: raised when a number would come out
    differently.
    """

    key: str
    title: str
    function: Callable[..., Any]
    source: str = ""
    demonstrations: str = ""
    version: int = 1

    @property
    def document(self) -> str:
        """What it measures, how, and which published number it reproduces."""
        return inspect.cleandoc(self.function.__doc__ or "")


_SENTIMENT = ("sentiment", "sentiment_demonstrations")
PROTOCOLS = {
    protocol.key: protocol
    for protocol in (
        Protocol("disjoint", "Perplexity, disjoint windows", perplexity.disjoint, "perplexity"),
        Protocol("stride", "Perplexity, strided windows", perplexity.strided, "perplexity"),
        Protocol("lm-eval", "Perplexity, lm-eval's definition", perplexity.lm_eval, "perplexity"),
        Protocol("lines", "Perplexity, the precedent's 100 lines", perplexity.lines, "lines"),
        Protocol("blimp", "Minimal pairs", pairs.blimp, "blimp"),
        Protocol("zero-shot", "Sentiment, zero-shot", sentiment.zero_shot, "sentiment"),
        Protocol("few-shot", "Sentiment, few-shot", sentiment.few_shot, *_SENTIMENT),
        Protocol("grid", "Sentiment, every template and draw", sentiment.grid, *_SENTIMENT),
        Protocol("precedent", "Sentiment, the precedent's prompt", sentiment.precedent, *_SENTIMENT),
        Protocol("problems", "Word problems", problems.problems, "problems", "problem_demonstrations"),
        Protocol("instructions", "Held-out instructions", problems.instructions, "instructions"),
        Protocol("preferences", "Preference pairs", pairs.preferences, "preferences"),
        Protocol("speed", "Speed", speed.measure, version=speed.VERSION),
    )
}
OF_VARIANTS = (Protocol("length", "Loss by position", length.by_position, version=length.VERSION),)  # for ablations


def describe() -> str:
    """All protocols as one Markdown page, from this module's docstring and theirs."""
    every = (*PROTOCOLS.values(), *OF_VARIANTS)
    sections = (f"## {p.title} (`{p.key}`, version {p.version})\n\n{p.document}\n" for p in every)
    written = "*Written from the docstrings in `lib/threefold/evaluation` by `make protocols`; edit those.*"
    introduction = inspect.cleandoc(__doc__).partition("\n\n")[2]
    return "\n".join((f"# Protocols\n\n{written}\n\n{introduction}\n", *sections))


def evaluate(
    model: LanguageModel,
    config: EvaluationConfig,
    data_dir: str | Path = "",
    *,
    reference: LanguageModel | None = None,
    beta: float = 0.1,
    seed: int = 1337,
    progress: Progress = quiet,
    only: Sequence[str] | None = None,
) -> list[Evaluation]:
    """Every protocol whose data the preset names, in the registry's order.

    A protocol is left out where its source is empty (`source = ""` and `path = ""`), few-shot ones without shots too.
    reference: the SFT checkpoint, for preference rewards and KL. seed: of demonstration draws and bootstrap. only: keys
    of PROTOCOLS. progress: called with one line per finished protocol. Raises EvaluationError for an unknown key, for
    shots without demonstrations and from the protocols, and the errors of `data.sources`.
    """
    if unknown := [key for key in only or () if key not in PROTOCOLS]:
        raise EvaluationError(f"no protocol {', '.join(unknown)}; there are {', '.join(PROTOCOLS)}")
    scoring = Scoring(config.batch_tokens, config.bootstrap, seed)
    resolve = functools.cache(lambda source: sources.resolve(source, str(data_dir)))
    load = functools.cache(lambda source: list(sources.load(source, str(data_dir))))

    def note(source: SourceConfig) -> dict[str, Any]:
        resolved = resolve(source)
        origin = {key: getattr(resolved, key) for key in ("split", "kind", "fingerprint", "revision")}
        subsampled = source.max_examples >= 0 or source.skip_examples > 0
        return {"source": resolved.name, **origin, "examples": len(load(source)), "subsampled": subsampled}

    evaluations = []
    for protocol, arguments in _plan(config, reference, beta):
        if only and protocol.key not in only:
            continue
        begin = time.perf_counter()
        used = {"data": getattr(config, protocol.source)}
        if protocol.demonstrations and arguments.get("shots") != 0:
            used["demonstrations"] = getattr(config, protocol.demonstrations)
        items, *demonstrations = map(load, used.values())
        wikitext = resolve(used["data"]).reader.startswith("wikitext")
        data = Dataset(_name(used["data"]), items, *demonstrations, wikitext=wikitext)
        evaluation, noted = precision.evaluate(protocol.function, model, data, **arguments, scoring=scoring)
        seconds = time.perf_counter() - begin
        notes = {key: note(source) for key, source in used.items()}
        notes["data"]["subsampled"] |= evaluation.settings.get("subsampled", False)
        settings = {"version": protocol.version, **evaluation.settings, **notes, **model.facts, **noted}
        settings["seconds"] = round(seconds, 3)
        evaluations.append(replace(evaluation, settings=settings))
        progress(f"{model.name}  {summary(evaluation)}  ({seconds:.1f} s)")
    return evaluations


def headline(config: EvaluationConfig) -> tuple[EvaluationConfig, tuple[str, ...]]:
    """What `evaluate` needs to measure only the headline figures, each exactly as the whole evaluation measures it.

    (config, only): disjoint perplexity, minimal pairs, sentiment with the most shots under the first template,
    problems, instructions and preferences; no other template, no second definition of perplexity.
    """
    shots = max(config.sentiment_shots, default=0)
    keys = ("disjoint", "blimp", "few-shot" if shots else "zero-shot", "problems", "instructions", "preferences")
    reduced = replace(config, sentiment_shots=config.sentiment_shots and (shots,), sentiment_templates=1)
    return reduced, keys


def summary(evaluation: Evaluation) -> str:
    """One line: the protocol and its first metric with its interval."""
    name, first = next(iter(evaluation.metrics.items()))
    interval = "" if first["low"] is None else f" [{first['low']:.4g}, {first['high']:.4g}]"
    return f"{evaluation.protocol}: {name} {first['value']:.4g}{interval}"


def _plan(
    config: EvaluationConfig, reference: LanguageModel | None, beta: float
) -> list[tuple[Protocol, dict[str, Any]]]:
    """The protocols that the preset asks for, each with its arguments, in the order in which they are run."""
    few = [shots for shots in config.sentiment_shots if shots > 0]
    prompts = {"templates": config.sentiment_templates}
    asked: dict[str, list[dict[str, Any]]] = {
        "disjoint": [{"window": config.window}],
        "stride": [{"window": config.window, "stride": config.stride, "documents": config.strided_documents}],
        "lm-eval": [{}],
        "lines": [{}],
        "blimp": [{"per_phenomenon": config.blimp_pairs}],
        "zero-shot": [prompts] if 0 in config.sentiment_shots else [],
        "few-shot": [{"shots": shots, "draws": config.sentiment_draws, **prompts} for shots in few],
        "grid": [
            {"shots": shots, "first": config.sentiment_grid_items} for shots in few if config.sentiment_grid_items
        ],
        "precedent": [{}],
        "problems": [{"shots": config.problem_shots, "new_tokens": config.problem_new_tokens}],
        "instructions": [{"generations": config.instruction_generations, "new_tokens": config.instruction_new_tokens}],
        "preferences": [{"reference": reference, "beta": beta}],
    }
    plan = []
    for key, runs in asked.items():
        protocol = PROTOCOLS[key]
        missing = protocol.demonstrations and not _is_named(getattr(config, protocol.demonstrations))
        if not _is_named(getattr(config, protocol.source)) or (missing and key == "precedent"):
            continue
        if missing and any(arguments["shots"] > 0 for arguments in runs):
            shots, none = ("problem_shots", "0") if key == "problems" else ("sentiment_shots", "[0]")
            raise EvaluationError(
                f"evaluation.{shots} asks for demonstrations: set evaluation.{protocol.demonstrations}.source, or "
                f"evaluation.{shots} = {none}"
            )
        plan += [(protocol, arguments) for arguments in runs]
    return plan


def _is_named(source: SourceConfig) -> bool:
    return bool(source.source or source.path)


def _name(source: SourceConfig) -> str:
    """The first part of an evaluation's name: the source, or its file's stem; `wikitext-2` is `wikitext2`."""
    name = (source.source or Path(source.path).stem).replace("wikitext-", "wikitext")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


if __name__ == "__main__":
    print(describe(), end="")
