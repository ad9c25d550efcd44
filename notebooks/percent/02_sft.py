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
# # 02 · Supervised fine-tuning
#
# The pretrained model continues text; now it learns to answer. An example is a prompt and a response; several are packed into
# a row with exact boundaries, each seeing the sink and itself. **Only the response and its end are targets**: prompt and
# padding carry no loss. A share of every batch (`replay`) stays pretraining text, because without it a fine-tuning at a useful
# learning rate costs the model its text.
#
# Input: stage `pretrain`. Output: `runs/<run>/sft/`, a Hugging Face checkpoint with `metrics.jsonl` and `run.json`.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results
replicate = 1  # which of the preset's `seeds` trainings; from 2 on another seed and that replicate's parent
nproc = None  # processes that train together (torchrun); None: one a GPU
learning_rate = None  # None: the preset's value, as for every key of its section [sft]
muon_learning_rate = None
steps = None
batch_size = None
replay = None

# %%
from study.run import open_stage

stage = open_stage(
    "sft",
    preset=preset,
    run=run,
    data_dir=data_dir,
    overrides=overrides,
    overwrite=overwrite,
    replicate=replicate,
    nproc=nproc,
    learning_rate=learning_rate,
    muon_learning_rate=muon_learning_rate,
    steps=steps,
    batch_size=batch_size,
    replay=replay,
)

# %%
from dataclasses import asdict

import matplotlib.pyplot as plt

from papertrail import records
from study.card import write_card
from study.training import prepare, recipe, train_stage
from threefold.training import curve

inputs = prepare(stage)
folder = stage.begin()

# %% [markdown]
# ## Examples
#
# Prompts have the format in which the model is later asked. An example longer than a row is left out, and counted;
# what is shared with the evaluation sets was left out before (notebook 00).

# %%
rows = inputs.rows
print(
    f"{len(rows):,} rows, {rows.n_tokens:,} tokens, {rows.utilisation:.1%} filled, {rows.n_dropped:,} examples too long"
)

# %% [markdown]
# ## Training
#
# Cross-entropy of the response, a mean over response tokens. The held-out loss is that of responses never trained on.

# %%
result = train_stage(stage, inputs, folder).result
print(result.note)

# %%
history = curve(folder)
figure, axes = plt.subplots(figsize=(6.4, 3.2))
axes.plot(history["tokens"], history["loss"], linewidth=0.8, label="training (with replay)")
axes.plot(history["heldout"]["tokens"], history["heldout"]["loss"], "o-", label="held-out responses")
axes.set(xlabel="tokens trained on", ylabel="loss (nats per target token)", title="SFT")
axes.legend(frameon=False)
records.publish(
    f"curve/{stage.name}",
    history,
    figure=figure,
    text=f"Loss of SFT against tokens; on held-out responses it ends at {result.heldout_loss:.3f} nats per token.",
)

# %% [markdown]
# The model card says in the checkpoint's folder what this is, and under which licences it was trained.

# %%
write_card(stage, result)
records.publish(
    f"stage/{stage.name}",
    stage.finish(
        tokens=result.tokens,
        device_seconds=result.seconds,
        training=asdict(result),
        recipe=recipe(stage, inputs, result),
    ),
)
