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
# # 01 · Learning rate
#
# Two models are compared fairly when each has a learning rate that suits it. Before a training, this notebook tries the
# preset's learning rates times each of a few multipliers: whole trainings, each for a share of the length, on the same text
# and from the same seed. The trial with the lowest held-out loss gives the rates. Every model has the same number of trials.
#
# Input: the inputs of the training itself. Output: `runs/<run>/tuning/<model>/choice.json`, which the training reads. Finished
# trials are kept when the notebook is interrupted, and an interrupted trial is resumed from its last state.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results
model = "pretrain"  # or gpt2, gpt2-adamw, distilgpt2, sft, dpo
multipliers = None  # None: the preset's value, as for every key of its section [tuning]
share = None

# %%
from study.run import open_stage

stage = open_stage(
    "tune",
    preset=preset,
    run=run,
    data_dir=data_dir,
    overrides=overrides,
    overwrite=overwrite,
    model=model,
    multipliers=multipliers,
    share=share,
)

# %%
from basics.files import write_note
from papertrail import records
from study import tuning
from study.run import CHOICE

folder = stage.begin()

# %% [markdown]
# ## Trials

# %%
trials = tuning.run_trials(stage, folder)

# %% [markdown]
# ## The choice
#
# *At the edge* means that the best multiplier is the smallest or the largest that was tried: a better rate may lie beyond it.

# %%
choice = tuning.choose(stage.model, stage.config, trials, stage.preset.tuning.share)
write_note(folder / CHOICE, choice)
chosen = "yes, at the edge" if choice["edge"] else "yes"
table = [
    {
        "multiplier": trial["multiplier"],
        "learning rate": trial["learning_rate"],
        "Muon's": trial["muon_learning_rate"] if stage.config.optimizer == "muon" else None,
        "steps": trial["steps"],
        "tokens": trial["tokens"],
        "held-out loss": trial["heldout_loss"],
        "chosen": chosen if trial["multiplier"] == choice["multiplier"] else None,
    }
    for trial in trials
]
records.publish(
    f"tuning/{stage.model}",
    {**choice, "rule": "lowest held-out loss", "tried": trials},
    markdown=records.table(table, formats={"held-out loss": ".4f"}),
)

# %%
records.publish(
    f"stage/{stage.name}",
    stage.finish(
        tokens=sum(trial["tokens"] for trial in trials), device_seconds=sum(trial["seconds"] for trial in trials)
    ),
)
