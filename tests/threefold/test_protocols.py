import hashlib
import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from evaluation_fixtures import gpt2_language_model, language_model, model_config, tokenizer

from basics import paths
from basics.errors import EvaluationError, ThreefoldError
from threefold.config import EvaluationConfig, SourceConfig
from threefold.evaluation import PROTOCOLS, LanguageModel, describe, evaluate, precision, save_items, speed


def sample(name: str, split: str = "test", n: int = 8) -> SourceConfig:
    return SourceConfig(source=f"sample-{name}", split=split, max_examples=n)


CONFIG = EvaluationConfig(
    perplexity=sample("text", n=3),
    lines=sample("text", "validation", n=6),
    window=64,
    stride=32,
    strided_documents=2,
    sentiment=sample("sentiment", "validation", 12),
    sentiment_demonstrations=sample("sentiment", "train", 40),
    sentiment_shots=(0, 2),
    sentiment_templates=2,
    sentiment_draws=2,
    problems=sample("problems"),
    problem_demonstrations=sample("problems", "train"),
    problem_shots=1,
    problem_new_tokens=6,
    instructions=sample("instructions"),
    instruction_new_tokens=4,
    instruction_generations=4,
    preferences=sample("preferences"),
    bootstrap=50,
)


def test_a_preset_is_evaluated_under_all_its_protocols(tmp_path):
    model = LanguageModel.random(model_config(context=512), tokenizer(), 0)
    said = []
    done = evaluate(model, CONFIG, reference=model, beta=0.2, progress=said.append)
    names = [evaluation.protocol for evaluation in done]
    assert names == [
        "sample-text/disjoint-64",
        "sample-text/stride-32",
        "sample-text/lm-eval",
        "sample-text/lines-100",
        "sample-sentiment/0-shot",
        "sample-sentiment/2-shot",
        "sample-sentiment/precedent-3-shot",
        "sample-problems/1-shot",
        "sample-instructions/responses",
        "sample-preferences/preferences",
    ]
    assert len(said) == len(done) and said[0].startswith("random  sample-text/disjoint-64: perplexity")
    hashes = save_items(tmp_path, done)
    for evaluation in done:
        record = evaluation.record(hashes[evaluation.protocol])
        assert json.loads(json.dumps(record, allow_nan=False)) == record, evaluation.protocol
        assert record["weights_sha256"] == model.weights_sha256 and record["model"] == "random"
        assert record["settings"]["version"] >= 1 and record["settings"]["parameters"] == model.facts["parameters"]
        for metric in record["metrics"].values():
            assert set(metric) == {"value", "low", "high", "n", "unit", "interval"}
            assert metric["low"] is None or metric["low"] <= metric["value"] <= metric["high"]
        file = tmp_path / record["items"]["file"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == record["items"]["sha256"]
        assert len(pd.read_parquet(file)) == record["items"]["rows"] == len(evaluation.items)
    by_name = dict(zip(names, done, strict=True))
    assert by_name["sample-text/stride-32"].settings["documents"] == 2
    data = by_name["sample-sentiment/2-shot"].settings
    assert (
        data["data"]["source"] == "sample-sentiment" and data["data"]["subsampled"] and data["data"]["examples"] == 12
    )
    assert data["demonstrations"]["examples"] == 40 and data["data"]["fingerprint"]
    assert by_name["sample-preferences/preferences"].settings["beta"] == 0.2
    assert (tmp_path / "sample-text_disjoint-64.parquet").is_file()


def test_the_same_model_gives_the_same_items(tmp_path):
    """What paired tests rest on: same weights, same seed, same file."""
    only = ["disjoint", "few-shot", "preferences"]
    first, second = (save_items(tmp_path / str(i), evaluate(language_model(512), CONFIG, only=only)) for i in range(2))
    assert first == second and len(first) == 3


# Precision on a GPU ---------------------------------------------------------------------------------------------------


def spoilt(model: LanguageModel) -> None:
    """Weights of the bf16 copy that are not the model's."""
    with torch.no_grad():
        for weight in model.in_bf16.backend.model.parameters():
            weight.mul_(1.5)


@pytest.mark.parametrize("convert", [True, False], ids=["decoder", "transformers"])
def test_bf16_is_used_where_a_sample_agrees_and_fp32_where_it_does_not(convert, monkeypatch):
    only, more = ["lm-eval", "zero-shot", "preferences"], {"max_examples": 72}
    config = replace(
        CONFIG,
        sentiment=replace(CONFIG.sentiment, **more),
        preferences=replace(CONFIG.preferences, **more),
    )
    reference = gpt2_language_model(512, 1)

    def run(model):
        return {e.protocol: e for e in evaluate(model, config, reference=reference, only=only)}

    exact = run(language_model(512, convert=convert))
    assert not any("precision_check" in e.settings for e in exact.values()), "on a CPU nothing is tried in bf16"
    monkeypatch.setattr(precision, "DEVICES", {"cpu"})
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    monkeypatch.setattr(precision, "SHARE", 1.0)  # tiny models with large weights are rougher than trained ones
    found, refused = run(language_model(512, convert=convert)), language_model(512, convert=convert)
    spoilt(refused)
    monkeypatch.setattr(precision, "SHARE", 0.1)
    refused = run(refused)
    for name, expected in exact.items():
        check = found[name].settings["precision_check"]
        assert check["items"] == min(64, expected.settings["data"]["examples"] // 8)
        if check["items"] < precision.LEAST:
            assert found[name].settings["precision"] == "float32" and "metrics" not in check
            assert found[name].metrics == expected.metrics
            continue
        intervals = {metric for metric, value in expected.metrics.items() if value["low"] is not None}
        assert set(check["metrics"]) == intervals and intervals
        agrees = all(one["difference"] <= one["allowed"] for one in check["metrics"].values())
        assert found[name].settings["precision"] == ("bfloat16" if agrees else "float32")
        for metric in intervals if agrees else ():
            value, wanted = found[name].metrics[metric], expected.metrics[metric]
            assert abs(value["value"] - wanted["value"]) <= wanted["high"] - wanted["low"]
        if refused[name].settings["precision"] == "float32":
            pd.testing.assert_frame_equal(refused[name].items, expected.items)
    assert any(e.settings["precision"] == "bfloat16" for e in found.values())
    spoiled = refused["sample-preferences/preferences"].settings
    assert spoiled["precision"] == "float32" and spoiled["precision_check"]["metrics"]


def test_what_bf16_may_change_is_a_tenth_of_the_interval_of_all_items():
    (exact,) = evaluate(language_model(512), CONFIG, only=["zero-shot"])
    name, metric = next((n, m) for n, m in exact.metrics.items() if m["low"] is not None)
    rough = replace(exact, metrics=exact.metrics | {name: metric | {"value": metric["value"] + 0.25}})
    found = precision.differences(exact, rough, 1 / 4)[name]
    assert found["difference"] == pytest.approx(0.25)
    assert found["allowed"] == pytest.approx((metric["high"] - metric["low"]) / 2 / 10)


def test_a_gpu_without_memory_gets_smaller_batches(monkeypatch):
    """Once it was found how many positions fit, every later batch holds no more."""
    (expected,) = evaluate(language_model(512), CONFIG, only=["problems"])
    model, score, sizes = language_model(512), LanguageModel._continue, []

    def limited(self, prompts, *rest):
        positions = len(prompts) * (max(map(len, prompts)) + CONFIG.problem_new_tokens)
        sizes.append(positions)
        if positions > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, prompts, *rest)

    monkeypatch.setattr(LanguageModel, "_continue", limited)
    most = 10**9
    evaluate(model, CONFIG, only=["problems"])
    most = sizes[0] // 3
    (found,) = evaluate(model, CONFIG, only=["problems"])
    pd.testing.assert_frame_equal(found.items, expected.items)
    del sizes[:]
    evaluate(model, CONFIG, only=["problems"])
    assert max(sizes) <= most
    most = 1
    with pytest.raises(EvaluationError, match=r"tiny: out of memory with one row of \d+ positions"):
        evaluate(model, CONFIG, only=["problems"])


def test_only_and_what_the_preset_leaves_out():
    model = language_model(512)
    assert [e.protocol for e in evaluate(model, CONFIG, only=["lm-eval"])] == ["sample-text/lm-eval"]
    with pytest.raises(EvaluationError, match="no protocol lmeval; there are disjoint, "):
        evaluate(model, CONFIG, only=["lmeval"])
    nothing = EvaluationConfig()
    assert evaluate(model, nothing) == []
    partial = replace(nothing, sentiment=CONFIG.sentiment, sentiment_shots=(0,), bootstrap=50)
    assert [e.protocol for e in evaluate(model, partial)] == ["sample-sentiment/0-shot"]
    with pytest.raises(EvaluationError, match=r"evaluation\.sentiment_demonstrations\.source"):
        evaluate(model, replace(partial, sentiment_shots=(0, 3)))
    with pytest.raises(EvaluationError, match=r"evaluation\.problem_demonstrations\.source"):
        evaluate(model, replace(nothing, problems=CONFIG.problems, problem_shots=2))


def test_own_text_is_no_wikitext(tmp_path):
    """An own file is named by its stem and read as it is: blank lines stay, nothing is detokenised."""
    (tmp_path / "my notes.txt").write_text("One @-@ two , three .\n\nfour five six seven eight nine ten .")
    source = SourceConfig(path=str(tmp_path / "my notes.txt"), reader="text")
    (result,) = evaluate(language_model(), EvaluationConfig(perplexity=source, bootstrap=50), only=["lm-eval"])
    assert result.protocol == "my-notes/lm-eval"
    assert result.settings["bytes"] == len((tmp_path / "my notes.txt").read_bytes())


def test_a_missing_source_is_one_clear_error():
    with pytest.raises(ThreefoldError):
        evaluate(language_model(), EvaluationConfig(perplexity=SourceConfig(source="sample-txt", split="test")))


def test_every_protocol_documents_itself():
    page = describe()
    for protocol in PROTOCOLS.values():
        assert f"## {protocol.title} (`{protocol.key}`, version {protocol.version})" in page
        assert protocol.document.startswith("`"), "the docstring begins with the evaluation's name"
        for part in ("Data", "Tokens", ("Windows", "Prompt"), "Scoring", "Metrics", "Reproduces"):
            names = (part,) if isinstance(part, str) else part
            assert any(re.search(rf"^- {name}\b", protocol.document, re.M) for name in names), (protocol.key, part)
    for figure in ("29.94", "25.2", "37.37", "0.9769", "40.64"):
        assert figure in page


def test_every_metric_is_on_the_page():
    model = LanguageModel.random(model_config(context=512), tokenizer(), 0)
    page = describe()
    for evaluation in evaluate(model, CONFIG, reference=model):
        for name in evaluation.metrics:
            assert f"`{re.sub(r'_b[0-9]+$', '_b{B}', name)}`" in page, (evaluation.protocol, name)


def test_the_page_is_up_to_date():
    page = paths.PROJECT / "docs" / "protocols.md"
    assert page.read_text(encoding="utf-8") == describe(), "docs/protocols.md is old: run `make protocols`"


# Speed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("others", "busy"), [(0.0, False), (3.9, True)])
def test_speed_says_when_the_machine_was_too_busy(monkeypatch, others, busy):
    monkeypatch.setattr(speed, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(speed.OtherLoad, "cores", lambda self: others)
    said: list[str] = []
    options = {"batch_sizes": (1,), "prompt": 4, "new_tokens": 2, "repeats": 1}
    (result,) = speed.measure([language_model()], **options, progress=said.append)
    assert (result.settings["machine_busy"], result.settings["other_processes_cores"]) == (busy, others)
    assert any("too busy to time reliably: other processes used 3.9 of 4 cores" in line for line in said) == busy


def test_speed_measures_models_by_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(speed, "_time", lambda model, batch, *_: calls.append((model.name, batch)) or (0.5, 2.0))
    models = [language_model(name="a"), language_model(name="b")]
    first, second = speed.measure(models, batch_sizes=(1, 4), prompt=10, new_tokens=20, repeats=3)
    assert calls == [("a", 1), ("b", 1), ("a", 4), ("b", 4)] * 4, "one round is not counted"
    assert (first.model, second.model, first.protocol) == ("a", "b", "speed")
    assert first.metrics["prefill_b4"]["value"] == 4 * 10 / 0.5
    assert first.metrics["decode_b4"]["value"] == 4 * 20 / 2.0
    assert first.metrics["decode_b1"]["n"] == 3 and len(first.items) == 3 * 2 * 2
    assert first.settings["measured_by_turns_with"] == ["b"]


@pytest.mark.parametrize("convert", [True, False])
def test_speed_runs(convert):
    (result,) = speed.measure([language_model(convert=convert)], batch_sizes=(1, 2), prompt=8, new_tokens=4, repeats=2)
    assert set(result.metrics) == {"prefill_b1", "decode_b1", "prefill_b2", "decode_b2"}
    assert all(m["low"] <= m["value"] <= m["high"] for m in result.metrics.values())


def test_speed_must_fit_the_context():
    with pytest.raises(EvaluationError, match=r"evaluation\.speed_prompt = 100 and evaluation\.speed_new_tokens = 64"):
        speed.measure([language_model()], prompt=100)
    with pytest.raises(EvaluationError, match=r"at least 1"):
        speed.measure([language_model()], prompt=0)
