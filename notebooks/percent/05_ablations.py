# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,label,editable,deletable,-all
#     notebook_metadata_filter: -all
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Ablations
#
# What is each component worth? The base model is trained again, and then once more for every component with GPT-2's
# counterpart in its place: same data in the same order, same steps, same seed, feed-forwards of equal parameters. Step times
# are taken in turn, so that a slow moment of the machine meets every variant alike.
#
# Input: stage `data`. Output: `runs/<run>/ablations/`, one result a variant and seed; finished ones are kept when the notebook
# is interrupted.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # "section.key=value; ..."
steps = None  # None: the preset's value, as for every key of its section [ablations]
seeds = None

# %%
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
from threefold import records
from threefold.data import corpus, exclusion
from threefold.data.tokenizer import load_tokenizer, with_sinks
from threefold.run import open_stage
from threefold.stages import fingerprint
from threefold.training import run_variants

stage = open_stage("ablations", globals())
tokenizer = load_tokenizer(stage.require("data") / "tokenizer")
folder = stage.begin(fingerprint(stage.run, stage.name))

# %% [markdown]
# ## The variants
#
# A variant is an override of the model's section of the preset. A model without sinks packs its rows without them.

# %%
base = replace(stage.preset.model, vocab_size=len(tokenizer))
train_config = replace(stage.config.train, steps=stage.config.steps, tokens=-1, epochs=-1.0)
sources = stage.preset.data
exclude = exclusion.of_preset(stage.preset, stage.run.data_dir)


def rows_for(config):
    fitting = with_sinks(tokenizer, config.sinks)
    return (
        corpus.pretraining_rows(sources.pretrain, fitting, config, stage.run.data_dir, exclude),
        corpus.pretraining_rows(sources.pretrain_heldout, fitting, config, stage.run.data_dir),
    )


results = run_variants(
    base,
    stage.config.variants,
    train_config,
    rows_for,
    seeds=range(stage.preset.seed, stage.preset.seed + stage.config.seeds),
    folder=folder,
    progress=print,
)

# %% [markdown]
# ## Results
#
# Held-out loss after equal steps, one value a seed, and the median time of a step.

# %%
for result in results:
    positions = train_config.batch_size * train_config.accumulate * base.context
    values = {
        "variant": result.variant,
        "heldout_loss": [run.heldout_loss for run in result.runs],
        "parameters": result.parameters,
        "step_seconds": result.step_seconds,
        "tokens_per_second": positions / result.step_seconds,
        "runs": [asdict(run) for run in result.runs],
    }
    line = (
        f"**{result.variant}**: held-out loss {result.heldout_loss:.4f} nats per token over {len(result.runs)} seed(s), "
        f"{result.step_seconds * 1000:.1f} ms a step, {result.parameters:,} parameters"
    )
    records.publish(f"ablation/{result.variant.replace('=', '-').replace(',', '_')}", values, markdown=line)

# %%
figure, axes = plt.subplots(figsize=(6.4, 2.8))
for place, result in enumerate(results):
    losses = [run.heldout_loss for run in result.runs]
    axes.plot(losses, [place] * len(losses), "o", color="#0072B2", alpha=0.7)
axes.set(xlabel=f"held-out loss after {train_config.steps} steps (nats per token)", yticks=range(len(results)))
axes.set_yticklabels([result.variant for result in results])
axes.invert_yaxis()
records.publish(
    "ablation-figure",
    {result.variant: result.heldout_loss for result in results},
    figure=figure,
    text="Held-out loss of each ablation variant, one dot a seed.",
)

# %%
records.publish("stage/ablations", stage.finish(seeds=stage.config.seeds, steps=train_config.steps))
