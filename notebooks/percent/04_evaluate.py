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
# # 04 · Evaluation
#
# One model under every protocol of the preset. All models, ours and others, go through one adapter and one code path, and every
# record carries the SHA-256 of the weights that were run.
#
# The parameter `model` names it: `random` (the untrained control), `gpt2`, `gpt2-adamw`, `distilgpt2`, `pretrain`, `sft`, `dpo`, or an
# external model of the preset.
#
# Input: the model's stage. Output: `runs/<run>/evaluation/<model>/` with every item's result as Parquet.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results
model = "pretrain"
replicate = 1  # which of the preset's `seeds` trainings of pretrain, sft or dpo

# %%
from study.run import open_stage

stage = open_stage(
    "evaluate",
    preset=preset,
    run=run,
    data_dir=data_dir,
    overrides=overrides,
    overwrite=overwrite,
    model=model,
    replicate=replicate,
)

# %%
from papertrail import records
from study.subjects import subject as open_subject
from threefold.evaluation import LanguageModel, evaluate, headline, save_items
from threefold.evaluation.continuations import sample_continuations

reference = LanguageModel.from_checkpoint(stage.require("sft"), "sft") if stage.model in ("sft", "dpo") else None
folder = stage.begin()

# %% [markdown]
# ## The model

# %%
subject = open_subject(stage, stage.model)
print(f"{subject.name}: context {subject.facts['context']}, weights {subject.weights_sha256[:12]}")

# %% [markdown]
# ## The protocols
#
# Preference rewards and the divergence of SFT and DPO are measured against the SFT checkpoint.
#
# A replicate shows how far a figure moves with the seed of training: it is measured by what the headline figures are read
# from, on the same items and with the same demonstrations as the first training.

# %%
config, only = (stage.config, None) if stage.replicate == 1 else headline(stage.config)
evaluations = evaluate(
    subject,
    config,
    stage.run.data_dir,
    reference=reference,
    beta=stage.preset.dpo.beta,
    seed=stage.seed,
    progress=print,
    only=only,
)

# %% [markdown]
# ## Results
#
# One record a protocol, each with the hash of its items.

# %%
hashes = save_items(folder / "items", evaluations)
for evaluation in evaluations:
    metrics = [{"metric": name, **values} for name, values in evaluation.metrics.items()]
    columns = {"metric": "metric", "value": "value", "low": "95% low", "high": "95% high", "n": "n", "unit": "unit"}
    records.publish(
        f"evaluation/{subject.name}/{evaluation.protocol}",
        evaluation.record(hashes[evaluation.protocol]),
        markdown=f"**{evaluation.protocol}**\n\n"
        + records.table(metrics, columns, formats={"value": ".4g", "low": ".4g", "high": ".4g"}),
    )

# %% [markdown]
# The model's continuations of the held-out lines that every model is given (greedy; not scored).

# %%
if stage.replicate == 1 and config.perplexity.is_set:
    shown = sample_continuations(subject, config.perplexity, stage.run.data_dir, seed=stage.seed)
    pairs = zip(shown["prompts"], shown["texts"], strict=True)
    table = [{"prompt": prompt, "continuation": text} for prompt, text in pairs]
    if table:
        records.publish(f"continuations/{subject.name}", shown, markdown=records.table(table))

# %%
records.publish(f"stage/{stage.name}", stage.finish(model_weights_sha256=subject.weights_sha256))
