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
# # 06 · Compare
#
# Every other notebook of the run measured something and published it as a record. This one reads all of those records and
# turns them into the tables, figures, sentences and verdicts of the report. It trains nothing and runs no model: every
# statement follows from the records, and where the records do not suffice, the notebook says so.
#
# It needs the executed notebooks of the same run (`threefold run` makes them in order).

# %% tags=["parameters"]
preset = "smoke"
run = ""
data_dir = ""
overrides = ""
overwrite = False  # True: other parameters than those of a finished run replace its results

# %% [markdown]
# Reading the records already checks them: an evaluation that ran other weights than the checkpoint of its stage stops the
# notebook here, with both hashes.

# %%
from papertrail import records
from study.comparison import (
    Comparison,
    claims,
    components,
    figures,
    insights,
    length,
    limits,
    precedent,
    tables,
    variance,
)
from study.run import open_stage

stage = open_stage("compare", preset=preset, run=run, data_dir=data_dir, overrides=overrides, overwrite=overwrite)
stage.begin()
comparison = Comparison.load(stage.run)
print(f"{len(comparison.records)} records; models: {', '.join(comparison.name(model) for model in comparison.models)}")

# %% [markdown]
# ## The plan
#
# Measures, margins, tests and the reading of every claim stand in one file, which was fixed before the run. Every record holds
# its hash; the dates are those of the file's last commit and of the run's beginning.

# %%
#| label: tbl-plan
#| tbl-cap: "The plan and the run, and what was changed after results were seen."
tables.plan(comparison).publish()

# %% [markdown]
# ## What is compared

# %%
#| label: tbl-models
#| tbl-cap: "The models. Context is in positions, feed-forward and width in units; heads in brackets are key-value heads where they are fewer."
tables.model_configurations(comparison).publish()

# %%
#| label: tbl-parameters
#| tbl-cap: "Parameters by component of the models trained here. Tied output embeddings are counted once."
tables.parameters(comparison).publish()

# %% [markdown]
# The table compares the benefit usually claimed for each component with the one that this run's ablations measured: the
# change from GPT-2's counterpart to the component, everything else equal.

# %%
#| label: tbl-architecture
#| tbl-cap: "Architectural differences from GPT-2: the benefit as it is claimed, and as this run's ablations measured it (with the component against GPT-2's counterpart; intervals over seeds, those of speed over rounds of timing)."
tables.architecture(comparison).publish()

# %% [markdown]
# ## Components replaced one by one
#
# From the records of notebook 05: every variant against the base, over seeds for the loss, over rounds for the time.

# %%
#| label: tbl-ablations
#| tbl-cap: "Components replaced one by one. Held-out loss in nats per token, mean and standard deviation over seeds. Difference and tokens to equal loss (variant against base): means over seeds with Student's interval. Step time (variant over base): median over rounds with the interval of order statistics. Intervals are 95% each; p is Holm-adjusted over its column, that of the time at the preset's size."
variants = comparison.by_variant("ablation")
components.ablation_effects(variants).publish()

# %%
#| label: txt-ablations
components.ablation_resolution(variants).publish()

# %%
#| label: fig-ablations
#| fig-alt: "Held-out loss falling with tokens trained on, one line a variant, the base in black."
#| fig-cap: "Held-out loss of the base and every variant against the tokens trained on, means over seeds."
figures.ablation_curves(variants).publish()

# %%
#| label: tbl-kernels
#| tbl-cap: "Components alone at the shapes of the 253M model (width 1024, SwiGLU 4096 wide, GELU at equal parameters), forward and backward, interleaved, not compiled. Ratios: median over rounds with the 95% interval of order statistics."
components.kernels((comparison.values("kernels") or {}).get("timings", ())).publish()

# %% [markdown]
# ## Training

# %%
#| label: fig-loss-curves
#| fig-alt: "Loss against tokens trained on, one panel for pretraining and the baselines, one for SFT, one for DPO."
#| fig-cap: "Loss against non-padding tokens. Faint: every logged step; line: running mean over 5% of the steps; dots: held-out loss. DPO's loss is per pair and has another unit; a distilled student's training loss is the distillation objective, its held-out loss the cross-entropy."
figures.loss_curves(comparison).publish()

# %%
#| label: tbl-stability
#| tbl-cap: "How each stage's loss went: mean of the first and the last tenth of the logged steps, held-out loss at start and end, and the largest rise of the running mean above the least it had been. Steady: a setback of at most a tenth of the starting loss, and an end no higher than the start. A distilled student's steps are of the distillation objective, its held-out loss is the cross-entropy."
tables.stability(comparison).publish()

# %%
#| label: txt-stability
insights.bullets(
    "stability-insights", insights.stability(comparison), "No stage recorded a loss curve.", comparison
).publish()

# %% [markdown]
# Tokens are those trained on, padding apart. The share is of what the device multiplies at best: a GPU's data sheet says it; on a CPU
# it is measured at the end of each training, in its number format and with its threads. The cost follows from the preset's `price_per_hour`.

# %%
#| label: tbl-efficiency
#| tbl-cap: "What each stage took. FLOP are 6N a token. The limit is what the device multiplies matrices with at best: on a CPU as measured at the end of the training, in its number format and with its threads, on a GPU the data sheet's dense bf16 rate. The cost takes the preset's price for every hour of training."
tables.efficiency(comparison, stage.preset.price_per_hour).publish()

# %% [markdown]
# ## Results

# %%
#| label: tbl-headline
#| tbl-cap: "Every model by every headline measure, with 95% intervals (Wilson for proportions, bootstrap over documents or items otherwise). Arrows point to the better side. Perplexity per token is given only for models that share Threefold's tokenizer."
tables.headline(comparison).publish()

# %%
#| label: fig-cross-model
#| fig-alt: "One panel a measure; every model is a point with its interval."
#| fig-cap: "Every model on the measures that all models share, with 95% intervals. Dashed: the majority class (sentiment) and a coin's throw (preferences)."
figures.cross_model(comparison).publish()

# %% [markdown]
# One model, several definitions: which windows, how much context, per token or per word.

# %%
#| label: tbl-protocols
#| tbl-cap: "The same weights under each definition of perplexity that was run. The last column divides the largest by the smallest."
tables.protocols(comparison).publish()

# %%
#| label: tbl-sentiment
#| tbl-cap: "Sentiment accuracy by setting. Shots are averaged over demonstration draws under the first template, which is lm-eval's; spreads are standard deviations of the accuracies of single templates or draws; the precedent's protocol is one 3-shot prompt on the first 200 items."
tables.sentiment(comparison).publish()

# %% [markdown]
# How much of this variation comes from the model, and how much from the wording, the demonstrations or the items?

# %%
#| label: tbl-variance
#| tbl-cap: "What a right or wrong sentiment answer varies with, over all trained models: variance components of single answers, in squared percentage points. A factor run at one level has none to estimate; what it contributes lies in the other components. The last column: the standard error that sampling that factor leaves in one model's accuracy."
variance.components(comparison).publish()

# %%
#| label: tbl-tasks
#| tbl-cap: "Word problems and instructions. Strict takes the number after `####`, the second column any last number."
tables.metrics(comparison, "tasks", "problems", "instructions").publish()

# %%
#| label: tbl-preferences
#| tbl-cap: "Preferences: how often the chosen answer is the likelier one, by its sum of log-probabilities and by its mean per token. Rewards and KL are against the SFT checkpoint."
tables.metrics(comparison, "preferences", "preferences").publish()

# %% [markdown]
# ## From stage to stage
#
# The stages share items, so every change is a paired one. The p-values of this table and of those against the baselines
# are adjusted together (Holm): one family, because the report is read as one.

# %%
#| label: tbl-stages
#| tbl-cap: "Each stage's value, its change from the stage before and since pretraining, on the same items. Perplexity changes are relative, proportions in percentage points, losses absolute. p: exact McNemar or clustered t, Holm-adjusted over the report. Minimum detectable effect: the smallest difference that a single test at 5% over these units detects with 80% power."
tables.stage_evolution(comparison).publish()

# %%
#| label: fig-stages
#| fig-alt: "One panel a measure; the three stages from left to right with their intervals, the baselines as level lines."
#| fig-cap: "From pretraining through SFT to DPO, with 95% intervals; level lines are the baselines where they compare."
figures.stage_evolution(comparison).publish()

# %%
#| label: txt-stages
insights.bullets(
    "stage-insights",
    insights.stage_evolution(comparison),
    "No two stages were evaluated on the same items.",
    comparison,
).publish()

# %% [markdown]
# ## From seed to seed
#
# The sampling error of the items is one uncertainty, the seed of training another. Where the preset's `seeds` trained the
# stages again, the figures of all trainings stand side by side: same text, same items, same demonstrations, other initial
# weights and another order of the rows. Their standard deviation has a chi-square interval, which is wide for three seeds;
# the change from stage to stage has Student's interval over the seeds.

# %%
#| label: tbl-seeds
#| tbl-cap: "Seed spread beside item sampling. SD over seeds: of the trainings' values, with its 95% interval; SE over items: from the first training's 95% interval. Larger: which of the two, where the chi-square test tells (Holm-adjusted over the table)."
tables.seed_spread(comparison).publish()

# %%
#| label: tbl-seed-changes
#| tbl-cap: "Each stage's change from the stage before, seed by seed, with Student's 95% interval of the mean over seeds (Holm-adjusted over the table), and beside it the first seed's change with its interval over items."
tables.seed_changes(comparison).publish()

# %%
#| label: txt-seeds
insights.bullets("seed-insights", insights.seed_spread(comparison), insights.ONCE, comparison).publish()

# %% [markdown]
# ## Against the baselines

# %%
#| label: tbl-gpt2
#| tbl-cap: "Each Threefold stage against the GPT-2 row on the same items. p is Holm-adjusted over the report; equivalent means that the whole interval lies within the measure's margin (0.01 bits per byte, 2 percentage points). Minimum detectable effect: the smallest difference that a single test at 5% over these units detects with 80% power."
tables.standing(comparison, "gpt2").publish()

# %%
#| label: txt-standing
insights.bullets(
    "standing", insights.standing(comparison, "gpt2"), "No GPT-2 row was evaluated on the same items.", comparison
).publish()

# %%
#| label: tbl-distilgpt2
#| tbl-cap: "DistilGPT-2's row as the yardstick: its teacher and the Threefold stages against it, on the same items."
tables.standing(comparison, "distilgpt2").publish()

# %%
#| label: txt-distilgpt2
insights.bullets(
    "standing-distilgpt2",
    insights.standing(comparison, "distilgpt2"),
    "No DistilGPT-2 row was evaluated on the same items.",
    comparison,
).publish()

# %%
#| label: tbl-speed
#| tbl-cap: "Tokens per second by batch size: median of the repeats with their quartiles in brackets."
tables.speed(comparison).publish()

# %% [markdown]
# ## Past the training length
#
# From the records of notebook 05: streams of held-out text many contexts long, and the attention of the models that read
# them. Where learned positions end, there is no prediction.

# %%
#| label: fig-length
#| fig-alt: "Loss against position on a logarithmic axis, one panel a variant, one line a way of reading."
#| fig-cap: "Held-out loss against position, in training contexts (dashed: the training length); means over seeds and streams, each seed faint. Sinks + window: the sinks (without any: the first four tokens) and as many last tokens as fill the context, rotary positions within the cache. Windows recomputed: of one context, moved by half, their later half scored. The cross marks where learned positions end: past it there is no prediction."
figures.length_curves(length.found(comparison)).publish()

# %%
#| label: tbl-length
#| tbl-cap: "Held-out loss in nats per token by position, in training contexts; means over seeds and streams. Past less within: all positions past the training length less the second half of it, with a 95% interval over seeds and streams, both taken as samples."
components.length_losses(length.found(comparison)).publish()

# %%
#| label: fig-attention-sinks
#| fig-alt: "Heat maps of the share of attention on the sinks, layers by heads, one for each number of sinks."
#| fig-cap: "Share of attention on the sinks by layer and head, in percent (first seed; in brackets the mean over all heads): mean probability over the positions of held-out rows of one context, the first 16 left out. Of the model without sinks: the share of the text's first token."
figures.attention_sinks(length.attention(comparison)).publish()

# %% [markdown]
# ## The precedent, rerun
#
# The comparison that this one redoes scored 200 sentiment items under one prompt, 50 word problems and a hundred lines of
# text, without intervals. Its protocols run here beside the others, on this run's models and on random weights.

# %%
#| label: tbl-precedent
#| tbl-cap: "The precedent's figures as claimed, its protocols on this run's models (first 100 lines; one 3-shot prompt, first 200 items; first 50 word problems), and this report's protocols, with 95% intervals. The claims are about other models; only the widths of the intervals carry over."
precedent.figures(comparison).publish()

# %%
#| label: txt-precedent
insights.bullets(
    "precedent-insights", precedent.sentences(comparison), "The precedent's protocols were not run.", comparison
).publish()

# %% [markdown]
# ## Conclusions

# %%
#| label: txt-insights
insights.bullets(
    "insights", insights.key_insights(comparison), "The records hold too little for any insight.", comparison
).publish()

# %%
#| label: tbl-claims
#| tbl-cap: "The claims ledger: what the precedent's page asserts, how each assertion is read, and what this run measured. A claim is supported when the whole 95% interval lies within its reading, contradicted when the whole interval lies outside, not resolved in between."
claims.ledger(comparison).publish()

# %%
#| label: txt-limitations
insights.bullets("limitations", limits.limitations(comparison), "The records show no confound.", comparison).publish()

# %%
#| label: tbl-provenance
#| tbl-cap: "Where the results come from. Fingerprints cover configuration, code, data, parents, versions and seed; hashes are cut to 12 digits here and whole in the notebooks. Repeatable: what doing it again on the same machine gives. On a CPU that is bit for bit the same with as many threads, which split fp32 sums; on a GPU the seeds and the order of the rows are the same, and sums that its kernels take in no fixed order may round otherwise."
tables.provenance(comparison).publish()

# %% [markdown]
# The numbers that the report's sentences quote:

# %%
limits.publishable_variables(comparison, stage.run.name, stage.preset.name).publish()

# %%
records.publish("stage/compare", stage.finish(records=len(comparison.records)))
