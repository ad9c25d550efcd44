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
# # 03 · Direct preference optimisation
#
# Of two replies to a dialogue, people chose one. DPO [Rafailov et al. 2023, equation 7] raises the probability of the chosen
# reply $y_w$ against the rejected $y_l$, measured against a frozen reference:
#
# $$\mathcal L = -\log\sigma\Big(\beta\log\frac{\pi(y_w\mid x)}{\pi_\text{ref}(y_w\mid x)} - \beta\log\frac{\pi(y_l\mid x)}{\pi_\text{ref}(y_l\mid x)}\Big)$$
#
# The reference is the SFT checkpoint. It never changes, so its log-probabilities of all pairs are computed once, before the
# first step. Sums run over the reply and its end, not over the prompt, and gradients flow through both replies.
#
# Input: stage `sft`. Output: `runs/<run>/dpo/`, a Hugging Face checkpoint with `metrics.jsonl` and `run.json`.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results
replicate = 1  # which of the preset's `seeds` trainings; from 2 on another seed and that replicate's parent
nproc = None  # processes that train together (torchrun); None: one a GPU
learning_rate = None  # None: the preset's value, as for every key of its section [dpo]
muon_learning_rate = None
beta = None
steps = None
batch_size = None

# %%
from study.run import open_stage

stage = open_stage(
    "dpo",
    preset=preset,
    run=run,
    data_dir=data_dir,
    overrides=overrides,
    overwrite=overwrite,
    replicate=replicate,
    nproc=nproc,
    learning_rate=learning_rate,
    muon_learning_rate=muon_learning_rate,
    beta=beta,
    steps=steps,
    batch_size=batch_size,
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
# ## Pairs
#
# Both replies share the dialogue before them. A pair with a side longer than a row is left out, and counted; a pair
# that is shared with the evaluation sets was left out before (notebook 00).

# %%
pairs = inputs.rows
print(f"{len(pairs):,} pairs to train on ({pairs.n_dropped:,} too long), {len(inputs.heldout):,} held out")

# %% [markdown]
# ## Training
#
# Before the first step policy and reference are the same: the loss is $\log 2$ and every margin 0.

# %%
result = train_stage(stage, inputs, folder).result
print(result.note)

# %%
history = curve(folder)
figure, axes = plt.subplots(figsize=(6.4, 3.2))
axes.plot(history["tokens"], history["loss"], linewidth=0.8, label="training")
axes.plot(history["heldout"]["tokens"], history["heldout"]["loss"], "o-", label="held out")
axes.axhline(0.6931, color="0.6", linewidth=0.8, linestyle=":")
axes.annotate(
    "log 2: policy = reference", (0, 0.6931), textcoords="offset points", xytext=(2, 4), fontsize=8, color="0.4"
)
axes.set(xlabel="tokens trained on", ylabel="DPO loss (nats per pair)", title="DPO")
axes.legend(frameon=False)
records.publish(
    f"curve/{stage.name}",
    history,
    figure=figure,
    text=f"DPO loss against tokens; on held-out pairs it ends at {result.heldout_loss:.3f} nats per pair.",
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
