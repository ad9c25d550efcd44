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
# The stages of a run side by side, on a prompt of your own. Change a cell, run it again; nothing here is published or hashed.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""
overrides = ""

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from threefold.data.tokenizer import load_tokenizer
from threefold.model import generate, load_checkpoint
from threefold.run import Run
from threefold.training import curve

opened = Run.open(preset, run, overrides, data_dir, create=False)
stages = [name for name in ("gpt2", "distilgpt2", "pretrain", "sft", "dpo") if opened.finished(name)]
if not stages:
    opened.require("pretrain")  # says which notebook makes it
models = {name: load_checkpoint(opened.intact(name)) for name in stages}
tokenizers = {name: load_tokenizer(opened.stage_folder(name)) for name in stages}
print(f"run {opened.name}: {', '.join(stages)}")

# %% [markdown]
# ## One prompt, every stage
#
# Greedy continuations; set `temperature` for sampled ones.

# %%
prompt = "The old miller"
new_tokens = 32
temperature = 0.0


def ids(name, text):
    """The prompt as the model was trained to read it: its tokenizer puts the sink in front."""
    return tokenizers[name](text)["input_ids"] or [tokenizers[name].bos_token_id]


def continuation(name):
    tokenizer = tokenizers[name]
    generator = torch.Generator().manual_seed(0)
    (new,) = generate(
        models[name],
        [ids(name, prompt)],
        new_tokens,
        temperature=temperature,
        eos_id=tokenizer.eos_token_id,
        generator=generator,
    )
    return tokenizer.decode(new)


for name in stages:
    print(f"{name:>10}: {prompt}{continuation(name)!r}")

# %% [markdown]
# ## What comes next
#
# The most probable next tokens after the prompt.

# %%
columns = {}
for name in stages:
    with torch.no_grad():
        logits_V = models[name](torch.tensor([ids(name, prompt)]))[0, -1]
    best = torch.softmax(logits_V, dim=-1).topk(8)
    columns[name] = [
        f"{tokenizers[name].decode([token])!r} {share:.1%}"
        for token, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
pd.DataFrame(columns)

# %% [markdown]
# ## Loss curves

# %%
figure, axes = plt.subplots(1, len(stages), figsize=(3.2 * len(stages), 2.8), squeeze=False)
for panel, name in zip(axes[0], stages, strict=True):
    history = curve(opened.stage_folder(name))
    panel.plot(history["tokens"], history["loss"], linewidth=0.8)
    panel.plot(history["heldout"]["tokens"], history["heldout"]["loss"], "o-")
    panel.set(title=name, xlabel="tokens")
axes[0][0].set_ylabel("loss (nats)")
figure.tight_layout()
