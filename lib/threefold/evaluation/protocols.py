"""The registry of protocols, and the one call that evaluates a model under all those a preset asks for."""

import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from basics import paths
from basics.errors import EvaluationError
from basics.files import atomic_write
from threefold.config import EvaluationConfig, SourceConfig
from threefold.data import sources
from threefold.evaluation import instructions, length, perplexity, preferences, problems, sentiment, speed
from threefold.evaluation.adapter import LanguageModel
from threefold.evaluation.results import Evaluation, Progress, Scoring, quiet

PAGE = paths.PROJECT / "docs" / "protocols.md"
INTRODUCTION = """# Protocols

*Written from the docstrings in `lib/threefold/evaluation` by `make protocols`; edit those.*

Every number of the comparison is measured under one of these, the same code for every model. A protocol's version is
raised when a number would come out differently. `{source}` is the name of its data, `{window}`, `{stride}` and
`{shots}` are the preset's. Every evaluation keeps the result of each item, document or timing as Parquet, hashed in the
run; a log-likelihood that is not a finite number stops it and names the item.
"""


@dataclass(frozen=True)
class Protocol:
    """One way to measure: `key` names it in `only=`, the names of its evaluations stand first in its docstring."""

    key: str
    title: str
    function: Callable[..., Any]
    version: int

    @property
    def document(self) -> str:
        """What it measures, how, and which published number it reproduces."""
        return inspect.cleandoc(self.function.__doc__ or "")


PROTOCOLS = {
    protocol.key: protocol
    for protocol in (
        Protocol("disjoint", "Perplexity, disjoint windows", perplexity.disjoint, perplexity.VERSION),
        Protocol("stride", "Perplexity, strided windows", perplexity.strided, perplexity.VERSION),
        Protocol("lm-eval", "Perplexity, lm-eval's definition", perplexity.lm_eval, perplexity.VERSION),
        Protocol("lines", "Perplexity, the precedent's 100 lines", perplexity.lines, perplexity.VERSION),
        Protocol("zero-shot", "Sentiment, zero-shot", sentiment.zero_shot, sentiment.VERSION),
        Protocol("few-shot", "Sentiment, few-shot", sentiment.few_shot, sentiment.VERSION),
        Protocol("grid", "Sentiment, every template and draw", sentiment.grid, sentiment.VERSION),
        Protocol("precedent", "Sentiment, the precedent's prompt", sentiment.precedent, sentiment.VERSION),
        Protocol("problems", "Word problems", problems.few_shot, problems.VERSION),
        Protocol("instructions", "Held-out instructions", instructions.responses, instructions.VERSION),
        Protocol("preferences", "Preference pairs", preferences.pairs, preferences.VERSION),
        Protocol("speed", "Speed", speed.measure, speed.VERSION),
    )
}
OF_VARIANTS = (Protocol("length", "Loss by position", length.by_position, length.VERSION),)  # run by the ablations


def describe() -> str:
    """All protocols as one Markdown page, from their docstrings."""
    every = (*PROTOCOLS.values(), *OF_VARIANTS)
    sections = (f"## {p.title} (`{p.key}`, version {p.version})\n\n{p.document}\n" for p in every)
    return "\n".join((INTRODUCTION, *sections))


def evaluate(
    model: LanguageModel,
    config: EvaluationConfig,
    data_dir: str | Path = "",
    *,
    reference: LanguageModel | None = None,
    beta: float = 0.1,
    seed: int = 1337,
    progress: Progress | None = None,
    only: Sequence[str] | None = None,
) -> list[Evaluation]:
    """Every protocol whose data the preset names, in the registry's order.

    A protocol is left out where its source is empty (`source = ""` and `path = ""`), few-shot ones without shots too.
    reference: the SFT checkpoint, for preference rewards and KL. seed: demonstration draws and bootstrap. only: keys of
    PROTOCOLS. progress: called with one line a finished protocol. Raises EvaluationError, or what its data raise.
    """
    unknown = [key for key in only or () if key not in PROTOCOLS]
    if unknown:
        raise EvaluationError(f"no protocol {', '.join(unknown)}; there are {', '.join(PROTOCOLS)}")
    progress = progress or quiet
    scoring = Scoring(config.batch_tokens, config.bootstrap, seed)
    done = []
    for key, run in _planned(model, config, str(data_dir), scoring, reference, beta, progress):
        if only and key not in only:
            continue
        begin = time.perf_counter()
        evaluation = run()
        seconds = time.perf_counter() - begin
        done.append(replace(evaluation, settings={**evaluation.settings, **model.facts, "seconds": round(seconds, 3)}))
        progress(f"{model.name}  {summary(evaluation)}  ({seconds:.1f} s)")
    return done


def headline(config: EvaluationConfig) -> tuple[EvaluationConfig, tuple[str, ...]]:
    """What `evaluate` needs to measure only the headline figures, each exactly as the whole evaluation measures it.

    (config, only): disjoint perplexity, sentiment with the most shots under the first template, problems, instructions
    and preferences; no other template, no second definition of perplexity.
    """
    shots = max(config.sentiment_shots, default=0)
    keys = ("disjoint", "few-shot" if shots else "zero-shot", "problems", "instructions", "preferences")
    reduced = replace(config, sentiment_shots=config.sentiment_shots and (shots,), sentiment_templates=1)
    return reduced, keys


def summary(evaluation: Evaluation) -> str:
    """One line: the protocol and its first metric with its interval."""
    name, first = next(iter(evaluation.metrics.items()))
    interval = "" if first["low"] is None else f" [{first['low']:.4g}, {first['high']:.4g}]"
    return f"{evaluation.protocol}: {name} {first['value']:.4g}{interval}"


def _planned(
    model: LanguageModel,
    config: EvaluationConfig,
    data_dir: str,
    scoring: Scoring,
    reference: LanguageModel | None,
    beta: float,
    progress: Progress,
) -> Iterator[tuple[str, Callable[[], Evaluation]]]:
    """(key, a call that evaluates) of everything the preset asks for; data is read only when called."""
    data = _Data(data_dir)

    def running(key: str, source: SourceConfig, function: Callable, *arguments: Any) -> tuple[str, Callable]:
        def run() -> Evaluation:
            documents = data.items(source)
            if function is perplexity.strided and config.strided_documents >= 0:
                documents = documents[: config.strided_documents]
            wikitext = data.reader(source).startswith("wikitext")
            name = data.name(source)
            result = function(model, documents, *arguments, source=name, wikitext=wikitext, scoring=scoring)
            return data.noted(result, source)

        return key, run

    def task(
        key: str, source: SourceConfig, demonstrations: SourceConfig | None, function: Callable, *arguments, **options
    ):
        def run() -> Evaluation:
            extra = [] if demonstrations is None else [data.items(demonstrations)]
            name = data.name(source)
            result = function(model, data.items(source), *extra, *arguments, source=name, scoring=scoring, **options)
            return data.noted(result, source, demonstrations)

        return key, run

    if _named(config.perplexity):
        yield running("disjoint", config.perplexity, perplexity.disjoint, config.window)
        yield running("stride", config.perplexity, perplexity.strided, config.window, config.stride)
        yield running("lm-eval", config.perplexity, perplexity.lm_eval)
    if _named(config.lines):
        yield running("lines", config.lines, perplexity.lines)
    if _named(config.sentiment):
        few = [shots for shots in config.sentiment_shots if shots > 0]
        shown = config.sentiment_demonstrations
        if few and not _named(shown):
            raise EvaluationError(
                "evaluation.sentiment_shots asks for demonstrations: set evaluation.sentiment_demonstrations.source, "
                "or evaluation.sentiment_shots = [0]"
            )
        templates = {"templates": config.sentiment_templates, "calibration": config.sentiment_calibration}
        if 0 in config.sentiment_shots:
            yield task("zero-shot", config.sentiment, None, sentiment.zero_shot, **templates)
        for shots in few:
            options = {**templates, "draws": config.sentiment_draws}
            yield task("few-shot", config.sentiment, shown, sentiment.few_shot, shots, **options)
            if config.sentiment_grid_items > 0:
                options = {"first": config.sentiment_grid_items}
                yield task("grid", config.sentiment, shown, sentiment.grid, shots, **options)
        if _named(shown):
            yield task("precedent", config.sentiment, shown, sentiment.precedent)
    if _named(config.problems):
        shown = config.problem_demonstrations
        if config.problem_shots > 0 and not _named(shown):
            raise EvaluationError(
                "evaluation.problem_shots asks for demonstrations: set evaluation.problem_demonstrations.source, or "
                "evaluation.problem_shots = 0"
            )
        arguments = (config.problem_shots, config.problem_new_tokens)
        if config.problem_shots > 0:
            yield task("problems", config.problems, shown, problems.few_shot, *arguments)
        else:
            yield task("problems", config.problems, None, problems.few_shot, [], *arguments)
    if _named(config.instructions):
        options = {"generations": config.instruction_generations, "new_tokens": config.instruction_new_tokens}
        yield task("instructions", config.instructions, None, instructions.responses, **options)
    if _named(config.preferences):
        yield task("preferences", config.preferences, None, preferences.pairs, reference, beta=beta)


def _named(source: SourceConfig) -> bool:
    return bool(source.source or source.path)


class _Data:
    """The evaluation sources of a preset, each read once."""

    def __init__(self, data_dir: str):
        self.data_dir = data_dir
        self._items: dict[SourceConfig, list] = {}
        self._resolved: dict[SourceConfig, sources.Resolved] = {}

    def items(self, source: SourceConfig) -> list:
        if source not in self._items:
            self._items[source] = list(sources.load(source, self.data_dir))
        return self._items[source]

    def resolved(self, source: SourceConfig) -> sources.Resolved:
        if source not in self._resolved:
            self._resolved[source] = sources.resolve(source, self.data_dir)
        return self._resolved[source]

    def reader(self, source: SourceConfig) -> str:
        return self.resolved(source).reader

    def name(self, source: SourceConfig) -> str:
        """The first part of a protocol's name: the source, or its file's stem; `wikitext-2` is `wikitext2`."""
        name = (source.source or Path(source.path).stem).replace("wikitext-", "wikitext")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name)

    def noted(
        self, evaluation: Evaluation, source: SourceConfig, demonstrations: SourceConfig | None = None
    ) -> Evaluation:
        """The evaluation with where its data came from."""
        notes = {"data": self._note(source)}
        if demonstrations is not None:
            notes["demonstrations"] = self._note(demonstrations)
        return replace(evaluation, settings={**evaluation.settings, **notes})

    def _note(self, source: SourceConfig) -> dict[str, Any]:
        resolved = self.resolved(source)
        return {
            "source": resolved.name,
            "split": resolved.split,
            "kind": resolved.kind,
            "fingerprint": resolved.fingerprint,
            "revision": resolved.revision,
            "examples": len(self.items(source)),
            "subsampled": source.max_examples >= 0 or source.skip_examples > 0,
        }


def main() -> int:
    """Write the page."""
    atomic_write(PAGE, describe().encode())
    print(f"wrote {PAGE.relative_to(paths.PROJECT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
