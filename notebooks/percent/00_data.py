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
# # 00 · Data
#
# Which texts a run reads, where they come from, and how they become rows of tokens. Every source is found by the same three
# steps: a local folder, the Hugging Face cache, the hub. A source that is nowhere stops the run; nothing is left out silently.
#
# Output: `runs/<run>/data/` with the tokenizer. The tokenised text itself is cached beside the runs, keyed by its content.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # "section.key=value; ..."

# %%
from dataclasses import fields

import pandas as pd
from threefold import records
from threefold.config import SourceConfig
from threefold.data import corpus
from threefold.data.tokenizer import build_tokenizer, tokenizer_hash
from threefold.run import open_stage
from threefold.stages import fingerprint

stage = open_stage("data", globals())
folder = stage.begin(fingerprint(stage.run, stage.name))
model_config, sources = stage.preset.model, stage.config

# %% [markdown]
# ## Tokenizer
#
# A byte-level BPE, learned on this preset's own pretraining text or GPT-2's. The *sink* is its BOS token: one reserved
# vocabulary row that stands before every sequence and is never a target. The tokenizer puts it there by itself, so that any
# tool that follows the tokenizer runs the model as it was trained.

# %%
#| label: tbl-tokenizer
#| tbl-cap: "The tokenizer. Bytes per token are measured on the held-out pretraining text."
tokenizer = build_tokenizer(
    stage.preset.tokenizer,
    corpus.mixture_texts(sources.pretrain, stage.run.data_dir),
    sinks=model_config.sinks,
    data_dir=stage.run.data_dir,
    context=model_config.context,
)
tokenizer.save_pretrained(folder / "tokenizer")

heldout = [corpus.describe(source, stage.run.data_dir, tokenizer) for source in sources.pretrain_heldout]
facts = {
    "kind": stage.preset.tokenizer.kind,
    "vocabulary": len(tokenizer),
    "bytes_per_token": sum(part["bytes"] for part in heldout) / sum(part["tokens"] for part in heldout),
    "bos": tokenizer.bos_token,
    "eos": tokenizer.eos_token,
    "sha256": tokenizer_hash(tokenizer),
}
table = [
    {
        "property": "kind",
        "value": {"train": "byte-level BPE, trained on the pretraining text", "gpt2": "GPT-2's BPE"}[facts["kind"]],
    },
    {"property": "vocabulary", "value": f"{facts['vocabulary']:,}"},
    {"property": "bytes per token", "value": f"{facts['bytes_per_token']:.2f}"},
    {"property": "sink (BOS), end", "value": f"{facts['bos']}, {facts['eos']}"},
]
records.publish("tokenizer", facts, markdown=records.table(table))

# %% [markdown]
# ## Sources
#
# Everything the run trains on or is measured by. Words and bytes are those of the text as pretraining would read it.

# %%
#| label: tbl-sources
#| tbl-cap: "Every source that the run reads, with its licence and size. The pinned revisions and content hashes are in the record."
uses = {entry.name.replace("_heldout", ", held out"): getattr(sources, entry.name) for entry in fields(sources)}
for entry in fields(stage.preset.evaluation):
    value = getattr(stage.preset.evaluation, entry.name)
    if isinstance(value, SourceConfig) and (value.source or value.path):
        uses[f"evaluation: {entry.name.replace('_', ' ')}"] = (value,)

described = [
    {"use": use, **corpus.describe(source, stage.run.data_dir, tokenizer)}
    for use, parts in uses.items()
    for source in parts
]
columns = {
    "use": "used for",
    "name": "source",
    "split": "split",
    "licence": "licence",
    "documents": "documents",
    "words": "words",
    "tokens": "tokens",
}
records.publish("data/sources", {"sources": described}, markdown=records.table(described, columns))

# %% [markdown]
# ## Rows
#
# Documents are packed into rows of the model's context. Each document sees its own past and the sink, nothing else, and its
# positions restart after the sink: a packed token is computed exactly as an unpacked one. Tokens are counted without padding.

# %%
packed = {
    "pretrain": corpus.pretraining_rows(sources.pretrain, tokenizer, model_config, stage.run.data_dir),
    "sft": corpus.example_rows(sources.sft, tokenizer, model_config, stage.run.data_dir),
    "dpo": corpus.preference_rows(sources.dpo, tokenizer, model_config, stage.run.data_dir),
}
rows = [
    {
        "stage": name,
        "rows or pairs": len(part),
        "tokens": part.n_tokens,
        "padding": None if name == "dpo" else round(1 - part.utilisation, 4),
        "left out": part.n_dropped,
    }
    for name, part in packed.items()
]
records.publish("data/rows", {"rows": rows}, markdown=records.table(rows, formats={"padding": ".1%"}))

# %% [markdown]
# One row, opened: the sink is segment 0, documents count from 1, padding is -1.

# %%
batch = packed["pretrain"].rows([0])
pd.DataFrame(
    {
        "token": [tokenizer.decode([token]) for token in batch.tokens_BT[0].tolist()],
        "position": batch.positions_BT[0].tolist(),
        "segment": batch.segments_BT[0].tolist(),
        "target": [tokenizer.decode([token]) if token >= 0 else None for token in batch.targets_BT[0].tolist()],
    }
).head(12)

# %% [markdown]
# ## Examples
#
# What a model is asked and taught, as it stands in the rows.

# %%
for use in ("sft", "dpo"):
    prompt, response = next(corpus.examples(getattr(sources, use)[0], stage.run.data_dir))
    print(f"--- {use}: prompt\n{prompt}\n--- {use}: response\n{response}\n")

# %%
records.publish("stage/data", stage.finish())
