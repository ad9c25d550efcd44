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
from study.run import open_stage

stage = open_stage("compare", preset=preset, run=run, data_dir=data_dir, overrides=overrides, overwrite=overwrite)

# %%
from papertrail import records
from study.comparison import (
    Comparison,
    attribution,
    claims,
    components,
    confounds,
    figures,
    findings,
    length,
    original,
    tables,
    variance,
)
from study.comparison.differences import SINCE, STAGES, compared

stage.begin()
comparison = Comparison.load(stage.run)
print(f"{len(comparison.records)} records; models: {', '.join(comparison.name(model) for model in comparison.models)}")

# %% [markdown]
# ## Findings
#
# Each sentence is a function of records: it appears because a test came out as it did, and would say something else had
# the test come out otherwise.

# %%
#| label: txt-notice
findings.notice(comparison, stage.preset).publish()

# %%
#| label: txt-findings
findings.opening(comparison).publish()

# %%
#| label: fig-findings
#| fig-cap: "The differences behind the findings, with 95% intervals. Grey: the margin of equivalence. Filled markers: a difference may be claimed."
findings.figure(comparison).publish()

# %% [markdown]
# ## Models and recipes

# %%
#| label: tbl-models
#| tbl-cap: "The models. Context is in positions, layers × width in units."
tables.model_configurations(comparison).publish()

# %%
#| label: tbl-recipes
#| tbl-cap: "How each model was trained, the stages that it continues or copies included; an arrow leads from stage to stage."
tables.training_recipes(comparison).publish()

# %%
#| label: tbl-parameters
#| tbl-cap: "Parameters by component."
tables.parameters(comparison).publish()

# %% [markdown]
# What else may explain a difference is found in the records, stated once, and referred to by number.

# %%
#| label: txt-confounds
confounds.listing(comparison).publish()

# %% [markdown]
# ## Against the baselines
#
# All models answer the same items, so every difference is a paired one.

# %%
#| label: fig-baselines
#| fig-cap: "Every model against each baseline on the same items, with 95% intervals. Grey: the margin of equivalence. Filled markers: a difference may be claimed."
figures.forest("baselines", comparison, compared(comparison, *comparison.baselines), columns=2).publish()

# %%
#| label: tbl-headline
#| tbl-cap: "Every model by every headline measure, with 95% intervals (Wilson for proportions, bootstrap over documents or items otherwise). Arrows point to the better side. Perplexity per token is given only for models that share Threefold's tokenizer."
tables.headline(comparison).publish()

# %%
#| label: tbl-standing
#| tbl-cap: "Every model against each baseline on the same items. p is Holm-adjusted over the report. Minimum detectable effect: the smallest difference that a single test at 5% over these units detects with 80% power."
tables.standing(comparison).publish()

# %% [markdown]
# ## From stage to stage

# %%
#| label: fig-stages
#| fig-cap: "Each stage against the one before, and the last against the first, on the same items, with 95% intervals. Grey: the margin of equivalence. Filled markers: a difference may be claimed."
figures.forest("stages", comparison, compared(comparison, STAGES, SINCE), columns=2).publish()

# %%
#| label: tbl-stages
#| tbl-cap: "Each stage's value, its change from the stage before and since pretraining, on the same items. Perplexity changes are relative, proportions in percentage points, losses absolute. p is Holm-adjusted over the report."
tables.stage_evolution(comparison).publish()

# %%
#| label: tbl-continuations
#| tbl-cap: "The first words of held-out lines chosen by the seed of the preset, and how each stage continues them: greedily, up to the end of the text or a fixed number of tokens."
tables.continuations(comparison).publish()

# %% [markdown]
# ## From seed to seed
#
# The sampling of items is one uncertainty, the seed of training another. Where the preset's `seeds` trained the stages
# again, all trainings answer the same items with the same demonstrations; initial weights and order of the rows differ.

# %%
#| label: tbl-seeds
#| tbl-cap: "Seed spread beside item sampling. SD over seeds: of the trainings' values, with its 95% chi-square interval; SE over items: from the first training's 95% interval. Larger: which of the two, where the test decides it (Holm-adjusted over the table)."
tables.seed_spread(comparison).publish()

# %%
#| label: tbl-seed-changes
#| tbl-cap: "Each stage's change from the stage before, and that from GPT-2's rows to our pretraining where these were repeated, seed by seed, with Student's 95% interval of the mean over seeds (Holm-adjusted over the table), and beside it the first seed's change with its interval over items."
tables.seed_changes(comparison).publish()

# %% [markdown]
# ## Components
#
# From the records of notebook 05: every variant against the base, over seeds for the loss, over rounds for the time.

# %%
#| label: tbl-architecture
#| tbl-cap: "Architectural differences from GPT-2: the benefit that the original claims, and the one that this run's ablations measured (with the component against GPT-2's counterpart; loss over seeds at the ablations' size, speed over rounds of timing at the preset's)."
tables.architecture(comparison).publish()

# %%
#| label: txt-ablations
variants = comparison.by_variant("ablation")
components.ablation_resolution(variants).publish()

# %%
#| label: fig-ablations
#| fig-cap: "Held-out loss of the base and every variant against the tokens trained on, means over seeds."
figures.ablation_curves(variants).publish()

# %% [markdown]
# Where does the difference from GPT-2 come from? A chain from GPT-2's recipe to this model, one part replaced after another.

# %%
#| label: tbl-attribution
#| tbl-cap: "From GPT-2's recipe to this model: the held-out loss after each replacement less that before it, mean over seeds with Student's 95% interval; then the links by group, and the whole. p is Holm-adjusted over the links, and apart from them over the groups. Shares are means over seeds. A link's effect depends on the links before it in the chain."
links = attribution.found(comparison)
attribution.effects(links).publish()

# %%
#| label: fig-attribution
#| fig-cap: "Held-out loss from GPT-2's recipe to this model, means over seeds; black: the 95% interval of each difference. Green lowers the loss, orange raises it."
figures.attribution_waterfall(links).publish()

# %%
#| label: txt-attribution
attribution.summary(links).publish()

# %%
#| label: tbl-ablations
#| tbl-cap: "Components replaced one by one. Held-out loss in nats per token, mean and standard deviation over seeds. Difference and tokens to equal loss (variant against base): means over seeds with Student's interval. Step time (variant over base): median over rounds with the interval of order statistics. p is Holm-adjusted over its column, that of the time at the preset's size."
components.ablation_effects(variants).publish()

# %%
#| label: tbl-kernels
#| tbl-cap: "Components alone at the shapes of the original's model, forward and backward, interleaved, not compiled. Ratios: median over rounds with the 95% interval of order statistics."
components.kernels(comparison.values("kernels").get("timings", ())).publish()

# %% [markdown]
# ## Past the training length
#
# From the records of notebook 05: streams of the test text many contexts long, and the attention of the models that read
# them. Where learned positions end, there is no prediction.

# %%
#| label: fig-length
#| fig-cap: "Test loss against position, in training contexts (dashed: the training length); means over seeds and streams, each seed faint. Sinks + window: the sinks (without any: the first tokens) and as many last tokens as fill the context. Windows recomputed: of one context, moved by half, their later half scored. The cross marks where learned positions end."
figures.length_curves(length.found(comparison)).publish()

# %%
#| label: tbl-length
#| tbl-cap: "Test loss in nats per token by position, in training contexts; means over seeds and streams. Past minus within: the loss over all positions past the training length minus the loss over its second half, with a 95% interval over seeds and streams."
components.length_losses(length.found(comparison)).publish()

# %%
#| label: fig-attention-sinks
#| fig-cap: "Share of attention on the sinks by layer and head, in percent (first seed; in brackets the mean over all heads). Of the model without sinks: the share of the text's first token."
figures.attention_sinks(length.attention(comparison)).publish()

# %% [markdown]
# ## Tasks

# %%
#| label: tbl-sentiment
#| tbl-cap: "Sentiment accuracy by setting. Shots are under the first template, which is lm-eval's; spreads are standard deviations of the accuracies of single templates or draws; “precedent” is the original's one prompt."
tables.sentiment(comparison).publish()

# %%
#| label: tbl-variance
#| tbl-cap: "What a right or wrong sentiment answer varies with, over our stages and the baselines: variance components of single answers, in squared percentage points. A factor with one level has none to estimate. The last column: the standard error that sampling that factor leaves in one model's accuracy."
variance.components(comparison).publish()

# %%
#| label: tbl-tasks
#| tbl-cap: "Word problems and instructions. Strict takes the number after `####`, the second column any last number."
tables.metrics(comparison, "tasks", "problems", "instructions").publish()

# %%
#| label: tbl-preferences
#| tbl-cap: "Preferences: how often the chosen answer is the likelier one, by its sum of log-probabilities and by its mean per token. Rewards and KL are against the SFT checkpoint."
tables.metrics(comparison, "preferences", "preferences").publish()

# %%
#| label: tbl-protocols
#| tbl-cap: "One model, several perplexities: the same weights under each definition and text that was run. The last column divides the largest by the smallest."
tables.protocols(comparison).publish()

# %%
#| label: tbl-speed
#| tbl-cap: "Tokens per second by batch size: median of the repeats with their quartiles in brackets."
tables.speed(comparison).publish()

# %% [markdown]
# ## Training

# %%
#| label: fig-loss-curves
#| fig-cap: "Loss against non-padding tokens. Faint: every logged step; line: running mean over 5% of the steps; dots: held-out loss. DPO's loss is per pair and has another unit; a distilled student's training loss is the distillation objective."
figures.loss_curves(comparison).publish()

# %%
#| label: tbl-stability
#| tbl-cap: "How each stage's loss went: mean of the first and the last tenth of the logged steps, held-out loss at start and end, and the largest rise of the running mean above the least it had been. Steady: a setback of at most a tenth of the starting loss, and an end no higher than the start."
tables.stability(comparison).publish()

# %%
#| label: tbl-efficiency
#| tbl-cap: "What each stage took. FLOP are 6N a token. The limit is what the device multiplies matrices with at best: on a CPU as measured at the end of the training, in its number format and with its threads, on a GPU the data sheet's dense bf16 rate. The cost takes the preset's price for every hour of training. Stages that ran side by side shared the machine."
tables.efficiency(comparison, stage.preset.price_per_hour).publish()

# %% [markdown]
# ## The original, side by side
#
# The figures of the comparison that this one redoes are data (`original.toml`).

# %%
#| label: tbl-original-models
#| tbl-cap: "Configurations and training data, there and here."
original.by_model(comparison, "original-models").publish()

# %%
#| label: tbl-original-perplexity
#| tbl-cap: "Perplexity, its change against GPT-2, and training tokens, there and here."
original.by_model(comparison, "original-perplexity").publish()

# %%
#| label: tbl-original-tasks
#| tbl-cap: "Tasks, there and here, with 95% intervals here."
original.by_model(comparison, "original-tasks").publish()

# %%
#| label: tbl-original-stages
#| tbl-cap: "Stage evolution: change from the stage before and since pretraining, there and here."
original.by_model(comparison, "original-stages").publish()

# %%
#| label: tbl-original-spread
#| tbl-cap: "Spread across the stages: the range in points or perplexity, and as a share of the stages' mean."
original.spread(comparison).publish()

# %%
#| label: tbl-original-standing
#| tbl-cap: "Where the model matches, exceeds and lags GPT-2, there and here: bits per byte and sentiment of the pretrained model, the rest of the last stage."
original.standing(comparison).publish()

# %%
#| label: tbl-original-distilgpt2
#| tbl-cap: "DistilGPT-2 against GPT-2, there and here."
original.distilgpt2(comparison).publish()

# %%
#| label: tbl-original-efficiency
#| tbl-cap: "Training efficiency, there and here. Cited: GPT-2's figures as the original gives them, without a source."
original.efficiency(comparison).publish()

# %%
#| label: tbl-original-rerun
#| tbl-cap: "The original's figures as claimed, its protocols on this run's models, and this report's protocols, with 95% intervals. The claims are about other models; only the widths of the intervals carry over."
original.rerun(comparison).publish()

# %%
#| label: txt-original
original.statements(comparison).publish()

# %%
#| label: tbl-claims
#| tbl-cap: "The claims ledger. Where: the original's page, or file and line of its repository. Supported and contradicted: the whole 95% interval lies inside or outside the reading, under the claim's own conditions; “at this scale” where they are not met."
claims.ledger(comparison).publish()

# %% [markdown]
# ## Tests and provenance

# %%
#| label: tbl-families
#| tbl-cap: "Which statements are tested together, and how each family of tests is adjusted."
tables.families(comparison).publish()

# %% [markdown]
# Measures, margins, tests and the reading of every claim stand in one file, the plan. Every record holds its hash; the
# dates are those of the file's last commit and of the run's beginning.

# %%
#| label: tbl-plan
#| tbl-cap: "The plan and the run, and what was changed after results were seen."
tables.plan(comparison).publish()

# %%
#| label: tbl-provenance
#| tbl-cap: "Where the results come from. Fingerprints cover configuration, code, data, parents, versions and seed; hashes are cut to 12 digits here and whole in the notebooks. Repeatable: what doing it again on the same machine gives."
tables.provenance(comparison).publish()

# %% [markdown]
# The numbers that the report's sentences quote:

# %%
findings.publishable_variables(comparison, stage.run.name, stage.preset.name).publish()

# %%
records.publish("stage/compare", stage.finish(records=len(comparison.records)))
