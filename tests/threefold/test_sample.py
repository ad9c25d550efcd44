"""The embedded sample is what its generator makes, keeps its parts apart, and is what the smoke preset needs."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest

from basics import paths
from study.preset import load_preset
from threefold.config import SourceConfig
from threefold.data import corpus, sources
from threefold.data.tokenizer import build_tokenizer

SAMPLE = paths.DATA / "sample"
SPLITS = {
    "sample-text": ("train", "validation", "test"),
    "sample-stories": ("train",),
    "sample-sentiment": ("train", "validation"),
    "sample-instructions": ("train", "test"),
    "sample-preferences": ("train", "test"),
    "sample-problems": ("train", "test"),
    "sample-pairs": ("test",),
}


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("sample_generator", SAMPLE / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def items():
    return {
        (source, split): list(sources.iterate(SourceConfig(source=source, split=split)))
        for source, splits in SPLITS.items()
        for split in splits
    }


@pytest.fixture(scope="module")
def pretraining_text():
    return list(corpus.mixture_texts(load_preset("smoke").data.pretrain))


@pytest.fixture(scope="module")
def tokenizer(pretraining_text):
    preset = load_preset("smoke")
    return build_tokenizer(preset.tokenizer, pretraining_text, preset.model.sinks, context=preset.model.context)


def numbers(question):
    return tuple(sorted(map(int, re.findall(r"\d+", question))))


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_are_what_the_generator_makes(generator):
    assert generator.differing(SAMPLE) == []


def test_no_other_files_and_at_most_two_megabytes(generator):
    made = set(generator.build())
    present = {path.name for path in SAMPLE.iterdir() if path.is_file()}
    assert present == made | {"generate.py", "README.md"}
    assert sum((SAMPLE / name).stat().st_size for name in made) <= 2_000_000


def test_generator_needs_the_standard_library_only_and_check_finds_a_change(tmp_path):
    copy = tmp_path / "generate.py"
    copy.write_bytes((SAMPLE / "generate.py").read_bytes())
    run = [sys.executable, "-I", "-S", str(copy)]  # -S: no site-packages
    assert subprocess.run(run, check=False).returncode == 0
    assert subprocess.run([*run, "--check"], check=False).returncode == 0
    (tmp_path / "wiki.valid.txt").write_text("changed", encoding="utf-8")
    checked = subprocess.run([*run, "--check"], check=False, capture_output=True, text=True)
    assert checked.returncode == 1
    assert checked.stdout.startswith("wiki.valid.txt:")


def test_sizes_that_evaluations_rest_on(items):
    assert 20 <= len(items["sample-text", "test"]) <= 40
    assert 200 <= len(items["sample-sentiment", "validation"]) <= 300
    assert 100 <= len(items["sample-instructions", "test"]) <= 150
    assert len(items["sample-preferences", "test"]) == 150
    assert 100 <= len(items["sample-problems", "test"]) <= 150


# Nothing is held out and trained on -----------------------------------------------------------------------------------

IDENTITY = {
    "sample-text": lambda article: re.search(r"^ = (.+) = $", article, re.MULTILINE)[1],
    "sample-sentiment": lambda item: item["sentence"],
    "sample-instructions": lambda item: (item["instruction"], item["input"]),
    "sample-preferences": lambda item: (item["prompt"], item["chosen"], item["rejected"]),
    "sample-problems": lambda item: item["question"],
}


@pytest.mark.parametrize("source", IDENTITY)
def test_splits_share_no_item_and_repeat_none(items, source):
    splits = [[IDENTITY[source](item) for item in items[source, split]] for split in SPLITS[source]]
    for one, other in combinations(splits, 2):
        assert not set(one) & set(other)
    assert all(len(set(split)) == len(split) for split in splits)


def test_minimal_pairs_differ_in_one_word_and_are_about_people_of_no_training_text(items, pretraining_text):
    pairs = items["sample-pairs", "test"]
    assert Counter(pair["phenomenon"] for pair in pairs) == dict.fromkeys(
        ("possessive", "product", "number", "article"), 25
    )
    whole = "\n".join(pretraining_text)
    for pair in pairs:
        good, bad = pair["good"].split(), pair["bad"].split()
        assert len(good) == len(bad) and sum(one != other for one, other in zip(good, bad, strict=True)) == 1
        if pair["phenomenon"] in ("possessive", "product"):
            assert " ".join(good[:2]) not in whole


def test_held_out_operand_pairs_stand_in_nothing_that_is_trained_on(items, pretraining_text):
    held_out = {numbers(item["question"]) for item in items["sample-problems", "test"]}
    assert len(held_out) == len(items["sample-problems", "test"])
    assert all(len(pair) == 2 for pair in held_out)
    assert not held_out & {numbers(item["question"]) for item in items["sample-problems", "train"]}
    written = {tuple(sorted(map(int, p))) for p in re.findall(r"(\d\d)[+-](\d\d)", "\n".join(pretraining_text))}
    assert written  # the ledgers set problems down, but
    assert not held_out & written


def test_list_instructions_share_no_list_and_fact_instructions_no_fact(items):
    parts = {split: items["sample-instructions", split] for split in ("train", "test")}
    lists = {split: {item["input"] for item in part if item["input"]} for split, part in parts.items()}
    facts = {split: {item["output"] for item in part if not item["input"]} for split, part in parts.items()}
    assert all(lists.values()) and all(facts.values())
    assert not lists["train"] & lists["test"]
    assert not facts["train"] & facts["test"]


def test_held_out_lists_stand_in_nothing_that_is_trained_on(items, pretraining_text):
    def three(text):
        return frozenset(text.removeprefix("Words: ").split())

    lists = {
        split: {three(item["input"]) for item in items["sample-instructions", split] if item["input"]}
        for split in ("train", "test")
    }
    called = {three(words) for text in pretraining_text for words in re.findall(r"called: ([^.]+)\.", text)}
    assert called
    assert not lists["test"] & (lists["train"] | called)


def test_pretraining_text_holds_no_instruction_problem_or_dialogue(items, pretraining_text):
    text = "\n".join(pretraining_text)
    for mark in ("### Instruction:", "### Response:", "####", "Human:", "Assistant:"):
        assert mark not in text
    assert "### Instruction:\n" not in text
    for item in items["sample-problems", "test"]:
        assert item["answer"].split("\n")[0] not in text
        assert item["question"] not in text


def test_held_out_facts_are_in_the_pretraining_text(items, pretraining_text):
    text = "\n".join(pretraining_text)
    facts = [item["output"] for item in items["sample-instructions", "test"] if not item["input"]]
    assert min(text.count(fact) for fact in facts) >= 5


# Right and balanced ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS["sample-sentiment"])
def test_labels_are_balanced(items, split):
    labels = Counter(item["label"] for item in items["sample-sentiment", split])
    assert labels[0] == labels[1]


def test_no_sentence_is_both_positive_and_negative(items):
    labels = {}
    for split in SPLITS["sample-sentiment"]:
        for item in items["sample-sentiment", split]:
            labels.setdefault(item["sentence"], set()).add(item["label"])
    assert all(len(found) == 1 for found in labels.values())


@pytest.mark.parametrize("split", SPLITS["sample-problems"])
def test_every_step_of_every_problem_is_right(items, split):
    signs = Counter()
    for item in items["sample-problems", split]:
        work, _, result = item["answer"].partition("\n#### ")
        x, sign, y, units, tens = re.fullmatch(r"(\d\d)([+-])(\d\d): (\S+), (\S+)\.", work).groups()
        verb = {"+": "brings", "-": "takes"}[sign]
        assert re.search(rf"There are {x} (\w+) and \w+ {verb} {y}\. How many \1\?$", item["question"])
        assert int(result) == (int(x) + int(y) if sign == "+" else int(x) - int(y))
        for column, place in ((units, 1), (tens, 0)):
            assert column == f"{x[place]}{sign}{y[place]}={result[place]}"
        signs[sign] += 1
    assert min(signs.values()) > 0.25 * sum(signs.values())


@pytest.mark.parametrize("split", SPLITS["sample-instructions"])
def test_every_instruction_has_its_one_right_answer(generator, items, split):
    facts = {fact.subject: fact.statement for fact in generator.FACTS}
    assert len(facts) == len(generator.FACTS)  # one answer to a question
    kinds = Counter()
    for item in items["sample-instructions", split]:
        if item["input"]:
            words = item["input"].removeprefix("Words: ").split()
            kind, end = next(
                (kind, end) for kind, (asked, end) in generator.LIST_TASKS.items() if item["instruction"] in asked
            )
            assert len(set(words)) == 3
            assert item["output"] == f"{item['input']}. {end.format(*words)}"
        else:
            subject = re.fullmatch(r"(?:What is|Name|Tell me|Do you know|I ask for) the (.+)[.?]", item["instruction"])[
                1
            ]
            kind = "fact"
            assert item["output"] == facts[subject]
        kinds[kind] += 1
    assert set(kinds) == {*generator.LIST_TASKS, "fact"}


@pytest.mark.parametrize("split", SPLITS["sample-preferences"])
def test_preference_pairs_differ_in_the_reply_alone(items, split):
    topic = 0
    for item in items["sample-preferences", split]:
        assert item["prompt"].startswith("\n\nHuman: ")
        assert item["prompt"].endswith("\n\nAssistant:")
        assert item["chosen"] != item["rejected"]
        # Neither side is told by its length: likelihood alone would choose the shorter one.
        assert abs(len(item["chosen"].split()) - len(item["rejected"].split())) <= 4
        topic += item["chosen"].split(".")[0] == item["rejected"].split(".")[0] and len(item["chosen"].split(". ")) > 1
    assert topic > 0


def test_a_person_is_the_same_in_every_part(generator, pretraining_text):
    text = "\n".join(pretraining_text)
    for person in generator.PEOPLE:
        for pattern, fact in (
            (rf"The trade of {person.name} is (\w+)", person.trade.name),
            (rf"\b{person.name} lives in (\w+ \w+)", person.street),
            (rf"The animal of {person.name} is an? (\w+)", person.animal),
        ):
            assert set(re.findall(pattern, text)) <= {fact}


# What the smoke preset needs ------------------------------------------------------------------------------------------


def test_smoke_reads_every_part_and_its_tokenizer_splits_digits(tokenizer):
    preset = load_preset("smoke")
    named = {part.source for parts in (preset.data.pretrain, preset.data.sft, preset.data.dpo) for part in parts}
    assert named | {preset.evaluation.blimp.source} == set(SPLITS)
    assert len(tokenizer) == preset.tokenizer.vocab_size
    assert [token for token in tokenizer.tokenize("There are 47") if token.isdigit()] == ["4", "7"]


def test_smoke_drops_no_example(tokenizer):
    preset = load_preset("smoke")

    def length(text):
        return len(tokenizer(text)["input_ids"]) + 1

    for name in ("instructions", "problems"):
        for part in preset.data.sft:
            if part.source == f"sample-{name}":
                assert max(length(prompt + answer) for prompt, answer in corpus.examples(part)) <= preset.model.context
    for item in sources.iterate(preset.data.dpo[0]):
        assert max(length(item["prompt"] + item[side]) for side in ("chosen", "rejected")) <= preset.model.context


def test_answers_fit_the_new_tokens_of_smoke(tokenizer):
    preset = load_preset("smoke")
    evaluation = preset.evaluation
    for part, limit in (
        (evaluation.problems, evaluation.problem_new_tokens),
        (evaluation.instructions, evaluation.instruction_new_tokens),
    ):
        for prompt, answer in corpus.examples(part):
            prompt_tokens, answer_tokens = (len(tokenizer(text)["input_ids"]) for text in (prompt, answer))
            assert answer_tokens < limit  # its BOS stands for the EOS that is generated
            assert prompt_tokens + limit <= preset.model.context


def test_files_are_plain_json_and_tsv():
    for path in SAMPLE.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert all(isinstance(value, str) for value in json.loads(line).values())
    for path in SAMPLE.glob("*.tsv"):
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        assert header == "sentence\tlabel"
        assert all(re.fullmatch(r"[^\t]+\t[01]", line) for line in lines)
