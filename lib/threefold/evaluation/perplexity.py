"""Perplexity of running text under four definitions, which can differ by a third for the same model.

Every definition makes requests, scores them, sums nats, tokens, words and bytes by document (the items) and computes
its metrics from the items: one sum over all documents, divided once (no mean of means). Bits per byte are the unit in
which models of different tokenizers can be compared.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from basics.errors import EvaluationError
from threefold.data.wikitext import hub_rows
from threefold.evaluation.adapter import LanguageModel, Request
from threefold.evaluation.backends import UNLIMITED
from threefold.evaluation.results import SCORING, Dataset, Evaluation, Scoring, point

LINES = 100
LINES_CUT = 512
LM_EVAL_CONTEXT = 2048  # positions of a model without a limit
METRICS = {  # name: (column that the nats are divided by, transform of nats per unit, unit)
    "word_perplexity": ("words", np.exp, "perplexity per word"),
    "byte_perplexity": ("bytes", np.exp, "perplexity per byte"),
    "perplexity": ("tokens", np.exp, "perplexity per token"),
    "bits_per_byte": ("bytes", lambda nats: nats / math.log(2), "bits per byte"),
}
PER_TOKEN = ("perplexity", "bits_per_byte")  # the metrics of those definitions that score tokens and not words


# The text ------------------------------------------------------------------------------------------------------------


def running_text(documents: Sequence[str], wikitext: bool = True) -> tuple[str, list[int]]:
    """One text over all documents, and where each begins in it.

    For WikiText it is `"\\n\\n".join(dataset["text"])` over the hub's rows, on which published GPT-2 perplexities are
    computed; for other text the documents joined by a blank line.
    """
    texts = ["\n\n".join(hub_rows(document)) if wikitext else document for document in documents]
    starts = np.cumsum([0, *(len(text) + len("\n\n") for text in texts[:-1])]).tolist()
    return "\n\n".join(texts), starts


def first_lines(documents: Sequence[str], wikitext: bool = True, count: int = LINES) -> list[str]:
    """The first lines that are not blank; those of WikiText are the rows of the hub's form."""
    rows = [row for document in documents for row in (hub_rows(document) if wikitext else document.split("\n"))]
    return [row for row in rows if row.strip()][:count]


def pages(document: str, last: bool = False) -> list[str]:
    """The pages of `EleutherAI/wikitext_document_level` in an article: usually one.

    A page of that dataset begins at every line that starts with `= ` and ends with ` =` after `= = =` and `= =` have
    lost their spaces. Blank text before the first page is dropped, and the newline before a page belongs to none (the
    `last` document of a file keeps its final newline).
    """
    by_page: list[list[str]] = [[]]
    for line in (document if last else document.removesuffix("\n")).split("\n"):
        mark = line.replace("= = =", "===").replace("= =", "==").strip()
        if mark.startswith("= ") and mark.endswith(" ="):
            by_page.append([])
        by_page[-1].append(line)
    return [page for lines in by_page if (page := "\n".join(lines)).strip()]


def detokenize(page: str) -> str:
    """lm-eval's wikitext detokenizer (its `preprocess_wikitext.py`, version 2): undoes ` @-@ `, spaced punctuation."""
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for old, new in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(old, new)
    for mark in (":", ";", ".", "!", "?", ","):
        text = text.replace(f" {mark} ", f"{mark} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        text = re.sub(rf"\{left}\s*([^\{right}]*?)\s*\{right}", rf"{left}\1{right}", text)
    for old, new in (("= = = =", "===="), ("= = =", "==="), ("= =", "==")):
        text = text.replace(old, new)
    for old, new in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(old, new)
    return text


# Protocols -----------------------------------------------------------------------------------------------------------


def disjoint(model: LanguageModel, data: Dataset, window: int, *, scoring: Scoring = SCORING) -> Evaluation:
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
    return _windowed(model, data, window, None, f"{data.name}/disjoint-{window}", scoring)


def strided(
    model: LanguageModel, data: Dataset, window: int, stride: int, *, documents: int = -1, scoring: Scoring = SCORING
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
    first = data if documents < 0 else replace(data, items=data.items[:documents])
    return _windowed(model, first, window, stride, f"{data.name}/stride-{stride}", scoring)


def lm_eval(model: LanguageModel, data: Dataset, *, scoring: Scoring = SCORING) -> Evaluation:
    """`{source}/lm-eval`: lm-evaluation-harness's `wikitext` task, document by document.

    - Data: `evaluation.perplexity` (WikiText-2 raw, test), cut into the pages of
      `EleutherAI/wikitext_document_level`: an article is one page but for a few.
    - Tokens: the model's own, of each page after lm-eval's detokenizer (` @-@ ` to `-`, ...), without special tokens.
    - Windows: as long as the model's context (2,048 positions, lm-eval's default, where it has no limit); the first
      begins with the model's BOS (EOS where it has none), each later one with the last token of the window before, the
      last one with as much before it as fills the context.
    - Scoring: every token is scored. Words and bytes are counted on the page before detokenisation (words:
      `re.split(r"\\s+", page)`); one sum of nats over all pages, divided once.
    - Metrics: `word_perplexity`, `byte_perplexity`, `perplexity` (per token), `bits_per_byte`, each with a 95%
      percentile bootstrap over pages; `tokens_per_byte`, without one.
    - Reproduces: lm-eval 0.4's `wikitext` run with `add_bos_token=False` (else it would score the BOS itself), to 1e-3
      on the same checkpoint; with it GPT-2 124M's word perplexity 37.37 and 0.9769 bits per byte.
    """
    name, last = f"{data.name}/lm-eval", len(data.items) - 1
    cut = [
        (index, page)
        for index, document in enumerate(data.items)
        for page in (pages(document, index == last) if data.wikitext else [document])
        if page.strip()
    ]
    if not cut:
        raise EvaluationError(f"{name}: the text is empty")
    documents, originals = zip(*cut, strict=True)
    encoded = model.encode([detokenize(page) for page in originals] if data.wikitext else originals)
    context, start = LM_EVAL_CONTEXT if model.context == UNLIMITED else model.context, model.start_ids
    first = context - len(start) + 1  # tokens of a page's first window
    requests: list[Request] = []
    owners: list[int] = []  # page of each request
    for index, ids in enumerate(encoded):
        requests.append((start, ids[:first]))
        for at in range(first, len(ids), context):
            end = min(at + context, len(ids))
            requests.append((ids[max(0, end - context - 1) : at], ids[at:end]))  # the last one reaches back
        owners += [index] * (len(requests) - len(owners))
    totals = scoring.totals(model, requests, lambda i: f"{name}: document {documents[owners[i]]}")
    items = {
        "document": documents,
        "nats": np.bincount(owners, weights=-totals),
        "tokens": [len(ids) for ids in encoded],
        "words": [len(re.split(r"\s+", page)) for page in originals],
        "bytes": [len(page.encode()) for page in originals],
    }
    settings = {
        "prefix": model.tokenizer.convert_ids_to_tokens(start),
        "windows": len(requests),
        "windows_without_prefix": len(requests) - len(cut),
    }
    return _evaluation(model, name, items, settings, scoring, METRICS)


def lines(
    model: LanguageModel, data: Dataset, *, count: int = LINES, cut: int = LINES_CUT, scoring: Scoring = SCORING
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
    name = f"{data.name}/lines-{count}"
    rows = first_lines(data.items, data.wikitext, count)
    if not rows:
        raise EvaluationError(f"{name}: the text is empty")
    prefix = model.prefix_ids
    requests: list[Request] = []
    kept, scored_bytes, n_cut = [], [], 0
    for index, row in enumerate(rows):
        ids, ends = model.encode_with_ends(row)
        n_cut += len(prefix) + len(ids) > cut
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
    items = {
        "document": kept,
        "nats": -scoring.totals(model, requests, lambda i: f"{name}: line {kept[i]}"),
        "tokens": [len(target) for _, target in requests],
        "words": [len(rows[index].split()) for index in kept],
        "bytes": scored_bytes,
    }
    return _evaluation(model, name, items, {"lines": len(kept), "cut": cut, "lines_cut": n_cut}, scoring)


def _windowed(
    model: LanguageModel, data: Dataset, window: int, stride: int | None, name: str, scoring: Scoring
) -> Evaluation:
    """Perplexity over windows of the running text that move by `stride` tokens (None: by as many as a window holds)."""
    size = window - len(model.prefix_ids)  # tokens of the text in a window
    move = size if stride is None else stride
    problem = ""
    if window > model.context:
        problem = (
            f"window = {window} exceeds the {model.context} positions of {model.name}; set it to at most "
            f"{model.context}, or use a longer model.context"
        )
    elif size < 2:
        problem = f"window = {window} leaves no token to score; set it to {len(model.prefix_ids) + 2} or more"
    elif not 1 <= move <= size:
        problem = f"stride = {stride} must be at least 1 and at most {size}, what a window of {window} holds"
    if problem:
        raise EvaluationError(f"{name}: evaluation.{problem}")
    text, starts = running_text(data.items, data.wikitext)
    ids, ends = model.encode_with_ends(text)
    if len(ids) < 2:
        raise EvaluationError(f"{name}: the text is empty")
    windows = _windows(len(ids), size, move)
    # A token belongs to the document in which it begins.
    owner_T = np.searchsorted(starts, np.concatenate([[0], ends[:-1]]), side="right") - 1
    spans = model.loglikelihoods(
        [([*model.prefix_ids, *ids[begin:first].tolist()], ids[first:end].tolist()) for begin, first, end in windows],
        batch_tokens=scoring.batch_tokens,
        describe=lambda i: f"{name}: window at token {windows[i][1]}, document {owner_T[windows[i][1]]}",
    )
    scored = np.concatenate([np.arange(first, end) for _, first, end in windows])
    owners, count = owner_T[scored], len(data.items)
    byte_ends = np.cumsum([0, *(len(character.encode()) for character in text)])[ends]
    items = pd.DataFrame(
        {
            "document": np.arange(count),
            "nats": np.bincount(owners, -np.concatenate(spans), count),
            "tokens": np.bincount(owners, minlength=count),
            "words": [len(document.split()) for document in data.items],
            "bytes": np.bincount(owners, np.diff(byte_ends, prepend=0)[scored], count).astype(np.int64),
        }
    )
    settings = {
        "window": window,
        "stride": move,
        "windows": len(windows),
        "text_tokens": len(ids),
        "unscored_tokens": len(ids) - len(scored),
    }
    return _evaluation(model, name, items[items["tokens"] > 0].reset_index(drop=True), settings, scoring)


def _windows(tokens: int, size: int, move: int) -> list[list[int]]:
    """[begin, first scored token, end] of each window that scores a token. The first token of a window is not scored:
    nothing comes before it.
    """
    begins = np.arange(0, max(0, tokens - size) + move, move)
    ends = np.minimum(begins + size, tokens)
    firsts = np.maximum(begins + 1, [0, *ends[:-1]])
    return np.stack([begins, firsts, ends], axis=1)[firsts < ends].tolist()


def _evaluation(
    model: LanguageModel, name: str, items: Any, settings: dict, scoring: Scoring, names: Sequence[str] = PER_TOKEN
) -> Evaluation:
    """The evaluation of items (a table or dictionary of the columns document, nats, tokens, words, bytes) under the
    metrics of these names.
    """
    items = pd.DataFrame(items)
    metrics = {
        key: scoring.ratio(items["nats"], items[per], unit, "documents", transform=transform)
        for key, (per, transform, unit) in METRICS.items()
        if key in names
    }
    metrics["tokens_per_byte"] = point(items["tokens"].sum() / items["bytes"].sum(), "tokens per byte", len(items))
    settings |= {"documents": len(items), **{key: int(items[key].sum()) for key in ("tokens", "words", "bytes")}}
    return Evaluation(name, model.name, model.weights_sha256, metrics, items, settings)
