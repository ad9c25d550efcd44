"""A small run with everything that the views of `study.explore` read, made by the real parts in a few seconds:
checkpoints of untrained models, metrics, evaluations of the sample, executed notebooks. DPO has not been made."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import torch
from evaluation_fixtures import tokenizer
from shared import ONE_STEP

from basics import files, paths
from papertrail import notebooks, records
from study.run import Run, open_stage
from threefold.config import ModelConfig
from threefold.evaluation import LanguageModel, evaluate, save_items
from threefold.model import Decoder, save_checkpoint

PRESET = (
    """
name = "little"
[model]
n_layer = 2
d_model = 32
n_head = 4
d_ff = 64
context = 256
[tokenizer]
vocab_size = 384
[[data.pretrain]]
source = "sample-text"
[[data.sft]]
source = "sample-instructions"
[[data.dpo]]
source = "sample-preferences"
"""
    + ONE_STEP
    + """
[evaluation]
sentiment_shots = [0]
sentiment_templates = 2
problem_shots = 0
bootstrap = 50
instruction_generations = 4
instruction_new_tokens = 4
[evaluation.lines]
source = "sample-text"
split = "validation"
max_examples = 2
[evaluation.perplexity]
source = ""
[evaluation.sentiment]
source = "sample-sentiment"
split = "validation"
max_examples = 40
[evaluation.sentiment_demonstrations]
source = ""
[evaluation.problems]
source = ""
[evaluation.problem_demonstrations]
source = ""
[evaluation.instructions]
source = "sample-instructions"
split = "test"
max_examples = 6
[evaluation.preferences]
source = "sample-preferences"
split = "test"
max_examples = 12
"""
)
MODELS = ("pretrain", "sft")
SIZES = {"n_layer": 2, "d_model": 32, "n_head": 4, "d_ff": 64, "context": 256, "vocab_size": 384}


def model(seed: int) -> Decoder:
    """An untrained model that prefers some tokens to others."""
    made, generator = Decoder(ModelConfig(**SIZES)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15, generator=generator)
    return made.eval()


def make_run(folder: Path) -> Run:
    """Writes run "little" below paths.RUNS, which must be patched to another folder than the project's."""
    assert not paths.RUNS.is_relative_to(paths.PROJECT)
    preset = folder / "little.toml"
    preset.write_text(PRESET)
    for seed, name in enumerate(MODELS):
        stage = open_stage(name, preset=str(preset))
        made = stage.begin()
        save_checkpoint(made, model(seed), tokenizer())
        lines = [{"step": step, "tokens": 100 * step, "loss": 8 / step, "lr": 0.1} for step in range(1, 101)]
        held = {"step": 100, "tokens": 10_000, "heldout_loss": 0.5}
        (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, held]))
        stage.finish(tokens=10_000)
    run = stage.run
    reference = LanguageModel.from_checkpoint(run.stage_folder("sft"), "sft")
    for name in MODELS:
        subject = LanguageModel.from_checkpoint(run.stage_folder(name), name)
        keys = ("lines", "zero-shot", "instructions", "preferences")
        found = evaluate(subject, run.preset.evaluation, reference=reference if name == "sft" else None, only=keys)
        evaluation = open_stage("evaluate", preset=str(preset), model=name)
        hashes = save_items(evaluation.begin() / "items", found)
        evaluation.finish()
        cells = []
        for one in found:
            data, metadata = records.bundle(f"evaluation/{name}/{one.protocol}", one.record(hashes[one.protocol]))
            output = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
            cells.append(nbformat.v4.new_code_cell("evaluate()", outputs=[output]))
        book = nbformat.v4.new_notebook(cells=cells, metadata=notebooks.METADATA)
        files.atomic_write(run.notebook(f"04_evaluate-{name}"), nbformat.writes(book))
        run.seal(evaluation.name)
    return run


@contextmanager
def made_runs(folder: Path) -> Iterator[Path]:
    """A runs folder with run "little", which is the project's within the context."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RUNS", folder / "runs")
        patch.delenv("THREEFOLD_DATA", raising=False)
        make_run(folder)
        yield folder / "runs"
