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
# # Explore
#
# Look at a run: how its stages continue a prompt of yours, how they learned, where they attend, which items one model has
# right and another wrong. This notebook publishes nothing and writes nothing.
#
# Under each heading is one call. `show` puts controls above a view; in a script, `view.continuations(opened, stages, prompt)`
# returns the same view without controls. Where a stage is missing or damaged, the view says so and names the command that
# makes it.

# %% tags=["parameters"]
run = "smoke"  # its name in the runs folder
stages = "pretrain, sft, dpo"  # or gpt2, distilgpt2, sft-seed2, ...
prompt = "The old miller"
first = ""  # the models whose items are compared; default: a pair of which the second has items right that the first has not
second = ""
overlay = ""  # other runs, whose loss curves are drawn over this run's
data_dir = ""  # where the texts of items are read; default: $THREEFOLD_DATA, then what the run was made with
controls = True  # False: no widgets, plain outputs

# %%
from study.explore import Show, open_run, view

opened = open_run(run, data_dir)
show = Show(opened, controls)
view.overview(opened)

# %% [markdown]
# ## One prompt, every stage
#
# The colour of a token is its probability. In the prompt it shows how far the model expected what you typed. The table lists
# the most probable tokens at the place of new token number `at`. Set `form` to `instruction` to put the prompt in the format
# of the SFT examples.

# %%
show(view.continuations, stages=stages, prompt=prompt)

# %% [markdown]
# ## Loss curves
#
# Drag the ends of `span` to zoom; the vertical axis follows. `overlay` draws other runs over this one. A stage that is
# training is drawn up to its latest step, and the curves are read again every five seconds while the button plays.

# %%
show(view.losses, stages=stages, overlay=overlay)

# %% [markdown]
# ## Attention and the sink
#
# Each row is the attention of one token over the tokens before it, on a logarithmic scale; the first column is the sink. On
# the right are all heads, each with its share of attention on the sink. `layer` and `head` select the large map: they count
# from 1, and 0 is the mean over all. Type a long prompt: over many tokens an even spread leaves little for the sink.

# %%
show(
    view.attention,
    stage=second or "dpo",
    prompt=prompt + " walked along the river to the market, because the baker wanted flour for the bread of the town.",
)

# %% [markdown]
# ## Items: wins and losses
#
# What one model has right and the other wrong, with the texts. The p-value is for this pair and this protocol alone; notebook
# 06 adjusts for all comparisons that the report makes.

# %%
show(view.items, first=first, second=second)

# %% [markdown]
# ## Preference margins
#
# How much likelier the chosen reply is than the rejected one, pair by pair, and the pairs at one end. `reward` is DPO's
# implicit reward: the same difference relative to the SFT checkpoint, which is what DPO changed.

# %%
show(view.preferences, models=(first or "sft", second or "dpo"))
