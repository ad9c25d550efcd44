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
# # 04 · Speed
#
# How fast does each model generate? All models of the run are timed in one process, interleaved: a busy moment of the machine
# slows all of them, so that their ratios hold even where their tokens per second do not. The pipeline runs nothing else at the
# same time.
#
# Input: every model's stage. Output: `runs/<run>/speed/` with every repeat as Parquet.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder, where a model from outside may lie
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results
speed_batch_sizes = None  # None: the preset's value, as for every key of its section [evaluation]
speed_prompt = None
speed_new_tokens = None
speed_repeats = None

# %%
from study.run import open_stage

stage = open_stage(
    "speed",
    preset=preset,
    run=run,
    data_dir=data_dir,
    overrides=overrides,
    overwrite=overwrite,
    speed_batch_sizes=speed_batch_sizes,
    speed_prompt=speed_prompt,
    speed_new_tokens=speed_new_tokens,
    speed_repeats=speed_repeats,
)

# %%
from papertrail import records
from study.preset import model_names
from study.subjects import subject
from threefold.evaluation import save_items, speed

models = [subject(stage, model) for model in model_names(stage.preset)]
folder = stage.begin()

# %% [markdown]
# ## Interleaved timing
#
# Prefill is one forward over the prompts, decoding the greedy steps after it, each model as the evaluations run it.

# %%
evaluations = speed.measure(
    models,
    batch_sizes=stage.config.speed_batch_sizes,
    prompt=stage.config.speed_prompt,
    new_tokens=stage.config.speed_new_tokens,
    repeats=stage.config.speed_repeats,
    seed=stage.seed,
    progress=print,
)

# %% [markdown]
# ## Results
#
# One record a model: tokens per second, the median of the repeats with their quartiles.

# %%
for evaluation in evaluations:
    hashes = save_items(folder / "items" / evaluation.model, [evaluation])
    rates = {name: values["value"] for name, values in evaluation.metrics.items()}
    records.publish(
        f"speed/{evaluation.model}",
        evaluation.record(hashes[evaluation.protocol]),
        markdown=f"**{evaluation.model}**\n\n" + records.table([rates], formats=dict.fromkeys(rates, ",.0f")),
    )

# %%
records.publish("stage/speed", stage.finish())
