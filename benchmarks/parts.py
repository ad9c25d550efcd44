"""The parts of the benchmark: the contestants of each by name, ours first, and the targets."""

from dataclasses import dataclass, field, replace

OURS = "threefold"


@dataclass(frozen=True)
class Part:
    """contestants: name -> "module:class" under `benchmarks`, each in a process of its own.

    measures: what one round times, by name, and its unit. least: targets: the ratio of our speed to a contestant's, by
    (contestant, measure), and our share of a limit, by (limit, FLOPs counted). tolerance: the largest relative
    difference between the contestants' results, which are compared before anything is timed. limits: the contestants
    that measure the machine's limit and are not peers. data: "sample" where a part is measured on the embedded sample
    whatever other data there are. note: a sentence for its page.
    """

    title: str
    contestants: dict[str, str]
    measures: dict[str, str]
    rounds: int
    least: dict[tuple[str, str], float] = field(default_factory=dict)
    tolerance: float = 1e-4
    limits: tuple[str, ...] = ()
    data: str = ""
    note: str = ""


EAGER, COMPILED = "transformers, bf16", "transformers, bf16, compiled"
TRL = "TRL, bf16, no recompute"

PARTS = {
    "pretrain": Part(
        "Pretraining",
        {
            OURS: "training:OurPretraining",
            EAGER: "training:PlainLoop",
            COMPILED: "training:CompiledLoop",
            "transformers Trainer, bf16": "training:TransformersTrainer",
            "matmul, bf16": "limit:HalfMatmul",
            "matmul, fp32": "limit:SingleMatmul",
        },
        {"train": "tokens/s", "matmul": "GFLOP/s"},
        rounds=9,
        note="The stories follow each other in one stream: all rows are full, and there is no padding.",
        least={(EAGER, "train"): 1.8, (COMPILED, "train"): 1.4, ("matmul, bf16", "6N"): 0.28},
        limits=("matmul, bf16", "matmul, fp32"),
    ),
    "sft": Part(
        "Supervised fine-tuning",
        {
            OURS: "training:OurFineTuning",
            TRL: "training:TrlFineTuning",
            f"{TRL}, grouped by length": "training:TrlFineTuningGrouped",
            f"{TRL}, packed": "training:TrlFineTuningPacked",
            f"{TRL}, padding-free": "training:TrlFineTuningPaddingFree",
            "TRL, its defaults": "training:TrlFineTuningDefault",
        },
        {"train": "examples/s"},
        rounds=7,
        least={(TRL, "train"): 8.0},
    ),
    "dpo": Part(
        "Direct preference optimisation",
        {
            OURS: "training:OurPreferences",
            f"{TRL}, precomputed reference": "training:TrlPreferences",
            "TRL, its defaults": "training:TrlPreferencesDefault",
        },
        {"train": "pairs/s", "reference": "pairs/s"},
        rounds=7,
        least={(f"{TRL}, precomputed reference", "train"): 8.0},
        tolerance=2e-4,
        note="TRL's DPO has no mode without padding: it refuses `padding_free` in its version here.",
    ),
    "scoring": Part(
        "Few-shot scoring",
        {
            OURS: "evaluation:OurScoring",
            "transformers, batched": "evaluation:TransformersScoring",
            "lm-eval": "evaluation:HarnessScoring",
        },
        {"score": "examples/s"},
        rounds=7,
        least={("transformers, batched", "score"): 10.0},
        tolerance=1e-3,
    ),
    "generation": Part(
        "Batched generation",
        {OURS: "evaluation:OurGeneration", "transformers generate": "evaluation:TransformersGeneration"},
        dict.fromkeys(("fp32", "bf16", "few-shot, fp32", "few-shot, bf16"), "tokens/s"),
        rounds=7,
        least={
            ("transformers generate", f"{shots}{dtype}"): least
            for shots, least in (("", 1.6), ("few-shot, ", 3.0))
            for dtype in ("fp32", "bf16")
        },
        tolerance=0.0,
    ),
    "smoke": Part(
        "The whole smoke run",
        {OURS: "smoke:SmokeRun"},
        {"run": "runs/s"},
        rounds=1,
        note="Data: the embedded sample, as preset `smoke` reads it.",
    ),
}
for name in ("sft", "dpo"):
    PARTS[f"{name}-sample"] = replace(PARTS[name], title=f"{PARTS[name].title}, embedded sample", data="sample")
