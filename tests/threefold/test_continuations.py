"""Sample continuations: the prompts come from the text and the seed alone, and decoding is what `generate` does."""

from dataclasses import replace

import pytest
from evaluation_fixtures import language_model

from threefold.config import SourceConfig
from threefold.evaluation.continuations import PROMPTS, TOKENS, WORDS, sample_continuations

TEXT = SourceConfig(source="sample-text", split="test")


@pytest.fixture(scope="module")
def model():
    return language_model(context=256)


def test_prompts_are_first_words_of_lines_chosen_by_the_seed(model):
    from threefold.data import sources

    shown = sample_continuations(model, TEXT, seed=3)
    lines = [line for text in sources.load(TEXT) for line in text.split("\n")]
    assert len(set(shown["prompts"])) == PROMPTS and all(len(prompt.split()) == WORDS for prompt in shown["prompts"])
    assert all(any(" ".join(line.split()).startswith(prompt) for line in lines) for prompt in shown["prompts"])
    assert shown["texts"] == [text for text, _ in model.generate(shown["prompts"], TOKENS)]
    assert shown == sample_continuations(model, TEXT, seed=3) and all(isinstance(text, str) for text in shown["texts"])
    assert shown["prompts"] != sample_continuations(model, TEXT, seed=4)["prompts"]
    assert (shown["source"], shown["weights_sha256"]) == ("sample-text", model.weights_sha256)


def test_a_short_context_gets_shorter_prompts(model):
    whole, short = (sample_continuations(one, TEXT) for one in (model, language_model(context=24)))
    assert short["new_tokens"] == 12 and all(
        a.startswith(b) for a, b in zip(whole["prompts"], short["prompts"], strict=True)
    )
    assert short["prompts"] != whole["prompts"]


def test_a_text_without_long_lines_gives_none(model, tmp_path):
    (tmp_path / "short.txt").write_text(
        "a few words\n\n= A heading of very many words that goes on and on " + "x " * 30
    )
    shown = sample_continuations(
        model, replace(TEXT, source="", path=str(tmp_path / "short.txt"), reader="text", split="train")
    )
    assert shown["prompts"] == [] == shown["texts"]
