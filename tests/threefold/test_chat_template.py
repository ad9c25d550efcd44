"""The chat template of a checkpoint: plain transformers gives the token ids that the stage was trained on."""

import pytest
from evaluation_fixtures import model_config, tokenizer
from jinja2 import TemplateError
from transformers import AutoTokenizer

from threefold.data.templates import FORMS, as_prompt_response
from threefold.data.tokenizer import load_tokenizer, set_chat_template, sink_ids, tokenizer_hash, with_sinks
from threefold.model import Decoder, export, save_checkpoint

MESSAGES = ["the baker", "  café “quoted”\n\nfound {{ a }} ladder? ", "", "12 + 3.5\n\n### Input:\na river"]


def saved(folder, form: str, sinks: int = 1):
    """The tokenizer of a checkpoint as plain transformers loads it."""
    tok = with_sinks(tokenizer(max(sinks, 1)), sinks)
    set_chat_template(tok, form)
    save_checkpoint(folder, Decoder(model_config(sinks=sinks)), tok)
    return AutoTokenizer.from_pretrained(folder)


def ids_of(tok, messages, **options) -> list[int]:
    return tok.apply_chat_template(messages, return_dict=False, **options)


def ours(tok, *parts: str) -> list[int]:
    """Sinks, then the ids of each part by itself, as rows are made for training."""
    return [*sink_ids(tok), *(id for part in parts for id in tok(part, add_special_tokens=False).input_ids)]


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_has_the_ids_of_training(tmp_path, form, sinks):
    plain = saved(tmp_path, form, sinks)
    own = load_tokenizer(tmp_path)
    for message in MESSAGES:
        got = ids_of(plain, [{"role": "user", "content": message}], add_generation_prompt=True)
        assert got == ours(own, FORMS[form].prompt(message)), message
    assert tokenizer_hash(own) == tokenizer_hash(tokenizer(max(sinks, 1))), "the ids of text stay as they are"


@pytest.mark.parametrize(
    ("form", "reader", "item"),
    [
        ("instruction", "instructions", {"instruction": "the baker?", "input": "", "output": "a ladder"}),
        ("instruction", "instructions", {"instruction": "the baker?", "input": "", "output": "sang.\n\nover"}),
        ("question", "problems", {"question": "12 and 3.5?", "answer": "12 + 3.5 = 15.5\n#### 15.5"}),
    ],
)
def test_a_prompt_with_its_response_is_a_training_example(tmp_path, form, reader, item):
    plain = saved(tmp_path, form)
    asked, answered = item.get("instruction") or item["question"], item.get("output") or item["answer"]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    prompt, response = as_prompt_response(reader, item)
    assert ids_of(plain, messages) == [*ours(plain, prompt, response), plain.eos_token_id]


def test_a_dialogue_goes_on(tmp_path):
    plain = saved(tmp_path, "dialogue")
    words = ["the baker?", "a ladder", "over the river", "it was good"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    dialogue = "\n\nHuman: the baker?\n\nAssistant: a ladder\n\nHuman: over the river\n\nAssistant:"
    assert ids_of(plain, messages[:3], add_generation_prompt=True) == ours(plain, dialogue)
    assert ids_of(plain, messages) == [*ours(plain, dialogue, " it was good"), plain.eos_token_id]


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (["system", "user"], "user and assistant in turn"),
        (["user", "user"], "user and assistant in turn"),
        (["assistant"], "the user's first"),
        (["user", "assistant", "user"], "trained to answer one message, in the form of a question"),
    ],
)
def test_what_the_model_was_not_trained_for_is_refused(tmp_path, roles, said):
    plain = saved(tmp_path, "question")
    with pytest.raises(TemplateError, match=said):
        ids_of(plain, [{"role": role, "content": "a"} for role in roles])


def test_an_export_keeps_the_template(tmp_path):
    plain = saved(tmp_path / "run", "instruction")
    export(tmp_path / "run", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == plain.chat_template
