"""A fake finished run: executed notebooks with records, checkpoints, run.json and per-item results, made in a
second."""

import hashlib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from basics import files
from papertrail import records
from papertrail.run import Run
from threefold.evaluation import statistics

MODELS = ("random", "gpt2", "distilgpt2", "pretrain", "sft", "dpo")
NOTEBOOKS = {
    "data": "00_data",
    "pretrain": "01_pretrain",
    "gpt2": "01_pretrain-gpt2",
    "distilgpt2": "01_pretrain-distilgpt2",
    "sft": "02_sft",
    "dpo": "03_dpo",
    "ablations": "05_ablations",
}
CONFIG = {
    "n_layer": 4, "d_model": 128, "n_head": 4, "n_kv_head": -1, "d_ff": 344, "context": 256, "vocab_size": 2048,
    "norm": "rms", "ffn": "swiglu", "position": "rope", "sinks": 1, "qk_norm": False, "bias": False, "tie_embeddings":
    True,
}  # fmt: skip
GPT2 = CONFIG | {"norm": "layer", "ffn": "gelu", "position": "learned", "sinks": 0, "bias": True, "d_ff": 512}
PARAMETERS = {"embeddings": 262144, "attention": 262144, "ffn": 528384, "norms": 1152, "positions": 0, "total": 1053824}
# Nats per token, and shares correct: minimal pairs, sentiment, problems, instructions, preferences.
SKILL = {
    "random": (7.60, 0.50, 0.50, 0.0, 0.0, 0.50),
    "gpt2": (2.30, 0.62, 0.80, 0.02, 0.0, 0.55),
    "distilgpt2": (2.55, 0.60, 0.72, 0.01, 0.0, 0.54),
    "pretrain": (2.10, 0.66, 0.90, 0.03, 0.01, 0.56),
    "sft": (2.20, 0.66, 0.91, 0.92, 0.75, 0.70),
    "dpo": (2.22, 0.65, 0.91, 0.91, 0.74, 0.90),
}


def output(name: str, values: dict, markdown: str | None = None, **options):
    """One display output as `records.publish` makes it."""
    data, metadata = records.bundle(name, values, markdown=markdown, **options)
    return nbformat.v4.new_output("display_data", data=data, metadata=metadata)


def cell(source: str, *outputs):
    made = nbformat.v4.new_code_cell(source)
    made.outputs = list(outputs)
    return made


def notebook(path: Path, *cells) -> Path:
    made = nbformat.v4.new_notebook(cells=list(cells))
    made.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, path)
    return path


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metric(interval, unit: str) -> dict:
    value, low, high, n = interval
    return {"value": float(value), "low": low, "high": high, "n": n, "unit": unit, "interval": "test"}


def _share(correct, unit="accuracy") -> dict:
    return _metric(statistics.wilson(float(np.sum(correct)), len(correct)), unit)


def evaluations(
    model: str, skill, reference: float, *, source: str = "sample", n: int = 300, seed: int = 0, tokenizer: str = "bpe"
) -> dict:
    """protocol -> (metrics, items, settings) of one model; items are the same for all models, answers depend on
    `seed`. reference: SFT's skill in preferences."""
    world, generator = np.random.default_rng(7), np.random.default_rng(seed)
    nats, pairs, sentiment, problems, instructions, preferences = skill
    settings = {
        "version": 1, "parameters": PARAMETERS["total"], "precision": "float32", "context": 256, "vocabulary": 2048,
        "tokenizer_sha256": sha(tokenizer),
        "data": {"source": f"{source}-text", "split": "test", "subsampled": source != "sample", "examples": 40},
    }  # fmt: skip
    found = {}
    tokens = world.integers(200, 900, 40)
    hard = world.normal(0, 0.1, 40)
    for protocol, extra in (("disjoint-256", 0.0), ("stride-128", -0.1), ("lines-100", 0.4)):
        loss = nats + extra + hard + generator.normal(0, 0.01, 40)
        items = pd.DataFrame({"document": np.arange(40), "nats": loss * tokens, "tokens": tokens, "bytes": 4 * tokens})
        options = {"resamples": 500}
        metrics = {
            "perplexity": _metric(
                statistics.bootstrap_ratio(items.nats, items.tokens, transform=np.exp, **options),
                "perplexity per token",
            ),
            "bits_per_byte": _metric(
                statistics.bootstrap_ratio(items.nats, items.bytes, transform=lambda x: x / np.log(2), **options),
                "bits per byte",
            ),
        }
        if protocol == "lines-100":
            metrics["word_perplexity"] = _metric((np.exp(1.3 * nats), None, None, 40), "perplexity per word")
        found[f"{source}-text/{protocol}"] = (metrics, items, settings | {"documents": 40})
    difficulty = world.random(n)
    correct = np.where(difficulty + generator.normal(0, 0.1, n) < pairs, 1.0, 0.0)
    items = pd.DataFrame({"item": np.arange(n), "phenomenon": np.arange(n) % 20, "correct": correct})
    found[f"{source}-grammar/minimal-pairs"] = ({"accuracy": _share(correct)}, items, settings | {"pairs": n})
    labels = world.integers(0, 2, n)
    for shots in (0, 3):
        frames = []
        for place, template in enumerate(("lm-eval", "review", "movie")):
            for draw in range(1 if shots == 0 else 2):
                level = max(0.5, sentiment - 0.04 * place) if model != "random" else 0.5
                correct = difficulty + generator.normal(0, 0.05, n) < level
                frames.append(
                    pd.DataFrame(
                        {"item": np.arange(n), "template": template, "draw": draw, "label": labels, "correct": correct}
                    )
                )
        items = pd.concat(frames, ignore_index=True)
        items["correct_calibrated"] = items["correct"]  # as if no label were preferred
        by_template = items.groupby("template").correct.mean()
        first = items[items.template == "lm-eval"].groupby("item").correct.mean()
        accuracy = _metric(statistics.bootstrap_ratio(first, resamples=500), "accuracy")
        metrics = {
            **dict.fromkeys(("accuracy", "accuracy_calibrated"), accuracy),
            "accuracy_mean": _metric(
                statistics.bootstrap_ratio(items.correct, clusters=items.item, resamples=500), "accuracy"
            ),
            "template_spread": _metric((by_template.std(), None, None, 3), "sd of accuracy over templates"),
            "template_lowest": _metric((by_template.min(), None, None, n), "accuracy"),
            "template_highest": _metric((by_template.max(), None, None, n), "accuracy"),
        }
        found[f"{source}-sentiment/{shots}-shot"] = (metrics, items, settings | {"items": n, "majority_accuracy": 0.51})
    found[f"{source}-sentiment/precedent-3-shot"] = ({"accuracy": _share(first[:200])}, items[:200], settings)
    correct = difficulty + generator.normal(0, 0.02, n) < problems
    items = pd.DataFrame({"item": np.arange(n), "correct": correct})
    metrics = {"exact_match": _share(correct, "exact match"), "flexible_match": _share(correct, "exact match")}
    metrics["invalid"] = _share(~correct, "share of items")
    found[f"{source}-problems/5-shot"] = (metrics, items, settings | {"items": n})
    answered = pd.array([bool(x) for x in difficulty[:100] < instructions] + [None] * (n - 100), dtype="boolean")
    reply = world.integers(5, 30, n)
    items = pd.DataFrame({"item": np.arange(n), "nats": reply * (0.5 * nats), "tokens": reply, "correct": answered})
    metrics = {
        "response_loss": _metric(statistics.bootstrap_ratio(items.nats, items.tokens, resamples=500), "nats per token"),
        "exact_match": _share(difficulty[:100] < instructions, "exact match"),
    }
    found[f"{source}-instructions/responses"] = (metrics, items, settings | {"items": n})
    correct = np.where(difficulty + generator.normal(0, 0.1, n) < preferences, 1.0, 0.0)
    items = pd.DataFrame({"item": np.arange(n), "correct": correct})
    metrics = {"accuracy": _share(correct)}
    if model in ("sft", "dpo"):  # its own reference: every reward is zero, every pair a tie
        margin = np.zeros(n)
        if preferences != reference:
            margin = 5 * (preferences - reference) + generator.normal(0, 0.5, n)
        items["reward_margin"], items["reward_correct"] = margin, 0.5 + 0.5 * np.sign(margin)
        metrics["reward_margin"] = _metric(statistics.bootstrap_ratio(margin, resamples=500), "nats times beta")
        metrics["reward_accuracy"] = _share(items.reward_correct)
        metrics["kl"] = _metric((0.0 if model == "sft" else 0.05, None, None, n), "nats per token")
    found[f"{source}-preferences/preferences"] = (metrics, items, settings | {"pairs": n})
    rows = [
        {"repeat": r, "batch": b, "phase": phase, "tokens_per_second": rate * b * (1 + 0.01 * r)}
        for r in range(5)
        for b in (1, 8)
        for phase, rate in (("prefill", 9000.0), ("decode", 250.0 if model != "distilgpt2" else 480.0))
    ]
    items = pd.DataFrame(rows)
    metrics = {}
    for (phase, batch), group in items.groupby(["phase", "batch"], sort=False):
        low, value, high = np.quantile(group.tokens_per_second, [0.25, 0.5, 0.75])
        metrics[f"{phase}_b{batch}"] = _metric((value, float(low), float(high), 5), "tokens per second")
    others = [one for one in MODELS if one != model]
    found["speed"] = (
        metrics,
        items,
        {"version": 1, "measured_by_turns_with": others, "parameters": PARAMETERS["total"]},
    )
    return found


PARENTS = {"pretrain": "data", "gpt2": "data", "distilgpt2": "gpt2", "sft": "pretrain", "dpo": "sft"}
OPTIMIZERS = {"pretrain": "muon", "sft": "muon"}


def stage_values(stage: str, weights: str | None, tokens: int | None = None, sources=("sample-text",)) -> dict:
    model, _, suffix = stage.partition("-seed")
    parent = PARENTS.get(model)
    recipe = {
        "optimizer": OPTIMIZERS.get(model, "adamw"), "learning_rate": 0.003, "muon_learning_rate": 0.02, "steps": 100
    }  # fmt: skip
    return {
        "stage": stage,
        "fingerprint": {
            "digest": sha(f"fingerprint {stage}"),
            "stage": stage,
            "config": {
                "data": {stage: [{"source": name, "split": "train"} for name in sources]},
                model.replace("-", "_"): recipe,
            },
            "parents": {f"{parent}-seed{suffix}" if suffix and parent != "data" else parent: "x"} if parent else {},
        },
        "training": {"note": "CPU, 1 threads; fp32, as asked for; not compiled", "steps": 100},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "hardware": {"cpu": "Test CPU", "cores": 2, "memory_gib": 8.0, "gpu": []},
        "wall_seconds": 31.5,
        "device_seconds": 30.0 if tokens else None,
        "tokens": tokens,
        "outputs": {"model.safetensors": weights} if weights else {},
        "weights_sha256": weights,
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:31+00:00",
    }


def make_run(
    folder: Path,
    *,
    skills: dict | None = None,
    source: str = "sample",
    seeds: dict[str, int] | None = None,
    hub: tuple[str, ...] = (),
    ablations: bool = True,
    tokenizers: dict[str, str] | None = None,
    replicates: tuple[dict, ...] = (),
    extra: tuple[str, ...] = (),
) -> Path:
    """Write a whole run to `folder` and return it.

    skills: as SKILL, to change what models can do. seeds: noise of each model's answers; equal seeds and skills make
    equal results. hub: baselines without a stage of their own. tokenizers: for models that have another one.
    replicates: skills of pretrain, sft and dpo in each further training, from replicate 2 on. extra: further baselines
    that are trained here, each as good as GPT-2.
    """
    skills = SKILL | dict.fromkeys(extra, SKILL["gpt2"]) | (skills or {})
    every = (*MODELS, *extra)
    notebooks = folder / "notebooks"
    small = "| a | b |\n|---|---|\n| 1 | 2 |"
    head = "#| label: tbl-{0}\n#| tbl-cap: The {0}.\nshow()"
    data_cells = [
        cell(head.format("sources"), output("data/sources", {"rows": []}, small)),
        cell(head.format("overlap"), output("data/overlap", {"sources": []}, small)),
        cell(head.format("tokenizer"), output("tokenizer", {"kind": "train"}, small)),
        cell("finish()", output("stage/data", stage_values("data", None), "done")),
    ]
    notebook(notebooks / "00_data.ipynb", *data_cells)
    steps = np.arange(1, 101)
    lineage = ("pretrain", "sft", "dpo")
    again = [(model, place) for place, _ in enumerate(replicates, 2) for model in lineage]
    for model, place in [*((one, 1) for one in ("pretrain", "gpt2", "distilgpt2", "sft", "dpo", *extra)), *again]:
        if model in hub:
            continue
        stage, suffix = (model, "") if place == 1 else (f"{model}-seed{place}", f"-seed{place}")
        home = folder / model if place == 1 else folder / "seeds" / str(place) / model
        weights = f"weights of {stage}"
        home.mkdir(parents=True, exist_ok=True)
        (home / "model.safetensors").write_text(weights)
        values = stage_values(stage, sha(weights), 400_000 if model in ("sft", "dpo") else 2_500_000)
        values["fingerprint"]["seed"] = 1336 + place
        files.write_note(home / "run.json", values)
        start, end = (0.69, 0.40) if model == "dpo" else (7.5, skills[model][0])
        loss = end + (start - end) * np.exp(-steps / 15) + np.random.default_rng(3).normal(0, 0.02, 100)
        curve = {
            "step": steps.tolist(), "tokens": (steps * values["tokens"] // 100).tolist(), "loss": loss.tolist(),
            "lr": [0.003] * 100, "heldout": {"step": [1, 100], "loss": [start, end]},
        }  # fmt: skip
        config = CONFIG if model in lineage else GPT2
        notebook(
            notebooks / f"{NOTEBOOKS.get(model, f'01_pretrain-{model}')}{suffix}.ipynb",
            cell("model()", output(f"model/{stage}", {"parameters": PARAMETERS, "config": config}, "model")),
            cell("curve()", output(f"curve/{stage}", curve, "curve")),
            cell("finish()", output(f"stage/{stage}", values, "done")),
        )
    speed_cells: list = []
    for model, place in [*((one, 1) for one in every), *again]:
        index = every.index(model) + 100 * (place - 1)
        noise, tokenizer = (seeds or {}).get(model, index), (tokenizers or {}).get(model, "bpe")
        level = skills if place == 1 else replicates[place - 2]
        skill = level[model]
        found = evaluations(model, skill, level["sft"][-1], source=source, seed=noise, tokenizer=tokenizer)
        subject = model if place == 1 else f"{model}-seed{place}"
        home = folder if place == 1 else folder / "seeds" / str(place)
        cells = []
        if place > 1:
            del found["speed"]
        for protocol, (metrics, items, settings) in found.items():
            timed = protocol == "speed"
            items_folder = home / (f"speed/items/{model}" if timed else f"evaluation/{model}/items")
            items_folder.mkdir(parents=True, exist_ok=True)
            file = items_folder / f"{protocol.replace('/', '_')}.parquet"
            items.to_parquet(file, index=False)
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            values = {
                "model": subject, "protocol": protocol, "weights_sha256": sha(f"weights of {subject}"),
                "metrics": metrics,
                "settings": settings,
                "items": {"file": file.name, "sha256": content, "rows": len(items)},
            }  # fmt: skip
            name = f"speed/{subject}" if timed else f"evaluation/{subject}/{protocol}"
            (speed_cells if timed else cells).append(cell("evaluate()", output(name, values, "evaluated")))
        if place == 1:
            shown = {"prompts": ["The old", "A <b>"], "texts": [f" miller of\n{model}", ""]}
            shown["weights_sha256"] = sha(f"weights of {subject}")
            cells.append(cell("go_on()", output(f"continuations/{subject}", shown, "x")))
        notebook(notebooks / f"04_evaluate-{subject}.ipynb", *cells)
    notebook(notebooks / "04_speed.ipynb", *speed_cells)
    if ablations:
        generator = np.random.default_rng(4)
        round_noise = np.exp(generator.normal(0, 0.05, 9))  # a slow round is slow for all

        def ablation(variant, losses, speed, d_ff=768):
            rates = 9000 * speed * round_noise * np.exp(generator.normal(0, 0.0002, 9))
            step_seconds = {"preset": (4096 / rates).tolist(), "ablation": (1024 / rates).tolist()}
            curves = [{"tokens": [0, 1e5, 2e5, 4e5], "loss": [8.0, x + 0.9, x + 0.4, x]} for x in losses]
            return {
                "variant": variant, "heldout_loss": losses, "seeds": [1, 2, 3], "curves": curves,
                "parameters": 1_400_000, "d_ff": d_ff,
                "tokens_per_second": rates.tolist(), "step_seconds": step_seconds,
            }  # fmt: skip

        base = ablation("base", [2.10, 2.12, 2.11], 1.0)
        layer = ablation("norm=layer", [2.101, 2.119, 2.112], 1 / 1.024)
        gelu = ablation("ffn=gelu", [2.18, 2.205, 2.19], 1.03, 1152)
        cells = [
            cell("ablate()", output(f"ablation/{v['variant'].replace('=', '-')}", v, "x")) for v in (base, layer, gelu)
        ]
        seconds = {"RMSNorm": [0.002] * 6, "LayerNorm": [0.003] * 6}
        timing = {"part": "norm", "positions": 8, "parameters": dict.fromkeys(seconds, 1024), "seconds": seconds}
        cells.append(cell("kernels()", output("kernels", {"timings": [timing]}, "x")))
        for variant, values in length_curves().items():
            cells.append(cell("read()", output(f"length/{variant.replace('=', '-')}", values, "x")))
        cells.append(cell("look()", output("attention/sinks", {"variants": sink_shares()}, "x")))
        notebook(notebooks / "05_ablations.ipynb", *cells)
    return folder


def seal(run: Run) -> Run:
    """Give every executed notebook of a fake run the run.json that vouches for it."""
    for stage, spec in run.plan.items():
        if run.notebook(spec.executed).is_file():
            facts = run.finished(stage) or {"stage": stage, "fingerprint": {}, "outputs": {}}
            run.stage_folder(stage).mkdir(parents=True, exist_ok=True)
            files.write_note(run.stage_folder(stage) / "run.json", facts)
            run.seal(stage)
    return run


LENGTH_MODES = {"full": 1.5, "window": 0.4, "sinks": 0.02, "recomputed": 0.05}  # rise past the training length


def length_curves(
    rises: dict[str, float] | None = None, *, noise: float = 0.01, seeds: int = 3, streams: int = 4
) -> dict:
    """Values of the records `length/<variant>`, by variant: flat within the context of 64, up by `rises` past it."""
    rises = LENGTH_MODES | (rises or {})
    edges = [0, 8, 16, 32, 64, 128, 256, 512, 1024]
    generator = np.random.default_rng(5)
    text_N = generator.normal(0, 0.2, streams)  # a hard stream is hard in every mode
    made = {}
    for variant, position, sinks in (
        ("base", "rope", 1), ("sinks=0", "rope", 0), ("position=learned", "learned", 1), ("position=none", "none", 1)
    ):  # fmt: skip
        nats = {}
        for mode in ("full", "recomputed") if position == "learned" else LENGTH_MODES:
            past = 4 if position == "learned" and mode == "full" else 8  # buckets that have a prediction
            level_B = 3.0 + np.where(np.arange(8) >= 4, rises[mode], 0.0)[:past]
            nats[mode] = {
                str(1337 + seed): (level_B + text_N[:, None] + generator.normal(0, noise, (streams, past))).tolist()
                for seed in range(seeds)
            }
        facts = {"version": 1, "position": position, "sinks": sinks, "context": 64, "factor": 16, "streams": streams}
        made[variant] = {"variant": variant, **facts, "edges": edges, "nats": nats}
    return made


def sink_shares() -> dict:
    """Values of the variants in the record `attention/sinks`."""
    share_LH = np.linspace(0.1, 0.7, 16).reshape(4, 4)
    return {
        name: {
            "sinks": sinks, "share": (share_LH * scale).tolist(), "means": {"1337": 0.4 * scale}, "uniform": 0.02,
            "rows": 4, "positions": 64,
        }
        for name, sinks, scale in (("base", 1, 1.0), ("sinks=0", 0, 0.5), ("sinks=4", 4, 1.2))
    }  # fmt: skip


def execute_compare(run: Path, script: Path) -> Path:
    """Execute the percent script of 06_compare against a fake run without a kernel, and write the executed notebook."""
    import jupytext

    from study.comparison import Comparison
    from study.comparison import results as comparison_results

    source = jupytext.read(script)
    shown: list = []

    def publish(name, values, **options):
        shown.append(output(name, values, **options))

    class Stage:
        class run:
            name = "fake"

        class preset:
            name, notice, description, price_per_hour = "smoke", "A fake run.", "", -1

    namespace = {"comparison": Comparison.load(run), "stage": Stage}
    opening = next(entry.source for entry in source.cells if entry.source.startswith("from papertrail import records"))
    exec(opening.partition("stage.begin()")[0], namespace)
    original, comparison_results.records.publish = comparison_results.records.publish, publish
    try:
        for entry in source.cells:
            if entry.cell_type != "code":
                continue
            entry.outputs = []
            if ".publish()" in entry.source:
                shown.clear()
                exec(entry.source, namespace)
                entry.outputs = list(shown)
    finally:
        comparison_results.records.publish = original
    path = run / "notebooks" / "06_compare.ipynb"
    notebook(path, *source.cells)
    return path
