import numpy as np
import pytest
from evaluation_fixtures import gpt2_language_model, language_model, llama, naive_logprobs, text, tokenizer

from basics.errors import EvaluationError
from threefold.evaluation import LanguageModel, sentiment
from threefold.evaluation.results import Dataset, Scoring

QUICK = Scoring(batch_tokens=4096, bootstrap=300, seed=11)
ITEMS = [{"sentence": text(4 + i % 7, i), "label": i % 3 % 2} for i in range(30)]
SHOWN = [{"sentence": text(3 + i % 4, 500 + i), "label": i % 2} for i in range(40)]


def sst2(items, demonstrations=()):
    return Dataset("sst2", items, demonstrations)


class Oracle(LanguageModel):
    """A model whose preference for the positive label is set by the sentence at hand."""

    def __init__(self, prefers_positive):
        base = language_model(context=512)
        super().__init__("oracle", base.backend, base.tokenizer, "0" * 64)
        self.prefers_positive = prefers_positive
        self.prompts: list[str] = []

    def loglikelihoods(self, requests, *, batch_tokens=0, describe=str):
        spans = []
        for index, (context, _) in enumerate(requests):
            prompt = self.tokenizer.decode(context[len(self.prefix_ids) :])
            self.prompts.append(prompt)
            positive = index % 2  # the labels of an item alternate, the negative first
            good = self.prefers_positive(prompt)
            value = 0.0 if good is None else -1.0 - (positive != good)
            spans.append(np.array([value]))
        return spans


def test_labels_are_scored_after_the_whole_prompt():
    original = llama(context=256)
    model = LanguageModel.from_model(original, tokenizer(), "llama")
    result = sentiment.with_demonstrations(model, ITEMS, [SHOWN[:2]], scoring=QUICK)
    asked = "\nQuestion: Is this sentence positive or negative?\nAnswer:"
    labelled = (f"{item['sentence']}{asked} {('negative', 'positive')[item['label']]}" for item in SHOWN[:2])
    before = "".join(f"{text}\n\n" for text in labelled)
    for row, item in zip(result.items.itertuples(), ITEMS, strict=True):
        prompt = before + item["sentence"] + asked
        context = tokenizer()(prompt).input_ids
        for label, value in (("negative", row.logp_negative), ("positive", row.logp_positive)):
            target = tokenizer()(f" {label}", add_special_tokens=False).input_ids
            assert value == pytest.approx(float(naive_logprobs(original, context, target).sum()), abs=1e-3)
        assert row.prediction == int(row.logp_positive > row.logp_negative)
        assert row.correct == (row.prediction == item["label"])


def test_first_template_is_lm_evals_and_there_are_at_least_five():
    assert sentiment.TEMPLATES[0].demonstration({"sentence": "fine .", "label": 1}) == (
        "fine .\nQuestion: Is this sentence positive or negative?\nAnswer: positive"
    )
    assert len({template.name for template in sentiment.TEMPLATES}) >= 5
    assert all(template.prompt.count("{sentence}") == 1 for template in sentiment.TEMPLATES)
    braces = sentiment.TEMPLATES[0].text("a {curly} {sentence} 100%")
    assert braces.startswith("a {curly} {sentence} 100%\nQuestion")


def test_a_perfect_model_and_the_settings():
    truth = {item["sentence"]: item["label"] for item in ITEMS}
    oracle = Oracle(lambda prompt: next((label for s, label in truth.items() if s in prompt.split("\n\n")[-1]), 0))
    result = sentiment.few_shot(oracle, sst2(ITEMS, SHOWN), 3, draws=2, scoring=QUICK)
    assert result.protocol == "sst2/3-shot"
    assert result.metrics["accuracy"]["value"] == 1.0 == result.metrics["accuracy_mean"]["value"]
    assert result.metrics["template_spread"]["value"] == 0.0 == result.metrics["draw_spread"]["value"]
    labels = np.array([item["label"] for item in ITEMS])
    assert result.settings["majority_accuracy"] == pytest.approx(max(labels.mean(), 1 - labels.mean()))
    assert result.settings["majority_label"] == "negative"
    assert len(result.items) == len(ITEMS) * 5 * 2
    assert {"item", "template", "draw", "label", "prediction", "correct"} <= set(result.items.columns)


def test_a_tie_is_the_first_label_as_in_lm_eval():
    result = sentiment.zero_shot(Oracle(lambda prompt: None), sst2(ITEMS), scoring=QUICK)
    assert (result.items["prediction"] == 0).all()
    assert result.items["logp_positive"].eq(0.0).all(), "0.0 is a log-likelihood like any other"
    assert result.metrics["positive_rate"]["value"] == 0.0


def test_zero_shot_has_wilsons_interval_and_more_templates_resample_items():
    result = sentiment.zero_shot(Oracle(lambda prompt: 1), sst2(ITEMS), scoring=QUICK)
    share = np.mean([item["label"] for item in ITEMS])
    accuracy = result.metrics["accuracy"]
    assert accuracy["value"] == pytest.approx(share) and accuracy["interval"] == "Wilson" and accuracy["n"] == 30
    assert result.metrics["accuracy_mean"]["interval"] == "bootstrap over items"
    assert result.metrics["accuracy_mean"]["n"] == 30, "five templates do not make 150 independent items"
    one = sentiment.zero_shot(Oracle(lambda prompt: 1), sst2(ITEMS), templates=1, scoring=QUICK)
    assert list(one.metrics) == ["accuracy", "accuracy_calibrated", "positive_rate"]


def test_template_and_draw_spread():
    """Right under one template only: the mean is 1/2 + ..., the spread is the templates' own."""
    truth = {item["sentence"]: item["label"] for item in ITEMS}

    def answer(prompt):
        last = prompt.split("\n\n")[-1]
        label = next((label for sentence, label in truth.items() if sentence in last), 0)
        return label if "Question: Is this sentence" in last else 1 - label

    result = sentiment.zero_shot(Oracle(answer), sst2(ITEMS), scoring=QUICK)
    assert result.metrics["accuracy"]["value"] == 1.0
    assert result.metrics["accuracy_mean"]["value"] == pytest.approx(0.2)
    assert result.metrics["template_spread"]["value"] == pytest.approx(np.std([1, 0, 0, 0, 0], ddof=1))
    assert (result.metrics["template_lowest"]["value"], result.metrics["template_highest"]["value"]) == (0.0, 1.0)


def test_draws_are_seeded_balanced_and_the_same_for_all_models():
    draws = [sentiment.draw(SHOWN, 4, 7, index) for index in range(5)]
    assert draws == [sentiment.draw(SHOWN, 4, 7, index) for index in range(5)]
    assert len({str(d) for d in draws}) == 5
    assert all(sum(item["label"] for item in d) == 2 for d in draws)
    odd = [sum(item["label"] for item in sentiment.draw(SHOWN, 3, 7, index)) for index in range(20)]
    assert set(odd) == {1, 2}, "the odd demonstration is of either label"
    assert {sentiment.draw(SHOWN, 2, 7, index)[-1]["label"] for index in range(10)} == {0, 1}, "in random order"
    with pytest.raises(EvaluationError, match=r"evaluation\.sentiment_demonstrations"):
        sentiment.draw(SHOWN[:2], 4, 0, 0)


def test_the_precedents_prompt():
    oracle = Oracle(lambda prompt: 1)
    many = ITEMS * 8
    result = sentiment.precedent(oracle, sst2(many, SHOWN), scoring=QUICK)
    assert result.protocol == "sst2/precedent-3-shot"
    assert len(result.items) == 200 and result.metrics["accuracy"]["n"] == 200
    first, second, third = [SHOWN[1], SHOWN[0], SHOWN[3]]
    expected = (
        f"Review: {first['sentence']}\nSentiment: positive\n\nReview: {second['sentence']}\nSentiment: negative\n\n"
        f"Review: {third['sentence']}\nSentiment: positive\n\nReview: {ITEMS[0]['sentence']}\nSentiment:"
    )
    assert oracle.prompts[0] == expected
    low, high = result.metrics["accuracy"]["low"], result.metrics["accuracy"]["high"]
    assert high - low > 0.12, "what 200 items can tell"


def test_items_too_long_for_the_context():
    model = gpt2_language_model(context=96)
    long = {"sentence": text(200, 1), "label": 0}
    result = sentiment.zero_shot(model, sst2([*ITEMS, long]), templates=1, scoring=QUICK)
    assert result.settings["too_long"] == 1
    assert result.items.iloc[-1][["prediction", "correct"]].tolist() == [-1, False]
    shown = [{"sentence": text(40, i), "label": i % 2} for i in range(9)]
    with pytest.raises(EvaluationError, match=r"sst2/3-shot.*evaluation\.sentiment_shots or model\.context"):
        sentiment.few_shot(model, sst2(ITEMS, shown), 3, scoring=QUICK)


def test_a_random_model_is_at_chance():
    """Over many items an untrained model says nothing about the label: its interval holds one half."""
    items = [{"sentence": text(6, 2000 + i), "label": i % 2} for i in range(300)]
    result = sentiment.zero_shot(gpt2_language_model(seed=3), sst2(items), templates=1, scoring=QUICK)
    assert result.metrics["accuracy"]["low"] < 0.5 < result.metrics["accuracy"]["high"]


def test_no_items_is_an_error():
    with pytest.raises(EvaluationError, match="no items"):
        sentiment.zero_shot(language_model(), sst2([]))


# Calibration ---------------------------------------------------------------------------------------------------------


class Biased(LanguageModel):
    """log p(positive) - log p(negative) is a bias, plus or minus one where there is content, by the sentence."""

    def __init__(self, bias):
        base = language_model(context=512)
        super().__init__("biased", base.backend, base.tokenizer, "0" * 64)
        self.bias = bias

    def loglikelihoods(self, requests, *, batch_tokens=0, describe=str):
        truth = {f"{item['sentence']}\n": item["label"] for item in ITEMS}
        spans = []
        for index, (context, _) in enumerate(requests):
            prompt = self.tokenizer.decode(context[len(self.prefix_ids) :])
            margin = self.bias + next((2 * label - 1 for s, label in truth.items() if s in prompt), 0)
            spans.append(np.array([-5.0 + (margin if index % 2 else 0.0)]))
        return spans


def test_calibration_takes_a_constant_bias_away():
    """Closed form: a bias of 3 nats hides a signal of 1; divided by what no content gives, every answer is right."""
    result = sentiment.zero_shot(Biased(3.0), sst2(ITEMS), templates=1, scoring=QUICK)
    share = np.mean([item["label"] for item in ITEMS])
    assert result.metrics["accuracy"]["value"] == pytest.approx(share) and result.metrics["positive_rate"]["value"] == 1
    assert result.metrics["accuracy_calibrated"]["value"] == 1.0
    assert result.metrics["accuracy_calibrated"]["interval"] == "Wilson"
    assert result.items["correct_calibrated"].all() and not result.items["correct"].all()
    assert result.settings["calibration"] == ["N/A", "[MASK]", ""]


def test_calibration_averages_probabilities_over_the_content_free_inputs():
    free = np.log([[0.1, 0.3], [0.2, 0.1], [0.3, 0.2]])
    assert sentiment.content_free_logprobs(free) == pytest.approx(np.log([0.2, 0.2]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_likelihood_that_is_no_number_names_the_item(value):
    original = llama(context=256)
    bad = tokenizer()("日", add_special_tokens=False).input_ids[-1]
    original.model.embed_tokens.weight.data[bad] = value
    model = LanguageModel.from_model(original, tokenizer(), "broken", convert=False)
    items = [*ITEMS[:6], {"sentence": "日", "label": 1}]
    with pytest.raises(EvaluationError, match=r"sst2/0-shot: item 6, template lm-eval, label 'negative'"):
        sentiment.zero_shot(model, sst2(items), scoring=QUICK)


def test_the_grid_asks_the_first_items_under_every_template_and_draw_that_few_shot_uses():
    model = Oracle(lambda prompt: len(prompt) % 2)
    grid = sentiment.grid(model, sst2(ITEMS, SHOWN), 2, first=6, scoring=QUICK)
    assert grid.protocol == "sst2/2-shot-grid"
    cells = grid.items.groupby(["template", "draw", "item"]).size()
    assert len(cells) == len(sentiment.TEMPLATES) * 5 * 6 and (cells == 1).all()
    whole = sentiment.few_shot(Oracle(lambda prompt: len(prompt) % 2), sst2(ITEMS, SHOWN), 2, scoring=QUICK)
    same = whole.items[whole.items["item"] < 6].reset_index(drop=True)
    assert grid.items.equals(same)
