"""The model card: README.md in a checkpoint's folder, in the form that the Hugging Face hub reads. Its text is card.md.

It is made from what the run recorded of this stage and its ancestors and from the registry of data sources. It holds
no time and no path, so that the same training writes the same bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
from huggingface_hub import ModelCardData

from basics.files import atomic_write, sha256_file
from basics.names import replicate_of
from papertrail import records
from papertrail.plan import ancestors
from papertrail.run import read_run_file
from study.chat import forms
from study.preset import TRAINED, section, to_dict
from study.run import Stage
from threefold.data.registry import registry
from threefold.data.templates import FORMS
from threefold.model import hf
from threefold.training import TrainResult

# The hub's names of the licences in data/sources.toml; any other licence is "other" there.
LICENCES = {"CC0 1.0": "cc0-1.0", "CC BY-SA 3.0": "cc-by-sa-3.0", "CC BY-NC 4.0": "cc-by-nc-4.0", "MIT": "mit"}
UNKNOWN = "not known: own files"
OBJECTIVES = {
    "pretrain": "cross-entropy of the next token",
    "gpt2": "cross-entropy of the next token, with GPT-2's parts",
    "gpt2-adamw": "cross-entropy of the next token, with GPT-2's parts, by AdamW",
    "distilgpt2": "distillation from gpt2 at half its depth (Sanh et al. 2019)",
    "sft": "cross-entropy of the response alone",
    "dpo": "direct preference optimisation against the SFT checkpoint (Rafailov et al. 2023)",
}
LOAD_OWN = """\
from threefold.model import load_checkpoint

model = load_checkpoint("THIS_FOLDER")
"""
LOAD_STANDARD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
"""


def write_card(stage: Stage, result: TrainResult) -> str:
    """Write the card of the checkpoint in the stage's work folder and return it. Call it before `stage.finish`, which
    hashes the folder's files."""
    folder, plan = stage.partial, stage.run.plan
    own = {**read_run_file(folder), "tokens": result.tokens, "weights_sha256": sha256_file(folder / hf.WEIGHTS)}
    needed = ancestors(plan, stage.name)
    before = [name for name in plan if name in needed and replicate_of(name)[0] in TRAINED]
    card = _card(stage, result, [*map(stage.run.require, before), own])
    atomic_write(folder / hf.CARD, card)
    return card


def _card(stage: Stage, result: TrainResult, lineage: list[Mapping[str, Any]]) -> str:
    """lineage: run.json of every training that this one builds on, the first one first, and of this one."""
    config = hf.read_config(stage.partial)
    kind = hf.architecture(config)
    used = _data(lineage)
    sections = {"model": asdict(config), section(stage.model): to_dict(stage.config)}
    trained = [
        {
            "stage": facts["stage"],
            "objective": OBJECTIVES[replicate_of(facts["fingerprint"]["stage"])[0]],
            "tokens": facts["tokens"],
            "seed": str(facts["fingerprint"]["seed"]),
            "weights (SHA-256)": facts["weights_sha256"],
        }
        for facts in lineage
    ]
    restricted = dict.fromkeys(row["source"] for row in used if "NC" in row["licence"] or "research" in row["licence"])
    names = records.escape(", ".join(restricted))
    warning = f"**Not for commercial use**: {names} came for non-commercial or research use only.\n"
    cleaned = all(facts["fingerprint"]["config"].get("overlap", {}).get("remove") for facts in lineage)
    own = kind == hf.OWN
    template = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return template.format(
        **{"stage": stage, "config": config, "result": result, "facts": lineage[-1]},
        front=_front(stage, kind, used),
        title=records.escape(f"{stage.run.name}/{stage.name}"),
        kind="a mixture of parts that no standard class holds" if own else f"`{kind}` of transformers",
        trained=records.table(trained),
        used=records.table(used),
        warning=warning if restricted else "",
        overlap="searched for and left out" if cleaned else "not left out everywhere",
        sections=tomli_w.dumps(sections),
        prompts=_prompts(stage),
        use=LOAD_OWN if own else LOAD_STANDARD,
    )


def _prompts(stage: Stage) -> str:
    """How to ask the model, as in its training data."""
    taught = forms(stage.preset, stage.name)
    if taught == ["text"]:
        return "It continues text; it was not taught to answer.\n"
    shown = "".join(f"- {form}: `{json.dumps(FORMS[form].prompt('MESSAGE'))}`\n" for form in taught)
    return f"Your question takes the place of MESSAGE; the answer follows. `\\n` is the end of a line.\n\n{shown}"


def _front(stage: Stage, kind: str, used: list[dict[str, str]]) -> str:
    """The YAML that the hub reads. No base_model: it must name a repository of the hub, and the parent is in none."""
    licences = {LICENCES.get(row["licence"]) for row in used}
    known = len(licences) == 1 and None not in licences
    return ModelCardData(
        language=None if any(row["licence"] == UNKNOWN for row in used) else "en",
        license=licences.pop() if known else "other",
        license_name=None if known else "see-data-and-licences",
        library_name="threefold" if kind == hf.OWN else "transformers",
        pipeline_tag="text-generation",
        tags=["threefold", stage.model],
        datasets=sorted({entry.hub for row in used if (entry := registry().get(row["source"])) and entry.hub}) or None,
    ).to_yaml()


def _data(lineage: list[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row for each source and split that a training of the lineage read, according to its fingerprint, and one for
    a tokenizer from elsewhere."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for facts in lineage:
        for part, sources in facts["fingerprint"]["config"]["data"].items():
            for source in () if part.endswith("_heldout") else sources:
                name = source["source"] or source["path"].rstrip("/").rpartition("/")[2]  # no path of this machine
                licence = registry()[source["source"]].licence if source["source"] else UNKNOWN
                rows.setdefault((name, source["split"], licence), []).append(facts["stage"])
    if lineage[0]["fingerprint"]["config"].get("tokenizer", {}).get("kind") == "gpt2":
        rows["gpt2-bpe", "all", registry()["gpt2-bpe"].licence] = ["the tokenizer"]
    return [
        {"source": name, "split": split, "used by": ", ".join(dict.fromkeys(used)), "licence": licence}
        for (name, split, licence), used in rows.items()
    ]
