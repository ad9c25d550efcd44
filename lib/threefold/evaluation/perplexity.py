"""Perplexity of running text under four definitions; the same model can differ by a third between them.

Every definition sums nats over the tokens it scores and divides once (no mean of means), keeps the sums of each
document, and gives bits per byte of the text it scored, the one unit in which models of different tokenizers compare.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.data.wikitext import hub_rows
from threefold.evaluation import statistics
from threefold.evaluation.adapter import LanguageModel, Request
from threefold.evaluation.results import SCORING, Evaluation, Scoring, metric, plain

VERSION = 1  # of the protocols in this module; raised when a number would come out differently
LINES = 100
LINES_CUT = 512
BITS = math.log(2)


# The text ------------------------------------------------------------------------------------------------------------


def running_text(documents: Sequence[str], wikitext: bool = True) -> tuple[str, list[int]]:
    """One text over all documents, and where each begins in it.

    For WikiText it is `"\\n\\n".join(dataset["text"])` over the hub's rows, on which published GPT-2 perplexities are
    computed; for other text the documents joined by a blank line.
    """
    rows = [hub_rows(document) if wikitext else [document] for document in documents]
    lengths = [sum(len(row) + 2 for row in rows_of_document) for rows_of_document in rows]
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    return "\n\n".join(row for rows_of_document in rows for row in rows_of_document), starts


def first_lines(documents: Sequence[str], wikitext: bool = True, count: int = LINES) -> list[str]:
    """The first lines that are not blank; those of WikiText are the rows of the hub's form."""
    rows = [row for document in documents for row in (hub_rows(document) if wikitext else document.split("\n"))]
    return [row for row in rows if row.strip()][:count]


def pages(document: str, last: bool = False) -> list[str]:
    """The pages of `EleutherAI/wikitext_document_level` in an article: mostly one.

    Its splitting is its own: a page begins at every line that starts with `= ` and ends with ` =` once `= = =` and `=
    =` are closed up; blank text before the first is dropped and the newline before a page belongs to none (the `last`
    document of a file keeps its own).
    """
    found: list[list[str]] = [[]]
    for line in (document if last else document.removesuffix("\n")).split("\n"):
        mark = line.replace("= = =", "===").replace("= =", "==").strip()
        if mark.startswith("= ") and mark.endswith(" ="):
            found.append([])
        found[-1].append(line)
    return [page for lines in found if (page := "\n".join(lines)).strip()]


def detokenize(page: str) -> str:
    """lm-eval's wikitext detokenizer (its `preprocess_wikitext.py`, version 2): undoes ` @-@ `, spaced punctuation,
    ...
    """
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for old, new in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(old, new)
    for mark in (":", ";", ".", "!", "?", ","):
        text = text.replace(f" {mark} ", f"{mark} ")
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for old, new in (("= = = =", "===="), ("= = =", "==="), ("= =", "==")):
        text = text.replace(old, new)
    for old, new in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(old, new)
    return text


# Protocols -----------------------------------------------------------------------------------------------------------


def disjoint(
    model: LanguageModel,
    documents: Sequence[str],
    window: int,
    *,
    source: str = "wikitext2",
    wikitext: bool = True,
    scoring: Scoring = SCORING,
) -> Evaluation:
    """`{source}/disjoint-{window}`: the text cut into windows that do not overlap.

    - Data: `evaluation.perplexity` (WikiText-2 raw, test); the hub's rows joined by blank lines into one stream over
      all documents. Other text: the documents, joined likewise.
    - Tokens: the model's own, of the whole stream, without special tokens.
    - Windows: `window` positions each, the model's prefix tokens (BOS; GPT-2 has none) included and repeated in each.
    - Scoring: natural-log likelihood of every token but the first of a window, which has nothing before it; one sum
      over all tokens, divided once. A token belongs to the document in which it begins.
    - Metrics: `perplexity` (per token), `bits_per_byte` (UTF-8 bytes of the scored tokens), both with a 95% percentile
      bootstrap over documents; `tokens_per_byte`, without one.
    - Reproduces: GPT-2 124M's 29.94 on WikiText-2 raw test at window 1024.
    """
    return _windowed(model, documents, window, None, f"{source}/disjoint-{window}", wikitext, scoring)


def strided(
    model: LanguageModel,
    documents: Sequence[str],
    window: int,
    stride: int,
    *,
    source: str = "wikitext2",
    wikitext: bool = True,
    scoring: Scoring = SCORING,
) -> Evaluation:
    """`{source}/stride-{stride}`: windows that move by `stride` tokens, each token scored once.

    - Data: as `disjoint`, of it the first `evaluation.strided_documents` documents (-1: all).
    - Tokens: as `disjoint`.
    - Windows: as `disjoint`, each beginning `stride` tokens after the one before.
    - Scoring: a window scores only what the one before it did not, so that every token but the first ones has at least
      `window - stride` positions before it; sums as in `disjoint`.
    - Metrics: `perplexity` (per token), `bits_per_byte`, both with a 95% percentile bootstrap over documents;
      `tokens_per_byte`, without one.
    - Reproduces: GPT-2 124M's 25.2 and GPT-2 large's 16.44 on WikiText-2 raw test at window 1024, stride 512.
    """
    return _windowed(model, documents, window, stride, f"{source}/stride-{stride}", wikitext, scoring)


def lm_eval(
    model: LanguageModel,
    documents: Sequence[str],
    *,
    source: str = "wikitext2",
    wikitext: bool = True,
    scoring: Scoring = SCORING,
) -> Evaluation:
    """`{source}/lm-eval`: lm-evaluation-harness's `wikitext` task, document by document.

    - Data: `evaluation.perplexity` (WikiText-2 raw, test), cut into the pages of
      `EleutherAI/wikitext_document_level`: an article is one page but for a few.
    - Tokens: the model's own, of each page after lm-eval's detokenizer (` @-@ ` to `-`, ...), without special tokens.
    - Windows: as long as the model's context; the first begins with the model's BOS (EOS where it has none), each later
      one with the last token of the window before, the last one with as much before it as fills the context.
    - Scoring: every token is scored. Words and bytes are counted on the page before detokenisation (words:
      `re.split(r"\\s+", page)`); one sum of nats over all pages, divided once.
    - Metrics: `word_perplexity`, `byte_perplexity`, `perplexity` (per token), `bits_per_byte`, each with a 95%
      percentile bootstrap over pages; `tokens_per_byte`, without one.
    - Reproduces: lm-eval 0.4's `wikitext` run with `add_bos_token=False` (else it would score the BOS itself), to 1e-3
      on the same checkpoint; with it GPT-2 124M's word perplexity 37.37 and 0.9769 bits per byte.
    """
    name = f"{source}/lm-eval"
    # (document, page): an article is one page but for a few
    cut = [
        (i, text)
        for i, d in enumerate(documents)
        for text in (pages(d, i == len(documents) - 1) if wikitext else [d])
        if text.strip()
    ]
    if not cut:
        raise EvaluationError(f"{name}: the text is empty")
    originals = [text for _, text in cut]
    texts = [detokenize(text) for text in originals] if wikitext else originals
    start = model.prefix_ids or [_first_token(model)]
    requests: list[Request] = []
    owners: list[int] = []
    tokens = np.zeros(len(cut), np.int64)
    for index, ids in enumerate(model.encode(texts)):
        tokens[index] = len(ids)
        first = model.context - len(start) + 1
        windows = [(start, ids[:first])]
        for at in range(first, len(ids), model.context):
            end = min(at + model.context, len(ids))
            windows.append((ids[max(0, end - model.context - 1) : at], ids[at:end]))  # the last one reaches back
        requests += windows
        owners += [index] * len(windows)
    spans = model.token_loglikelihoods(
        requests, batch_tokens=scoring.batch_tokens, describe=lambda i: f"{name}: document {cut[owners[i]][0]}"
    )
    items = pd.DataFrame(
        {
            "document": [document for document, _ in cut],
            "nats": np.bincount(owners, weights=[-span.sum() for span in spans], minlength=len(cut)),
            "tokens": tokens,
            "words": [len(re.split(r"\s+", text)) for text in originals],
            "bytes": [len(text.encode()) for text in originals],
        }
    )
    metrics = {
        "word_perplexity": _ratio(items, "words", scoring, np.exp, "perplexity per word"),
        "byte_perplexity": _ratio(items, "bytes", scoring, np.exp, "perplexity per byte"),
        **_metrics(items, scoring),
    }
    settings = {
        "version": VERSION,
        "prefix": model.tokenizer.convert_ids_to_tokens(start),
        "windows": len(requests),
        "windows_without_prefix": len(requests) - len(cut),
        **_totals(items),
    }
    return Evaluation(name, model.name, model.weights_sha256, metrics, items, settings)


def lines(
    model: LanguageModel,
    documents: Sequence[str],
    *,
    source: str = "wikitext2",
    wikitext: bool = True,
    count: int = LINES,
    cut: int = LINES_CUT,
    scoring: Scoring = SCORING,
) -> Evaluation:
    """`{source}/lines-100`: the first 100 non-empty lines, each alone, cut at 512 positions.

    The precedent's protocol, kept to show how far it lies from the others: most tokens have little before them, and 100
    lines are two articles.

    - Data: `evaluation.lines` (WikiText-2 raw, validation), its first 100 lines that are not blank; a line is a row of
      the hub's form, newline included.
    - Tokens: the model's own, of each line alone, without special tokens.
    - Windows: one a line, cut at 512 positions, the model's prefix tokens included.
    - Scoring: every token of a line but its first; one sum of nats over all lines, divided once.
    - Metrics: `perplexity` (per token), `bits_per_byte` (bytes of the scored tokens), both with a 95% percentile
      bootstrap over lines; `tokens_per_byte`, without one.
    - Reproduces: 40.64 of GPT-2 124M on WikiText-2 raw validation.
    """
    name = f"{source}/lines-{count}"
    rows = first_lines(documents, wikitext, count)
    if not rows:
        raise EvaluationError(f"{name}: the text is empty")
    prefix = model.prefix_ids
    requests: list[Request] = []
    kept, scored_bytes, n_cut = [], [], 0
    for index, row in enumerate(rows):
        ids, ends = model.encode_with_ends(row)
        if len(ids) + len(prefix) > cut:
            n_cut += 1
            ids, ends = ids[: cut - len(prefix)], ends[: cut - len(prefix)]
        needed = len(prefix) + len(ids)
        if needed > model.context:
            raise EvaluationError(
                f"{name}: line {index} takes {needed} positions, {model.name} has {model.context}: the protocol cuts "
                f"at {cut}, not at the context; use a longer model.context, or leave the protocol out with "
                'evaluation.lines.source = ""'
            )
        if len(ids) < 2:
            continue
        requests.append(([*prefix, int(ids[0])], ids[1:].tolist()))
        kept.append(index)
        scored_bytes.append(len(row[ends[0] : ends[-1]].encode()))
    spans = model.token_loglikelihoods(
        requests, batch_tokens=scoring.batch_tokens, describe=lambda i: f"{name}: line {kept[i]}"
    )
    items = pd.DataFrame(
        {
            "document": kept,
            "nats": [-float(span.sum()) for span in spans],
            "tokens": [len(span) for span in spans],
            "words": [len(rows[index].split()) for index in kept],
            "bytes": scored_bytes,
        }
    )
    settings = {"version": VERSION, "lines": len(kept), "cut": cut, "lines_cut": n_cut, **_totals(items)}
    return Evaluation(name, model.name, model.weights_sha256, _metrics(items, scoring), items, settings)


# Shared --------------------------------------------------------------------------------------------------------------


def _windowed(
    model: LanguageModel,
    documents: Sequence[str],
    window: int,
    stride: int | None,
    name: str,
    wikitext: bool,
    scoring: Scoring,
) -> Evaluation:
    if window > model.context:
        raise EvaluationError(
            f"{name}: evaluation.window = {window} exceeds the {model.context} positions of {model.name}; "
            f"set it to at most {model.context}, or use a longer model.context"
        )
    prefix = model.prefix_ids
    step = window - len(prefix)
    if step < 2:
        raise EvaluationError(
            f"{name}: evaluation.window = {window} leaves no token to score; set it to {len(prefix) + 2} or more"
        )
    move = step if stride is None else stride
    if not 1 <= move <= step:
        raise EvaluationError(
            f"{name}: evaluation.stride = {stride} must be at least 1 and at most {step}, "
            f"what a window of {window} holds"
        )
    text, starts = running_text(documents, wikitext)
    ids, ends = model.encode_with_ends(text)
    if len(ids) < 2:
        raise EvaluationError(f"{name}: the text is empty")

    scored = np.zeros(len(ids), bool)
    requests: list[Request] = []
    firsts: list[int] = []  # first scored token of each window
    done = 0
    for begin in range(0, len(ids), move):
        end = min(begin + step, len(ids))
        first = max(done, begin + 1)  # the first text token of a window has nothing before it
        if first < end:
            requests.append(([*prefix, *ids[begin:first].tolist()], ids[first:end].tolist()))
            firsts.append(first)
            scored[first:end] = True
        done = end
        if end == len(ids):
            break
    # A token belongs to the document in which it begins.
    byte_ends = _byte_ends(text, ends)
    n_bytes = np.diff(byte_ends, prepend=0)
    token_starts = np.concatenate([[0], ends[:-1]])
    owner = np.searchsorted(starts, token_starts, side="right") - 1
    spans = model.token_loglikelihoods(
        requests,
        batch_tokens=scoring.batch_tokens,
        describe=lambda i: f"{name}: window at token {firsts[i]}, document {owner[firsts[i]]}",
    )
    nats = np.zeros(len(ids))
    for first, span in zip(firsts, spans, strict=True):
        nats[first : first + len(span)] = -span

    def by_document(weights: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=weights * scored, minlength=len(documents))

    items = pd.DataFrame(
        {
            "document": np.arange(len(documents)),
            "nats": by_document(nats),
            "tokens": by_document(np.ones(len(ids))).astype(np.int64),
            "words": [len(document.split()) for document in documents],
            "bytes": by_document(n_bytes.astype(np.float64)).astype(np.int64),
        }
    )
    items = items[items["tokens"] > 0].reset_index(drop=True)
    settings = {
        "version": VERSION,
        "window": window,
        "stride": move,
        "windows": len(requests),
        "text_tokens": len(ids),
        "unscored_tokens": int((~scored).sum()),
        **_totals(items),
    }
    return Evaluation(name, model.name, model.weights_sha256, _metrics(items, scoring), items, settings)


def _first_token(model: LanguageModel) -> int:
    bos = model.tokenizer.bos_token_id
    return model.tokenizer.eos_token_id if bos is None else bos


def _byte_ends(text: str, ends: np.ndarray) -> np.ndarray:
    """UTF-8 bytes before each character position in `ends`."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])[ends]


def _ratio(items: pd.DataFrame, per: str, scoring: Scoring, transform, unit: str) -> dict:
    interval = statistics.bootstrap_ratio(
        items["nats"], items[per], resamples=scoring.bootstrap, seed=scoring.seed, transform=transform
    )
    return metric(interval, unit, "bootstrap over documents")


def _metrics(items: pd.DataFrame, scoring: Scoring) -> dict:
    return {
        "perplexity": _ratio(items, "tokens", scoring, np.exp, "perplexity per token"),
        "bits_per_byte": _ratio(items, "bytes", scoring, lambda nats: nats / BITS, "bits per byte"),
        "tokens_per_byte": plain(items["tokens"].sum() / items["bytes"].sum(), "tokens per byte", len(items)),
    }


def _totals(items: pd.DataFrame) -> dict:
    return {"documents": len(items), **{key: int(items[key].sum()) for key in ("tokens", "words", "bytes")}}
