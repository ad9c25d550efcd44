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
# What is each component worth? A base model is trained again, and then once more for every component with its counterpart
# in its place: same text in the same order, same steps, same seeds, feed-forwards of equal parameters. The optimizer is one
# of the components, each at a learning rate of its own. Step times are interleaved in one process, so that a slow moment of
# the machine slows every variant alike.
#
# Input: stage `data`. Output: `runs/<run>/ablations/`, one folder a variant and seed with its checkpoint and curve. Trainings
# run side by side, one a CPU thread or GPU; finished ones are kept when the notebook is interrupted, and a variant that is
# added to the list trains alone.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results
steps = None  # None: the preset's value, as for every key of its section [ablations]
seeds = None

# %%
from study.run import open_stage

stage = open_stage(
    "ablations",
    preset=preset,
    run=run,
    data_dir=data_dir,
    overrides=overrides,
    overwrite=overwrite,
    steps=steps,
    seeds=seeds,
)

# %%
from dataclasses import asdict, replace

from papertrail import records
from study.comparison import attribution, components, figures
from study.preset import ablation_base, attribution_chain, measured_on
from threefold.data.tokenizer import load_tokenizer, sink_ids, with_sinks
from threefold.evaluation import attention, length
from threefold.training import SourceRows, load_variant, run_variants, time_kernels, time_variants

tokenizer_folder = stage.require("data") / "tokenizer"
folder = stage.begin()

# %% [markdown]
# ## Trainings
#
# A variant is an override of `[model]` or `[ablations.train]`; one more is one line in the preset. The base may be smaller
# than the preset's model (`ablations.base`), so that several seeds can be afforded: whatever is found holds for that size.

# %%
vocabulary = len(load_tokenizer(tokenizer_folder))
small = replace(ablation_base(stage.preset), vocab_size=vocabulary)
whole = replace(stage.preset.model, vocab_size=vocabulary)
training = replace(stage.config.train, steps=stage.config.steps, tokens=-1, epochs=-1.0)
text = stage.preset.data
rows = SourceRows(
    text.pretrain,
    text.pretrain_heldout,
    tokenizer_folder,
    stage.preset.overlap,
    measured_on(stage.preset),
    stage.run.data_dir,
)
variants, chain = stage.config.variants, attribution_chain(stage.config)

every = run_variants(
    small,
    (*variants, *(variant for variant in chain.values() if variant != "base")),
    training,
    rows,
    seeds=range(stage.preset.seed, stage.preset.seed + stage.config.seeds),
    folder=folder,
    reuse=stage.folder,
)
results = [result for result in every if result.variant in ("base", *variants)]

# %% [markdown]
# ## Step times
#
# Whole steps (forward, backward, clipping, update) of every variant, interleaved, at the size trained above and at the preset's
# own, compiled where that stage's training would be.

# %%
timings = {
    "preset": time_variants(
        whole, variants, stage.preset.pretrain, rows, stage.config.rounds, file=folder / "steps-preset.json"
    )
}
if small != whole:
    timings["ablation"] = time_variants(
        small, variants, training, rows, stage.config.rounds, file=folder / "steps-ablation.json"
    )
for size, timing in timings.items():
    print(f"{components.SIZES[size]}: {timing.note}; {stage.config.rounds} rounds")

# %% [markdown]
# ## Results
#
# Held-out loss after equal steps, one value a seed, and the times of a step, one a round. The loss is over the same tokens for
# every variant: all but the first of each document, which sinks make a target or not.

# %%
positions = stage.preset.pretrain.batch_size * stage.preset.pretrain.accumulate * whole.context
found = {}
for result in results:
    step_seconds = {size: timing.seconds[result.variant] for size, timing in timings.items()}
    found[result.variant] = {
        "variant": result.variant,
        "heldout_loss": [one.heldout_loss for one in result.runs],
        "seeds": [one.seed for one in result.runs],
        "curves": [one.curve for one in result.runs],
        "parameters": result.parameters,
        "d_ff": result.runs[0].d_ff,
        "step_seconds": step_seconds,
        "tokens_per_second": [positions / seconds for seconds in step_seconds["preset"]],  # at the preset's size
        "timed_on": {size: timing.note for size, timing in timings.items()},
        "runs": [asdict(one) for one in result.runs],
    }
    line = (
        f"**{result.variant}**: held-out loss {result.heldout_loss:.4f} nats per token over {len(result.runs)} seed(s), "
        f"{result.parameters:,} parameters"
    )
    records.publish(
        f"ablation/{result.variant.replace('=', '-').replace(',', '_')}", found[result.variant], markdown=line
    )

# %% [markdown]
# *Difference* is the variant's held-out loss minus the base's, seed by seed. *Tokens to equal loss* says how many times the
# base's tokens the variant needs to come to the same held-out loss, the higher of the two last ones, read off both curves
# under their learning-rate schedule. *Step time* is the variant's over the base's, round by round.

# %%
replace(components.ablation_effects(found), name="ablation-effects").publish()

# %%
replace(components.ablation_resolution(found), name="ablation-resolution").publish()

# %%
replace(figures.ablation_curves(found), name="ablation-curves").publish()

# %% [markdown]
# ## Where a difference from GPT-2 comes from
#
# Where the preset has a chain: it begins with GPT-2's recipe and replaces its optimizer, then one component after another, by
# this model's; its last link makes the model larger. The order is the preset's, and a link's effect depends on the links before
# it.

# %%
losses = {
    result.variant: {
        "heldout_loss": [one.heldout_loss for one in result.runs],
        "seeds": [one.seed for one in result.runs],
        "parameters": result.parameters,
        "tokens": result.runs[0].tokens,
    }
    for result in every
}
links = attribution.links(losses, chain)
for link in links:
    line = f"**{attribution.title(link['link'])}**: {link['difference']:+.4f} nats per token over {link['n']} seed(s)"
    records.publish(attribution.record_name(link), link, markdown=line)

# %%
if links:
    replace(attribution.effects(links), name="attribution-links").publish()

# %%
if links:
    replace(figures.attribution_waterfall(links), name="attribution-figure").publish()

# %% [markdown]
# ## Components alone
#
# A normalisation is a small part of a step. Alone, at the width of the 253M model, forward and backward, the
# two differ by more. The batch is small so that the timing takes seconds.

# %%
kernels = components.kernels([asdict(time_kernels(part, stage.config.rounds)) for part in ("norm", "ffn")])
replace(kernels, name="kernels").publish()

# %% [markdown]
# ## Length
#
# What happens to the loss past the training length? Streams of held-out text, many contexts long, are read by the base, by
# the other kinds of position and by other numbers of sinks: with attention over everything before, with the last tokens
# alone, with the sinks beside them, and in recomputed windows. Learned positions end with their table.

# %%
source, data_folder = stage.preset.evaluation.perplexity, stage.run.data_dir
read = [name for name in length.VARIANTS if name in found and stage.config.length_streams > 0]
curves, shares = {}, {}
for name in read:
    models = {seed: load_variant(folder, name, seed) for seed in found[name]["seeds"]}
    fitting = with_sinks(load_tokenizer(tokenizer_folder), models[stage.preset.seed].config.sinks)
    ids = length.running_ids(source, fitting, data_folder)
    options = {"streams": stage.config.length_streams, "batch_tokens": stage.preset.evaluation.batch_tokens}
    curves[name] = length.by_position(models, ids, sink_ids(fitting), factor=stage.config.length_factor, **options)
    records.publish(
        f"length/{name.replace('=', '-')}",
        {"variant": name, **curves[name]},
        markdown=f"**{name}**: {curves[name]['streams']} streams of {curves[name]['edges'][-1]:,} positions",
    )
    if name in attention.VARIANTS:
        shares[name] = attention.shares(models, ids, sink_ids(fitting))

# %%
replace(figures.length_curves(curves), name="length-curves").publish()

# %%
replace(components.length_losses(curves), name="length-losses").publish()

# %% [markdown]
# ## Attention
#
# How much attention rests on the sinks: the mean probability on them, by layer and head, over rows of one context. Of the
# model without sinks it is the share of the text's first token.

# %%
records.publish("attention/sinks", {"variants": shares}, markdown=f"Attention of {', '.join(shares) or 'none'}.")

# %%
replace(figures.attention_sinks(shares), name="sinks-share").publish()

# %%
records.publish("stage/ablations", stage.finish(seeds=stage.config.seeds, steps=training.steps))
