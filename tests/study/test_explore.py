"""The views of a run: their numbers against plain computation, what is missing is said, text of others stays text."""

import html.parser
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from explore_fixtures import made_runs
from hypothesis import given
from hypothesis import strategies as st
from shared import flip

from basics import files
from basics.errors import ConfigError, MissingInput
from papertrail.stage import hold, release
from study.explore import Show, controls, display, open_run, read, results, view
from threefold.config import SourceConfig
from threefold.data import sources
from threefold.evaluation import attention as looking
from threefold.model import generate, to_transformers

SENTIMENT, PREFERENCES = "sample-sentiment/0-shot", "sample-preferences/preferences"
HOSTILE = '<script>alert(1)</script> {{< include x >}} $5 and $6 \\(x\\) <|bos|> & "quoted"'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with made_runs(tmp_path_factory.mktemp("explore")):
        yield open_run("little")


class Parsed(html.parser.HTMLParser):
    """A page as a browser sees it: its elements and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def seen(shown) -> Parsed:
    return Parsed(shown._repr_mimebundle_()["text/html"])


# Text of others -----------------------------------------------------------------------------------------------------


@given(st.text())
def test_any_text_is_shown_as_itself(text):
    shown = Parsed(display.escape(text))
    assert set(shown.tags) <= {"span"}
    assert shown.text == "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    # no two marks of TeX stand in one run of text, which is where MathJax looks for them
    assert not re.search(r"[$\\][^<]+[$\\]|\$\$|\\[(\[]", display.escape(text))
    tip = Parsed(f'<i title="{display.attribute(text)}"></i>')
    assert tip.tags == ["i"]
    assert tip.attributes == [("title", "".join(char if char.isprintable() else " " for char in text))]


def test_a_hostile_prompt_stays_text_in_page_and_tips(run):
    shown = seen(view.continuations(run, ["sft"], HOSTILE, new_tokens=4))
    assert "script" not in shown.tags and "img" not in shown.tags
    assert "<script>alert(1)</script>" in shown.text
    assert "<|bos|>" in shown.text  # read as text, not as the sink
    picture = seen(view.attention(run, "sft", HOSTILE))
    assert picture.tags.count("img") == 1 and "script" not in picture.tags


# Continuations ------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_transformers(run):
    model, tokenizer = read.checkpoint(run, "sft")
    ids = tokenizer("the baker sang")["input_ids"]
    with torch.no_grad():
        theirs = to_transformers(model)(torch.tensor([ids])).logits[0].double().softmax(dim=-1)
    torch.testing.assert_close(view.next_logprobs(model, ids).exp().double(), theirs, atol=1e-5, rtol=1e-4)


def test_a_continuation_is_that_of_generate_and_its_tips_hold_its_probabilities(run):
    model, tokenizer = read.checkpoint(run, "pretrain")
    ids = tokenizer("the baker")["input_ids"]
    (new,) = generate(model, [ids], 6, eos_id=tokenizer.eos_token_id)
    assert len(new) == 6, "the example should not end by itself"
    shown = view.continuations(run, "pretrain", "the baker", new_tokens=6, at=3)
    assert repr(tokenizer.decode(new)) in shown.text
    tips = [value for name, value in seen(shown).attributes if name == "title"]
    assert len(tips) == len(ids) - 1 + 6  # the sink is not shown
    logp_TV = model(torch.tensor([[*ids, *new]]))[0].detach().log_softmax(-1)
    for place, token in enumerate(new, start=len(ids)):
        assert tips[place - 1].startswith(f"{float(logp_TV[place - 1, token].exp()):.1%} ")
    best = logp_TV[len(ids) + 1].exp().topk(5)  # of the third new token
    for share in best.values.tolist():
        assert f"{share:.1%}" in shown.text.partition("token 3")[2]


def test_a_prompt_longer_than_the_context_is_said_so_in_its_column(run):
    assert "256" in view.continuations(run, "sft", "ladder " * 300).text
    assert "type a prompt" in view.attention(run, "sft", "ladder " * 300).text


def test_an_empty_prompt_is_continued_from_the_sink(run):
    model, tokenizer = read.checkpoint(run, "sft")
    (new,) = generate(model, [tokenizer("")["input_ids"]], 5, eos_id=tokenizer.eos_token_id)
    assert repr(tokenizer.decode(new)) in view.continuations(run, "sft", "", new_tokens=5).text


# What is missing ----------------------------------------------------------------------------------------------------


def test_a_stage_that_is_not_there_is_named_with_what_makes_it(run):
    for shown in (view.overview(run), view.continuations(run), view.losses(run), view.attention(run, "dpo")):
        assert "stage dpo of run little is not there yet: run `papermill notebooks/03_dpo.ipynb" in shown.text
        assert "03_dpo.ipynb" in shown.html
    assert "pretrain: " in view.continuations(run).text  # the others are shown


def test_an_evaluation_that_is_not_there_is_named(run):
    for shown in (view.items(run, "sft", "dpo"), view.preferences(run, "sft, dpo")):
        assert "stage evaluate-dpo of run little is not there yet: run `papermill" in shown.text
    assert "has not evaluated 'stf', did you mean sft?" in view.items(run, "stf", "dpo").text
    assert "no rewards" in view.preferences(run, "pretrain, sft", margin="reward").text


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: view.continuations(run, "stf"), "did you mean sft?"),
        (lambda run: view.attention(run, "evaluate-sft"), "run little trains pretrain"),
        (lambda run: view.continuations(run, seed=2**64), "seed = 18446744073709551616"),
        (lambda run: view.continuations(run, form="chat"), "allowed are text, instruction"),
        (lambda run: view.losses(run, span=(0.5, 0.5)), "0 <= begin < end <= 1"),
        (lambda run: view.losses(run, against="time"), "tokens, step"),
        (lambda run: view.items(run, which="both"), "wins of the second"),
        (lambda run: view.preferences(run, margin="odds"), "likelihood, reward"),
    ],
)
def test_what_cannot_be_meant_stops(run, call, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        call(run)


@pytest.mark.parametrize(
    ("file", "view"),
    [("pretrain/metrics.jsonl", view.losses), ("pretrain/metrics.jsonl", view.overview)]
    + [("notebooks/04_evaluate-sft.ipynb", part) for part in (view.items, view.preferences, view.overview)],
)
def test_no_view_shows_what_a_byte_changed(run, file, view):
    changed = run.path / file
    before = changed.read_bytes()
    flip(changed, -4)
    try:
        said = seen(view(run)).text
    finally:
        changed.write_bytes(before)
    assert f"{file} of run little " in said and ("is not what the stage wrote" in said or "was changed since" in said)


def test_a_damaged_stage_costs_its_own_panel_only(run):
    metrics = run.path / "pretrain" / "metrics.jsonl"
    flip(metrics, -4)
    try:
        shown = view.losses(run, "pretrain, sft").text
        assert "sft: steps 1 to 100" in shown and "pretrain: steps" not in shown
        rows = {line.split()[0]: line for line in view.overview(run).text.splitlines() if line}
        assert "finished" in rows["sft"] and "missing or damaged" in rows["pretrain"]
        for text in (shown, view.overview(run).text, view.continuations(run, "pretrain, sft").text):
            assert "pretrain/metrics.jsonl of run little is not what the stage wrote" in text
            assert "papermill notebooks/01_pretrain.ipynb" in text
        assert "sft: The old miller" in view.continuations(run, "pretrain, sft").text
    finally:
        flip(metrics, -4)


def test_an_evaluation_whose_notebook_is_gone_is_named(run):
    notebook = run.path / "notebooks" / "04_evaluate-sft.ipynb"
    view.overview(run)  # its records have been read before
    content = notebook.read_bytes()
    notebook.unlink()
    try:
        for part in (view.items, view.preferences, view.overview):
            assert "04_evaluate-sft.ipynb of run little is not there: `papermill" in part(run).text
    finally:
        notebook.write_bytes(content)


def test_an_evaluation_of_other_weights_costs_its_own_panel_only(run):
    file = run.stage_folder("sft") / "run.json"
    before, facts = file.read_bytes(), run.require("sft")
    files.write_note(file, facts | {"weights_sha256": "0123456789abcdef" * 4})
    try:
        shown = view.items(run, "pretrain", "sft").text
        assert "sft was evaluated with weights " in shown and "now has weights 0123456789ab;" in shown
        assert "papermill notebooks/04_evaluate.ipynb" in shown and "-p model sft" in shown
        assert not re.search(r"[0-9a-f]{13}", shown)
        assert "pretrain: mean margin" in view.preferences(run, "pretrain, sft").text
    finally:
        file.write_bytes(before)


def test_a_run_that_is_not_there_is_an_error_with_the_runs_there_are(run):
    with pytest.raises(MissingInput, match=r"no run 'litle', did you mean little\?; runs: little; `threefold run"):
        open_run("litle")
    with pytest.raises(ConfigError):
        open_run("../little")


# Loss curves --------------------------------------------------------------------------------------------------------


def test_zooming_keeps_the_steps_of_that_part(run):
    assert "steps 50 to 75, loss 0.160 to 0.107" in view.losses(run, "sft", span=(0.5, 0.75)).text
    assert "steps 1 to 100, loss 8.000 to 0.080, held out 0.500" in view.losses(run, "sft").text


def figure_of(monkeypatch, call):
    """The figure that a view draws, laid out."""
    drawn = []
    monkeypatch.setattr(
        display, "image", lambda figure, description: drawn.append(figure) or display.block(description)
    )
    call()
    (figure,) = drawn
    figure.canvas.draw()
    return figure


def test_another_run_is_drawn_over_a_runs_curves(run, monkeypatch):
    other = run.path.with_name("other")
    shutil.copytree(run.path, other)
    try:
        shown = view.losses(run, "pretrain, sft", overlay="other, little")
        assert [line.split(":")[0] for line in shown.text.splitlines()] == [
            "pretrain", "pretrain of other", "sft", "sft of other"
        ]  # fmt: skip
        figure = figure_of(monkeypatch, lambda: view.losses(run, "sft", overlay=["other"]))
        styles = [line.get_linestyle() for line in figure.axes[0].lines if line.get_linestyle() != "None"]
        assert set(styles) == {"-", "--"}
    finally:
        shutil.rmtree(other)
    with pytest.raises(MissingInput, match="no run 'othr'"):
        view.losses.__wrapped__(run, "sft", overlay="othr")


def test_tick_labels_do_not_overlap(run, monkeypatch):
    prompt = "the baker sang quietly over the river"
    for call in (lambda: view.losses(run, "pretrain, sft"), lambda: view.attention(run, "sft", prompt)):
        figure = figure_of(monkeypatch, call)
        assert figure.axes
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
                assert not any(a.overlaps(b) for a, b in pairwise(boxes)), axis


# Attention ----------------------------------------------------------------------------------------------------------


def test_the_sink_share_told_is_that_of_the_maps(run):
    model, tokenizer = read.checkpoint(run, "sft")
    prompt = "the baker sang quietly over the river and found a lost ladder"
    maps_LHTS = looking.maps(model, tokenizer(prompt)["input_ids"])
    first = min(16, maps_LHTS.shape[-1] // 2)
    share = maps_LHTS[:, :, first:, 0].mean()
    assert f"the sink takes {share:.0%} of the attention" in view.attention(run, "sft", prompt, layer=1, head=2).text
    assert "sft has no layer 3" in view.attention(run, "sft", prompt, layer=3).text


def test_every_head_is_drawn_with_its_share(run, monkeypatch):
    model, tokenizer = read.checkpoint(run, "sft")
    prompt = "the baker sang quietly over the river and found a lost ladder"
    maps_LHTS = looking.maps(model, tokenizer(prompt)["input_ids"])
    shares = maps_LHTS[:, :, min(16, maps_LHTS.shape[-1] // 2) :, 0].mean(dim=-1).flatten().tolist()
    figure = figure_of(monkeypatch, lambda: view.attention(run, "sft", prompt))
    _, heads, _ = figure.axes
    assert [text.get_text() for text in heads.texts] == [f"{share:.0%}" for share in shares]
    (image,) = heads.images
    length = maps_LHTS.shape[-1]
    corner = image.get_array()[length + 1 : 2 * length + 1, :length]  # second layer, first head
    np.testing.assert_allclose(corner, maps_LHTS[1, 0].clamp_min(1e-3).numpy(), rtol=1e-6)


# Items --------------------------------------------------------------------------------------------------------------


def first_wording(run, model):
    frame = pd.read_parquet(run.path / "evaluation" / model / "items" / "sample-sentiment_0-shot.parquet")
    return frame[frame["template"] == "lm-eval"].set_index("item")


def test_wins_and_losses_are_the_items_that_one_model_alone_has_right(run):
    a, b = first_wording(run, "pretrain"), first_wording(run, "sft")
    texts = sources.load(SourceConfig(source="sample-sentiment", split="validation", max_examples=40))
    for which, mask in ((results.WINS, ~a["correct"] & b["correct"]), (results.LOSSES, a["correct"] & ~b["correct"])):
        expected = mask[mask].index.tolist()
        assert expected, "the example should have some of both"
        shown = view.items(run, "pretrain", "sft", SENTIMENT, which=which, count=99)
        told = seen(shown)
        assert f"{which} (sft against pretrain): {len(expected)}" in shown.text
        for number in range(40):
            assert (texts[number]["sentence"] in told.text) == (number in expected)
    both = (a["correct"] & b["correct"]).sum()
    assert f"40 items: both right {both}, only pretrain " in shown.text


def test_items_open_on_a_pair_with_wins(run, monkeypatch):
    assert results.opening(run, "", "", "") == ("pretrain", "sft", SENTIMENT)
    assert results.opening(run, "sft", "pretrain", "sample-text/lines-100") == (
        "sft",
        "pretrain",
        "sample-text/lines-100",
    )
    scored = results.scored

    def only_texts(frame, protocol):
        same = scored(frame, protocol)
        return same.assign(score=0.0) if "correct" in frame else same

    monkeypatch.setattr(results, "scored", only_texts)
    assert results.opening(run, "", "", "")[2] == "sample-text/lines-100"


def test_texts_without_right_and_wrong_compare_by_bits_per_byte(run):
    frames = [read.items(run, name, "sample-text/lines-100") for name in ("pretrain", "sft")]
    better = (frames[1]["nats"] < frames[0]["nats"]).sum()
    shown = view.items(run, "pretrain", "sft", "sample-text/lines-100")
    assert f"sft is better on {better}, worse on {len(frames[0]) - better}" in shown.text
    bits = frames[0]["nats"] / frames[0]["bytes"] / np.log(2)
    assert any(f"{value:.3f} bits per byte" in shown.text for value in bits)


def test_items_of_other_data_are_shown_without_texts(run):
    sentiment = replace(run.preset.evaluation.sentiment, max_examples=39)
    evaluation = replace(run.preset.evaluation, sentiment=sentiment)
    shown = view.items(replace(run, preset=replace(run.preset, evaluation=evaluation)), "pretrain", "sft", SENTIMENT)
    assert "now reads other data" in shown.text and "wins of the second" in shown.text


def test_margins_are_differences_of_log_likelihoods(run):
    frame = pd.read_parquet(run.path / "evaluation" / "sft" / "items" / "sample-preferences_preferences.parquet")
    expected = frame["logp_chosen"] - frame["logp_rejected"]
    shown = view.preferences(run, "sft", count=1)
    assert f"mean margin {expected.mean():+.3f}, chosen ahead in {(expected > 0).mean():.1%} of 12 pairs" in shown.text
    pair = sources.load(SourceConfig(source="sample-preferences", split="test", max_examples=12))[expected.argmin()]
    assert all(pair[part].strip() in seen(shown).text for part in ("prompt", "chosen", "rejected"))
    assert "mean margin +0.000" in view.preferences(run, "sft", margin="reward").text  # its own reference


# Controls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [view.continuations, view.losses, view.attention, view.items, view.preferences])
def test_every_parameter_of_a_view_has_a_control_that_begins_at_its_value(run, of):
    import inspect

    values = {name: one.default for name, one in list(inspect.signature(of).parameters.items())[1:]}
    made = controls.controls(run, of)
    assert set(made) == set(values)
    for name, widget in made.items():
        if name == "models":  # DPO was not evaluated
            continue
        opened = {"first": "pretrain", "second": "sft", "protocol": "sample-sentiment/0-shot"}
        asked = opened | {"stages": ("pretrain", "sft", "dpo")}
        assert widget.value == asked.get(name, values[name]), name
    if of is view.losses:
        assert made["overlay"].options == ()
    of(run, **{name: widget.value for name, widget in made.items()})  # what a control gives, the view takes


def test_the_curves_of_a_stage_in_training_are_read_again(run):
    """A work folder that a process holds starts the timer; its next tick shows the steps that came since."""
    partial = run.partial_folder("dpo")
    shown = []

    class Handle:
        update = staticmethod(shown.append)

    hold(partial)
    try:
        lines = [{"step": step, "tokens": 10 * step, "loss": 1 / step, "lr": 0.1} for step in range(1, 9)]
        (partial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
        assert re.search(r"dpo +in training", view.overview(run).text)
        show = Show(run)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(controls, "display", lambda *_, **__: Handle)
            show(view.losses, stages="dpo")
        timer = show.widgets["refresh"]
        assert timer.playing and timer.repeat
        (partial / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        timer.value = 1  # what the browser sets at the next tick
        assert "dpo: steps 1 to 8" in shown[-1].text
    finally:
        release(partial)
        shutil.rmtree(partial)
    assert not controls.at_work(run.path)
