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
# # 01 · Pretraining
#
# A decoder learns to predict the next token of packed text. The parameter `model` chooses which:
#
# * `pretrain`: ours. Pre-norm RMSNorm, rotary positions, SwiGLU, no biases, tied embeddings, a sink token.
# * `gpt2`: GPT-2's architecture (LayerNorm, learned positions, GELU at equal parameters, biases, no sink) on the same tokens,
#   the baseline where GPT-2's own weights are out of reach.
# * `gpt2-adamw`: the same architecture, trained as the section `[gpt2_adamw]` says: GPT-2's own recipe.
# * `distilgpt2`: every other layer of that model, distilled from it [Sanh et al. 2019].
#
# Input: stage `data` (and `gpt2` for its student), and the learning rates that notebook 01_tune chose, where the preset tunes
# them. Output: `runs/<run>/<model>/`, a Hugging Face checkpoint with
# `metrics.jsonl` and `run.json`.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results
model = "pretrain"  # or gpt2, gpt2-adamw, distilgpt2
replicate = 1  # which of the preset's `seeds` trainings of `pretrain`; from 2 on another seed, nothing else
nproc = None  # processes that train together (torchrun); None: one a GPU
learning_rate = None  # None: the preset's value, as for every key of the model's section, [pretrain] for instance
muon_learning_rate = None
steps = None
tokens = None
batch_size = None

# %%
from study.run import open_stage

stage = open_stage(
    "pretrain",
    preset=preset,
    run=run,
    data_dir=data_dir,
    overrides=overrides,
    overwrite=overwrite,
    model=model,
    replicate=replicate,
    nproc=nproc,
    learning_rate=learning_rate,
    muon_learning_rate=muon_learning_rate,
    steps=steps,
    tokens=tokens,
    batch_size=batch_size,
)

# %%
from dataclasses import asdict

import matplotlib.pyplot as plt

from papertrail import records
from study.card import write_card
from study.training import prepare, recipe, train_stage
from threefold.model import parameter_counts
from threefold.training import curve

inputs = prepare(stage)
folder = stage.begin()

# %% [markdown]
# ## The model
#
# One class holds every part and its GPT-2 counterpart; a configuration says which. GPT-2's parts have no sink, so its
# tokenizer puts nothing before a sequence; the vocabulary is the same.

# %%
counts = parameter_counts(inputs.config)
facts = {"model": stage.name, "config": asdict(inputs.config), "parameters": counts}
records.publish(
    f"model/{stage.name}",
    facts,
    markdown=records.table([{"component": name, "parameters": n} for name, n in counts.items()]),
)

# %% [markdown]
# ## The text
#
# Without what it shares with the evaluation sets (notebook 00).

# %%
rows = inputs.rows
print(
    f"{len(rows):,} rows of {rows.width}, {rows.n_tokens:,} tokens, {rows.utilisation:.1%} filled; {len(inputs.heldout):,} rows held out"
)

# %% [markdown]
# ## Training
#
# One loop serves all stages. A loss is a mean over target tokens, whatever rows they are in. An interrupted training is
# resumed from its last state when the notebook is run again. With several GPUs, or `nproc`, it runs in processes of its own
# (`threefold train` under torchrun) that share each step's rows and show their progress here.

# %%
result = train_stage(stage, inputs, folder).result
print(result.note)

# %%
history = curve(folder)
figure, axes = plt.subplots(figsize=(6.4, 3.2))
axes.plot(history["tokens"], history["loss"], linewidth=0.8, label="training")
axes.plot(history["heldout"]["tokens"], history["heldout"]["loss"], "o-", label="held out")
axes.set(xlabel="tokens trained on", ylabel="loss (nats per token)", title=stage.name)
axes.legend(frameon=False)
records.publish(
    f"curve/{stage.name}",
    history,
    figure=figure,
    text=f"Training and held-out loss of {stage.name} against tokens; the held-out loss ends at {result.heldout_loss:.3f} nats per token.",
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
