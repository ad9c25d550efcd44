"""How an item of each reader becomes text: prompts, responses and documents. One wording for training and evaluation.

Readers and their items:

| reader | item |
|---|---|
| text, wikitext, wikitext-raw, stories, reviews, reviews-reworded | str |
| instructions | {"instruction", "input", "output"} |
| problems | {"question", "answer"} |
| sentiment | {"sentence", "label"}: 0 negative, 1 positive |
| minimal-pairs | {"good", "bad", "phenomenon", "group"}: an acceptable sentence and one that is not |
| preferences | {"prompt", "chosen", "rejected"}: prompt + chosen and prompt + rejected are the dialogues verbatim |
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from basics.errors import DataError
from threefold.data.wikitext import natural_text, without_holes

LABELS = ("negative", "positive")  # of SST-2's 0 and 1
EXAMPLE_READERS = ("instructions", "problems", "sentiment", "preferences")


def instruction_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's headings without its preamble; the input part only where there is one. The response follows at once."""
    middle = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def problem_prompt(question: str) -> str:
    """lm-eval's gsm8k prompt; the answer follows as ` {answer}`."""
    return f"Question: {question}\nAnswer:"


def review_prompt(sentence: str) -> str:
    """lm-eval's sst2 prompt; the label follows as ` positive` or ` negative`."""
    return f"{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:"


# Labelled reviews as text, by reader: as demonstrations of sst2, or in a wording that no evaluation prompt has.
REVIEWS: dict[str, Callable[[str], str]] = {
    "reviews": review_prompt,
    "reviews-reworded": lambda sentence: f"{sentence}\nVerdict:",
}
TEXT_READERS = ("text", "wikitext", "wikitext-raw", "stories", *REVIEWS)


def dialogue_prompt(message: str, turns: Sequence[tuple[str, str]] = ()) -> str:
    """HH-RLHF's form. turns: what was said before, as (message, answer). The answer follows as ` {answer}`."""
    before = "".join(f"\n\nHuman: {asked}\n\nAssistant: {said}" for asked, said in turns)
    return f"{before}\n\nHuman: {message}\n\nAssistant:"


@dataclass(frozen=True)
class Form:
    """A way to ask a model. stops: texts that begin something new, at which an answer ends if EOS does not end it.
    turns: whether `prompt` also takes the turns before."""

    prompt: Callable[..., str]
    stops: tuple[str, ...] = ()
    turns: bool = False


FORMS = {
    "dialogue": Form(dialogue_prompt, ("\n\nHuman:",), turns=True),
    # "Give the last word. ### Words: pie hen net": the text after ### is the input
    "instruction": Form(lambda message: instruction_prompt(*message.split(" ### ", 1)), ("\n###",)),
    "question": Form(problem_prompt, ("Question:",)),
    "text": Form(lambda message: message),
}
FORM_OF_READER = {"preferences": "dialogue", "instructions": "instruction", "problems": "question"}  # others: text


_CHAT_TEMPLATE = """\
{{- PREFIX -}}
{%- if messages | length > MOST -%}
  {{- raise_exception("this model was trained to answer one message, in the form of a FORM") -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message["role"] != ("assistant" if loop.index0 % 2 else "user") -%}
    {{- raise_exception("expected messages of user and assistant in turn, the user's first") -}}
  {%- elif message["role"] == "user" -%}
    {{- BEFORE + message["content"] + AFTER -}}
  {%- else -%}
    {{- SPACE + message["content"] + (eos_token if loop.last else "") -}}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(form: str, prefix: str = "") -> str:
    """One of FORMS as a chat template of transformers (Jinja); `apply_chat_template` then gives the text of training.

    Only a dialogue has several turns. The last message may be an answer, which EOS ends.

    prefix: the text of the tokens that the tokenizer puts before every sequence, which a chat template has to include.
    """
    before, after = FORMS[form].prompt("\0").split("\0")
    values = {
        "PREFIX": json.dumps(prefix),
        "MOST": "999999" if FORMS[form].turns else "2",
        "FORM": form,
        "BEFORE": json.dumps(before),
        "AFTER": json.dumps(after),
        "SPACE": json.dumps("" if after.endswith("\n") else " "),
    }
    template = _CHAT_TEMPLATE
    for name, value in values.items():
        template = template.replace(name, value)
    return template


def as_prompt_response(reader: str, item: Mapping) -> tuple[str, str]:
    """(prompt, response) of an item, to train on or to score; prompt + response is its whole text.

    Of a preference it is the chosen side. Raises DataError for a reader whose items are plain text.
    """
    if reader == "instructions":
        return instruction_prompt(item["instruction"], item["input"]), item["output"]
    if reader == "problems":
        return problem_prompt(item["question"]), f" {item['answer']}"
    if reader == "sentiment":
        return review_prompt(item["sentence"]), f" {LABELS[item['label']]}"
    if reader == "preferences":
        return item["prompt"], item["chosen"]
    raise DataError(
        f"reader {reader!r} gives text, not prompts and responses; allowed here: {', '.join(EXAMPLE_READERS)}"
    )


def as_document(reader: str, item: str | Mapping) -> str:
    """The whole text of an item of any reader, to pretrain on; "" if nothing is left of it.

    WikiText becomes natural text under the reader `wikitext` and keeps its spacing under `wikitext-raw`; both lose the
    sentences with `<unk>`.
    """
    if reader == "wikitext":
        return natural_text(item)
    if reader == "wikitext-raw":
        return without_holes(item)
    if reader in TEXT_READERS:
        return item
    if reader == "minimal-pairs":
        return item["good"]
    return "".join(as_prompt_response(reader, item))
