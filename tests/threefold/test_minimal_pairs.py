"""Minimal pairs: scores against one sequence at a time, ties, the sub-sample, and the whole way from a preset."""

import json
from collections import Counter

import pandas as pd
import pytest
import torch
from evaluation_fixtures import (
    gpt2,
    gpt2_style_tokenizer,
    language_model,
    llama,
    naive_logprobs,
    real_data,
    text,
    tokenizer,
)

from basics.errors import DataError
from threefold.config import EvaluationConfig, SourceConfig
from threefold.data import hub, sources
from threefold.data.overlap import pieces
from threefold.evaluation import LanguageModel, describe, evaluate, pairs
from threefold.evaluation.results import Dataset
from threefold.evaluation.statistics import wilson


def items_of(counts: dict[str, int]) -> list[dict]:
    return [
        {"good": text(5, i), "bad": text(5, i + 1000), "phenomenon": phenomenon, "group": "islands"}
        for phenomenon, n in counts.items()
        for i in range(n)
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_more_likely_sentence_wins(kind):
    """Each sentence after a space and BOS, or for GPT-2 after its EOS; sums, not means."""
    original, tok = (llama(), tokenizer()) if kind == "llama" else (gpt2(), gpt2_style_tokenizer())
    items = items_of({"a": 9, "b": 6})
    items[3]["good"] = "a"  # much shorter: its sum is higher
    result = pairs.blimp(LanguageModel.from_model(original, tok, kind), Dataset("blimp", items))
    start = tok.bos_token_id if kind == "llama" else tok.eos_token_id
    for row, item in zip(result.items.itertuples(), items, strict=True):
        ids = [tok(f" {item[side]}", add_special_tokens=False).input_ids for side in ("good", "bad")]
        good, bad = (float(naive_logprobs(original, [start], sentence).sum()) for sentence in ids)
        assert (row.logp_good, row.logp_bad) == pytest.approx((good, bad), abs=1e-3)
        assert row.correct == (good > bad) and row.phenomenon == item["phenomenon"]
    for name, part in (("accuracy", result.items), ("accuracy_b", result.items[result.items["phenomenon"] == "b"])):
        expected = wilson(part["correct"].sum(), len(part))
        got = result.metrics[name]
        assert (got["value"], got["low"], got["high"], got["n"]) == expected and got["interval"] == "Wilson"


def test_a_tie_counts_half():
    same = [{"good": "the baker", "bad": "the baker", "phenomenon": "a", "group": ""}]
    assert pairs.blimp(language_model(), Dataset("blimp", same)).metrics["accuracy"]["value"] == 0.5


def test_the_sub_sample_is_seeded_even_and_said():
    items = items_of({"a": 30, "b": 30, "c": 4})
    chosen = pairs.sample(items, 10, 7)
    assert chosen == pairs.sample(items, 10, 7) == sorted(set(chosen))
    assert chosen != pairs.sample(items, 10, 8)
    assert Counter(items[i]["phenomenon"] for i in chosen) == {"a": 10, "b": 10, "c": 4}
    assert pairs.sample(items[30:], 10, 7) == [i - 30 for i in chosen if i >= 30], "whatever else there is"
    assert pairs.sample(items, -1, 7) == list(range(64))
    result = pairs.blimp(language_model(), Dataset("blimp", items), per_phenomenon=10)
    assert result.items["item"].tolist() == pairs.sample(items, 10, 0)
    said = {"items": 64, "pairs": 24, "phenomena": 3, "pairs_per_phenomenon": 10, "sample_seed": 0}
    assert result.settings == said | {"subsampled": True}


def test_from_a_preset_to_a_record(tmp_path):
    """Off unless a preset names the source; then every metric of it is on the page of protocols."""
    rows = [{"sentence_good": i["good"], "sentence_bad": i["bad"], "UID": i["phenomenon"]} for i in items_of({"a": 5})]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "pairs.jsonl"), reader="minimal-pairs")
    model = language_model()
    assert evaluate(model, EvaluationConfig()) == []
    (evaluation,) = evaluate(model, EvaluationConfig(blimp=source, blimp_pairs=3), seed=4)
    assert evaluation.protocol == "pairs/minimal-pairs" and evaluation.settings["sample_seed"] == 4
    assert evaluation.settings["data"]["subsampled"] and evaluation.settings["data"]["examples"] == 5
    assert len(evaluation.items) == 3
    assert set(evaluation.metrics) == {"accuracy", "accuracy_a"} and "`accuracy_{phenomenon}`" in describe()


def test_a_repository_with_a_config_for_each_phenomenon(tmp_path, monkeypatch):
    """The hub's form, from a local clone: by its files, and through `datasets`, config after config."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    columns = {"sentence_good": ["a", "b"], "sentence_bad": ["c", "d"]}
    clone, names = tmp_path / "nyu-mll" / "blimp", ("adjunct_island", "wh_island")
    for name in names:
        (clone / name).mkdir(parents=True)
        pd.DataFrame({**columns, "UID": name}).to_parquet(clone / name / "train-00000-of-00001.parquet")
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/train-*\n" for n in names)
    (clone / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    expected = [(good, name) for name in names for good in ("a", "b")]
    items = sources.load(SourceConfig(source="blimp"), tmp_path)
    assert [(item["good"], item["phenomenon"]) for item in items] == expected
    rows = hub.load(str(clone), "*", "train", "", "blimp")
    assert [(row["sentence_good"], row["UID"]) for row in rows] == expected


def test_a_row_without_a_sentence_is_refused_by_its_line(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"sentence_good": "a", "UID": "x"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: no column 'sentence_bad'"):
        sources.load(SourceConfig(path=str(tmp_path / "pairs.jsonl"), reader="minimal-pairs"))


def test_both_sentences_are_searched_for_in_training_text():
    (item,) = items_of({"a": 1})
    assert pieces("minimal-pairs", item) == ([item["good"], item["bad"]], 2)


def test_the_published_data_are_67_phenomena_of_1000_pairs():
    items = sources.load(SourceConfig(source="blimp"), real_data())
    assert set(Counter(item["phenomenon"] for item in items).values()) == {1000} and len(items) == 67_000
    assert torch.tensor([len(item["good"]) for item in items]).min() > 0
    assert len(pairs.sample(items, 20, 0)) == 67 * 20
