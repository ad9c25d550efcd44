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
# Of a folder of own data, the names of files and folders say which files belong to a split (data/README.md). The table of files
# shows which were read.
#
# Output: `runs/<run>/data/` with the tokenizer. The tokenised text itself is cached beside the runs, keyed by its content.

# %% tags=["parameters"]
preset = "smoke"
run = ""  # default: the preset's name
data_dir = ""  # local data folder; default: $THREEFOLD_DATA, then the Hugging Face cache, then the hub
overrides = ""  # further keys of the preset, written as for --set of `threefold run` and separated by ;
overwrite = False  # True: other parameters than those of a finished run replace its results

# %%
from study.run import open_stage

stage = open_stage("data", preset=preset, run=run, data_dir=data_dir, overrides=overrides, overwrite=overwrite)

# %%
from dataclasses import asdict, fields

import pandas as pd

from papertrail import records
from study import checks
from study.preset import evaluation_sources, lineage, measured_on
from threefold.data import corpus, exclusion
from threefold.data.tokenizer import build_tokenizer, tokenizer_hash

checks.check(stage.preset, stage.run.data_dir)
folder = stage.begin()
model_config, sources = stage.preset.model, stage.config

# %% [markdown]
# ## Overlap with the evaluation sets
#
# A model must not be trained on what it is measured by. Every training text is searched for runs of words that an evaluation
# set holds [Brown et al. 2020, appendix C], and for whole lines and questions of it, on lower-case letters and digits. Runs
# that many documents of a source hold are templates and count for nothing. What is found is taken out before anything is
# trained, the tokenizer included: the lines of an article, single reviews, otherwise the whole item.

# %%
#| label: tbl-overlap
#| tbl-cap: "Training text against the evaluation sets: documents that share a run of words / a whole line or question with each set, and what was removed (lines of articles, single reviews, or whole items). Templates are runs that too many documents of the source hold to be evidence."
exclude = exclusion.Exclusion(stage.preset.overlap, measured_on(stage.preset), stage.run.data_dir)
searched = [
    {"use": use, **exclude.describe(source)} for use in ("pretrain", "sft", "dpo") for source in getattr(sources, use)
]
setting = stage.preset.overlap
columns = {
    "use": "used for",
    "name": "source",
    "documents": "documents",
    "words": "words",
    "found": f"documents found by {setting.ngram}-gram / line of {setting.line} words or question",
    "templates": "templates",
    "documents_found": "documents found",
    "parts_removed": "parts removed",
    "words_removed": "words removed",
}
records.publish(
    "data/overlap",
    {"setting": asdict(setting), "sets": list(exclude.sets), "sources": searched},
    markdown=records.table(searched, columns),
)

# %% [markdown]
# ## Tokenizer
#
# A byte-level BPE, learned on this preset's own pretraining text or GPT-2's. The *sink* is its BOS token: one reserved
# vocabulary row that comes before every sequence and is never a target. The tokenizer puts it there by itself, so that any
# tool that follows the tokenizer runs the model as it was trained.

# %%
#| label: tbl-tokenizer
#| tbl-cap: "The tokenizer. Bytes per token are measured on the held-out pretraining text."
tokenizer = build_tokenizer(
    stage.preset.tokenizer,
    corpus.mixture_texts(sources.pretrain, stage.run.data_dir, exclude),
    sinks=model_config.sinks,
    data_dir=stage.run.data_dir,
    context=model_config.context,
)
checks.check_evaluations(stage.preset, tokenizer, stage.run.data_dir)  # before the hours of training
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
# Everything the run trains on or is measured by. Words and bytes are those of the text as pretraining would read it, of
# training text after removal.

# %%
#| label: tbl-sources
#| tbl-cap: "Every source that the run reads, with its licence and size. The pinned revisions and content hashes are in the record."
uses = {entry.name.replace("_heldout", ", held out"): getattr(sources, entry.name) for entry in fields(sources)}
uses |= {
    f"evaluation: {name.replace('_', ' ')}": (source,) for name, source in evaluation_sources(stage.preset).items()
}
trained_on = dict.fromkeys(("pretrain", "sft", "dpo"), exclude)

described = [
    {"use": use, **corpus.describe(source, stage.run.data_dir, tokenizer, trained_on.get(use))}
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

# %%
#| label: tbl-files
#| tbl-cap: "The files that each source was read from, the files in the same folder that were not read, and the rows left out because nothing can be learned from them. A source of the Hugging Face Hub has a revision instead of files."
read = [
    {
        "used for": part["use"],
        "source": part["name"],
        "split": part["split"],
        "files": "; ".join(part["files"]) or f"revision {part['revision'][:12]}",
        "files left out": "; ".join(part["left_out"]) or None,
        "rows left out": "; ".join(f"{reason}: {count:,}" for reason, count in part["odd_rows"].items()) or None,
    }
    for part in described
]
records.publish("data/files", {"files": read}, markdown=records.table(read))
own = {(part["name"], part["split"]): part for part in described if part["kind"] == "own"}
for (name, split), part in own.items():
    print(f"{name!r}, split {split!r}: read {part['files']}; left out {part['left_out'] or 'none'}")

# %% [markdown]
# ## Rows
#
# Documents are packed into rows of the model's context. Each document sees its own past and the sink, nothing else, and its
# positions restart after the sink: a packed token is computed exactly as an unpacked one. Tokens are counted without padding.

# %%
pack = {"pretrain": corpus.pretraining_rows, "sft": corpus.example_rows, "dpo": corpus.preference_rows}
packed = {
    name: pack[name](getattr(sources, name), tokenizer, model_config, stage.run.data_dir, exclude)
    for name in lineage(stage.preset)
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
pd.set_option("display.html.use_mathjax", False)  # text is text: no $...$ of it is mathematics
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
# What a model is asked and taught, as it is in the rows.

# %%
shown = []
for use in lineage(stage.preset)[1:]:
    prompt, response = next(corpus.examples(getattr(sources, use)[0], stage.run.data_dir))
    shown.append({"used for": use, "prompt": prompt, "response": response})
pd.set_option("display.max_colwidth", 600)
pd.DataFrame(shown)

# %%
records.publish("stage/data", stage.finish())
