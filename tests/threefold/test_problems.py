import pytest
from evaluation_fixtures import gpt2_language_model, language_model, text

from basics.errors import EvaluationError
from threefold.data.templates import problem_prompt
from threefold.evaluation import LanguageModel, problems
from threefold.evaluation.results import Dataset, Scoring

QUICK = Scoring(batch_tokens=4096, bootstrap=200, seed=5)
ITEMS = [{"question": f"{text(5, i)} {i} ?", "answer": f"{i} + 1 = {i + 1}.\n#### {i + 1}"} for i in range(20)]


def gsm8k(items, demonstrations=()):
    return Dataset("gsm8k", items, demonstrations)


class Writer(LanguageModel):
    """A model whose generations are given, by the prompt's last question."""

    def __init__(self, answer, context=512):
        base = language_model(context=context)
        super().__init__("writer", base.backend, base.tokenizer, "0" * 64)
        self.answer = answer
        self.prompts: list[str] = []

    def generate(self, prompts, max_new_tokens, stop=(), *, batch_tokens=0):
        self.prompts += prompts
        return [(out, min(len(out), max_new_tokens)) for out in map(self.answer, prompts)]


@pytest.mark.parametrize(
    ("generation", "strict", "flexible"),
    [
        ("so she has $1,234.50.\n#### 1,234.50", "1,234.50", "1,234.50"),
        ("It is $1,234.50.", problems.INVALID, "$1,234.50."),
        ("loss of -3", problems.INVALID, "-3"),
        ("#### -3\n", "-3", "-3"),
        ("#### 1\nno, #### 2\n#### 3", "1", "3"),
        ("####5", problems.INVALID, "5"),
        ("#### $5", problems.INVALID, "$5"),
        ("five", problems.INVALID, problems.INVALID),
        ("", problems.INVALID, problems.INVALID),
        ("#### 42. Then 7 more", "42.", "7"),
        ("...", problems.INVALID, "..."),
    ],
)
def test_extraction(generation, strict, flexible):
    assert problems.extract_strict(generation) == strict
    assert problems.extract_flexible(generation) == flexible


@pytest.mark.parametrize(
    ("extracted", "answer", "same"),
    [
        ("1,234.50", "work\n#### 1234.50", True),
        ("$1,234.", "work\n#### 1,234", True),
        ("-3", "#### -3", True),
        ("3.0", "#### 3", False),
        (problems.INVALID, "#### 3", False),
        ("18..", "#### 18", False),
        ("18", "The answer is 18", True),
        ("18", r"so \boxed{18}", True),
        ("18", "####18", True),
        ("18", "18.0", True),
        ("17", "The answer is 18", False),
    ],
)
def test_normalisation(extracted, answer, same):
    assert problems.matches(extracted, answer) is same


def test_rates():
    def answer(prompt):
        number = int(prompt.split()[-3])  # "... {number} ?\nAnswer:"
        if number < 5:
            return f" {number} + 1 = {number + 1}.\n#### {number + 1}"
        if number < 12:
            return f" {number + 1}"  # right, but not in the form asked for
        return "" if number < 15 else f" wrong #### {number}"

    result = problems.problems(Writer(answer), gsm8k(ITEMS), 0, 64, scoring=QUICK)
    assert result.protocol == "gsm8k/0-shot"
    assert result.metrics["exact_match"]["value"] == 5 / 20
    assert result.metrics["flexible_match"]["value"] == 12 / 20
    assert result.metrics["invalid"]["value"] == 10 / 20
    assert result.metrics["exact_match"]["n"] == 20, "an empty generation is wrong, not missing"
    assert result.items["generation"].iloc[12] == "" and not result.items["correct"].iloc[12]


def test_nothing_right_is_zero():
    result = problems.problems(Writer(lambda prompt: ""), gsm8k(ITEMS), 0, 8, scoring=QUICK)
    assert result.metrics["exact_match"]["value"] == 0.0 == result.metrics["exact_match"]["low"]
    assert result.metrics["invalid"]["value"] == 1.0
    assert result.metrics["exact_match"]["high"] > 0.1


def test_demonstrations_are_drawn_once_and_shown_with_their_solutions():
    writer = Writer(lambda prompt: "")
    shown = [{"question": f"demo {i}", "answer": f"because\n#### {i}"} for i in range(30)]
    problems.problems(writer, gsm8k(ITEMS, shown), 3, 16, scoring=QUICK)
    drawn = problems.draw(shown, 3, QUICK.seed)
    before = "".join(f"Question: {d['question']}\nAnswer: {d['answer']}\n\n" for d in drawn)
    assert writer.prompts == [before + problem_prompt(item["question"]) for item in ITEMS]
    assert problems.draw(shown, 3, 6) != drawn
    with pytest.raises(EvaluationError, match=r"evaluation\.problem_shots = 31"):
        problems.draw(shown, 31, 0)


def test_a_real_generation_runs_through():
    result = problems.problems(gpt2_language_model(context=256), gsm8k(ITEMS, ITEMS), 2, 12, scoring=QUICK)
    assert len(result.items) == 20 and (result.items["tokens"] <= 12).all()
    assert result.metrics["unfinished"]["value"] == (result.items["tokens"] == 12).mean()


def test_a_prompt_without_room_names_the_preset_keys():
    with pytest.raises(EvaluationError, match=r"20 of 20 items .*problem_shots, evaluation\.problem_new_tokens or mod"):
        problems.problems(language_model(context=64), gsm8k(ITEMS, ITEMS), 2, 60, scoring=QUICK)


def test_single_long_items_count_as_wrong():
    long = {"question": text(300, 1), "answer": "#### 1"}
    result = problems.problems(Writer(lambda prompt: "#### 1", context=96), gsm8k([*ITEMS, long]), 0, 8, scoring=QUICK)
    assert result.settings["too_long"] == 1 and not result.items["correct"].iloc[-1]
    assert result.metrics["exact_match"] == {**result.metrics["exact_match"], "value": 1 / 21, "n": 21}


# Instructions --------------------------------------------------------------------------------------------------------

TASKS = [
    {"instruction": text(4, i), "input": "" if i % 2 else text(2, i), "output": text(3, 90 + i)} for i in range(12)
]


def test_response_loss_is_over_responses_and_eos():
    model = gpt2_language_model(context=256)
    result = problems.instructions(model, Dataset("alpaca", TASKS), generations=0, scoring=QUICK)
    assert result.protocol == "alpaca/responses"
    nats = tokens = 0
    for item in TASKS:
        middle = f"### Input:\n{item['input']}\n\n" if item["input"] else ""
        prompt = model.encode([f"### Instruction:\n{item['instruction']}\n\n{middle}### Response:\n"])[0]
        response = [*model.encode([item["output"]])[0], model.tokenizer.eos_token_id]
        (span,) = model.loglikelihoods([(prompt, response)])
        nats, tokens = nats - span.sum(), tokens + len(response)
    assert result.metrics["response_loss"]["value"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result.settings["response_tokens"] == tokens and "exact_match" not in result.metrics


def test_exact_match_of_answers():
    given = {item["instruction"]: item["output"] for item in TASKS[:6]}

    def answer(prompt):
        return f" {given.get(prompt.split(chr(10))[1], '')} \n"

    result = problems.instructions(Writer(answer), Dataset("alpaca", TASKS), generations=8, scoring=QUICK)
    assert result.metrics["exact_match"]["value"] == 6 / 8 and result.metrics["exact_match"]["n"] == 8
    assert result.items["correct"].isna().sum() == 4, "what was not generated is missing, not wrong"
    empty = [{**item, "output": ""} for item in TASKS]
    assert (
        problems.instructions(Writer(lambda p: ""), Dataset("alpaca", empty), scoring=QUICK).metrics["exact_match"][
            "value"
        ]
        == 0.0
    )


def test_examples_that_do_not_fit_are_left_out_and_counted():
    items = [*TASKS, {"instruction": text(200, 3), "input": "", "output": "a"}]
    result = problems.instructions(
        language_model(), Dataset("alpaca", items), generations=13, new_tokens=4, scoring=QUICK
    )
    assert result.settings["left_out_too_long"] == 1 == result.settings["generations_too_long"]
    assert result.metrics["response_loss"]["n"] == 12 == result.metrics["unfinished"]["n"]
    assert result.metrics["exact_match"]["n"] == 13
    with pytest.raises(EvaluationError, match=r"no example fits.*model\.context"):
        problems.instructions(language_model(context=16), Dataset("alpaca", TASKS), scoring=QUICK)
