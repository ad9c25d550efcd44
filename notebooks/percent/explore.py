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
# A run looked at by hand: what its stages say to a prompt of yours, how they learned, where they look, which items one has
# right and another wrong. Nothing here is published or hashed, and nothing is written.
#
# Under each heading is one call. Its first word, `show`, puts controls above the view; without them, or in a script,
# `view.continuations(opened, stages, prompt)` is the same view as a plain value. What a run does not have is said where it
# would stand, with the command that makes it.

# %% tags=["parameters"]
run = "smoke"  # its name in the runs folder
stages = "pretrain, sft, dpo"  # or gpt2, distilgpt2, sft-seed2, ...
prompt = "The old miller"
first, second = "sft", "dpo"  # the two models whose items are compared
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
# Each token stands on the colour of its probability, in the prompt too: there it says how far the model expected what you
# typed. The table lists what else was likely at new token number `at`. With `form` on `instruction` the prompt is put as
# the examples of SFT were.

# %%
show(view.continuations, stages=stages, prompt=prompt)

# %% [markdown]
# ## Loss curves
#
# Drag the ends of `span` to zoom: the vertical axis follows. A stage that is training now is drawn as far as it has come;
# run the cell again to see more of it.

# %%
show(view.losses, stages=stages)

# %% [markdown]
# ## Attention and the sink
#
# Rows look at columns, on a logarithmic scale; the first column is the sink. On the right is each head's share of attention
# on it. Layers and heads count from 1, and 0 is the mean over all of them. The share needs some text: the longer the prompt,
# the less an even spread would leave for one token.

# %%
show(
    view.attention,
    stage=second,
    prompt=prompt + " walked along the river to the market, because the baker wanted flour for the bread of the town.",
)

# %% [markdown]
# ## Items: wins and losses
#
# What one model has right and the other wrong, with the texts. The p-value is that of this pair on this protocol alone;
# notebook 06 adjusts for all the comparisons that the report makes.

# %%
show(view.items, first=first, second=second)

# %% [markdown]
# ## Preference margins
#
# How much likelier the chosen reply is than the rejected one, pair by pair, and the pairs at one end. `reward` is the same
# against the SFT checkpoint, as DPO's objective has it: what training moved.

# %%
show(view.preferences, models=(first, second))
