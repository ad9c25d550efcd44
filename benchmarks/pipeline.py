"""How long the preset `full` takes on several GPUs and what it costs, by calculation; nothing was measured on a GPU.

`benchmarks.scale` prints the tables. Every figure is counted from the preset and the code (tokens, steps, bytes,
operations), measured on a CPU, taken from a data sheet, or assumed; `KNOWN` says which, and `Card` holds data sheets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.cost import Device, Model, step
from study.preset import ablation_base, load_preset
from threefold.config import ModelConfig
from threefold.model.decoder import parameter_counts

VOCABULARY = 50258  # GPT-2's and a sink


@dataclass(frozen=True)
class Card:
    """By its data sheet: dense bf16 (0: none) and fp32 operations/s, bytes/s and bytes of memory; USD an hour is what
    renting it is taken to cost."""

    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    price: float
    count: int = 1

    @property
    def training(self) -> float:
        """Operations/s of a training step with everything in it."""
        return KNOWN["training, bf16"][0] * self.bf16 or KNOWN["training, fp32"][0] * self.fp32

    def forward(self, half: bool = True) -> float:
        """Operations/s of scoring, in batches of rows of several lengths."""
        if half and self.bf16:
            return KNOWN["scoring, bf16"][0] * self.bf16
        return KNOWN["scoring, fp32"][0] * self.fp32

    @property
    def reading(self) -> float:
        return KNOWN["memory"][0] * self.bandwidth


CARDS = {
    "H100": Card(989e12, 67e12, 3.35e12, 80e9, 3.00),
    "A100": Card(312e12, 19.5e12, 2.04e12, 80e9, 1.80),
    "RTX 4090": Card(165e12, 82.6e12, 1.01e12, 24e9, 0.50),
    "RTX 3060": Card(25.6e12, 12.7e12, 0.36e12, 12e9, 0.15),
    "T4": Card(0.0, 8.1e12, 0.32e12, 16e9, 0.35),
    "8 x H100": Card(989e12, 67e12, 3.35e12, 80e9, 24.00, count=8),
}
NVLINK = 0.8 * 450e9  # bytes/s in each direction, 80% of the data sheet

ASSUMED, PUBLISHED = "assumed", "published runs of this size reach it on H100s; assumed for other cards"
COUNTED = "counted in the data set with GPT-2's tokenizer"
KNOWN: dict[str, tuple[float, str, str]] = {  # name: (value, unit, source)
    "training, bf16": (0.42, "of the data sheet's operations/s", PUBLISHED),
    "training, fp32": (0.60, "of the data sheet's operations/s", ASSUMED),
    "scoring, bf16": (0.25, "of the data sheet's operations/s", ASSUMED),
    "scoring, fp32": (0.50, "of the data sheet's operations/s", ASSUMED),
    "memory": (0.80, "of the data sheet's bytes/s", ASSUMED),
    "compile, whole": (60, "s a graph of 12 layers", ASSUMED),
    "compile, block": (12, "s a graph of a block", ASSUMED),
    "kernel": (2e-6, "s a kernel of a captured graph", ASSUMED),
    "row": (15e-6, "s a row and token decoded on the host, stop strings included", "measured on a CPU core"),
    "stage": (15, "s to start a notebook and load a model", ASSUMED),
    "statistics": (20, "s of host work in an evaluation (tokens, resamples, files)", ASSUMED),
    "training begins": (5, "s around each training (rows, first weights, last checkpoint)", ASSUMED),
    "disk": (1e9, "bytes/s written", ASSUMED),
    "network": (100e6, "bytes/s downloaded", ASSUMED),
    "downloads": (5.2e9, "bytes of data and models", "sizes on the hub"),
    "Wikipedia": (670, "tokens an article", ASSUMED),
    "WikiText-103": (118e6, "tokens", "published"),
    "TinyStories": (199, "tokens a story", COUNTED),
    "tokenising": (450_000, "tokens/s of a core", "measured on a CPU core"),
    "cores": (12, "cores' worth of 16", ASSUMED),
    "overlap": (3.0e6, "tokens/s searched, one core", "measured on a CPU core"),
    "Alpaca": (84, "tokens an example, EOS included", COUNTED),
    "HH-RLHF": (230, "tokens a pair, its prompt once", COUNTED),
    "padding of pairs": (0.08, "of the positions", ASSUMED),
    "WikiText-2": (286_000, "tokens of the test split", COUNTED),
    "WikiText-103 held-out": (250_000, "tokens", "published"),
    "SST-2": (40, "tokens of an item and its template", COUNTED),
    "GSM8K": (62, "tokens of a question after the demonstrations", COUNTED),
}
ALPACA, PAIRS, HELD_OUT_PAIRS, SST2, GSM8K = 51_002, 160_800, 8_552, 872, 1_319  # items of the sources
EXTERNAL = {  # baselines from the hub
    "gpt2": ModelConfig(n_layer=12, d_model=768, n_head=12, d_ff=3072, context=1024, ffn="gelu", vocab_size=50257),
    "distilgpt2": ModelConfig(n_layer=6, d_model=768, n_head=12, d_ff=3072, context=1024, ffn="gelu", vocab_size=50257),
}


def known(name: str) -> float:
    return KNOWN[name][0]


@dataclass(frozen=True)
class Part:
    stage: str
    name: str
    seconds: float
    how: str = ""


class Pipeline:
    """The parts of `full` on a card, each with its seconds."""

    def __init__(self, card: Card, *, half: bool = True):
        """half: whether every evaluation passes its check and runs in bf16 (where the card has it)."""
        self.card, self.preset, self.half = card, load_preset("full"), half and bool(card.bf16)
        self.config = replace(self.preset.model, vocab_size=VOCABULARY)
        self.model = Model.of(self.config)
        self.device = Device(card.training, card.reading, NVLINK)

    def parts(self) -> Iterator[Part]:
        for stage in (self.data, self.pretrain, self.sft, self.dpo, self.evaluations, self.speed, self.ablations):
            yield from stage()
        yield Part("compare", "tables, figures, report", 4 * known("stage"))

    # Stages ---------------------------------------------------------------------------------------------------------

    def data(self) -> Iterator[Part]:
        most = {source.source: source.max_examples for source in self.preset.data.pretrain}
        tokens = known("WikiText-103") + most["wikipedia"] * known("Wikipedia")
        tokens += most["tinystories"] * known("TinyStories")
        yield Part("data", "download", known("downloads") / known("network"), "5.2 GB")
        yield Part("data", "search for overlap", tokens / known("overlap"), f"{tokens / 1e6:,.0f}M tokens, one core")
        yield Part("data", "tokenise", tokens / known("tokenising") / known("cores"), f"{tokens / 1e6:,.0f}M tokens")
        yield Part("data", "notebook", known("stage"))

    def pretrain(self) -> Iterator[Part]:
        config = self.preset.pretrain
        a_step = config.batch_size * config.accumulate * self.config.context
        micro = -(-config.accumulate // self.card.count)
        steps = -(-config.tokens // a_step)
        time = step(self.model, self.device, self.card.count, a_step, micro)
        how = f"{steps:,} steps of {a_step:,} tokens, {a_step / time.total:,.0f} tokens/s"
        yield Part("pretrain", "steps", steps * time.total, how)
        yield from self._around("pretrain", "compile, whole", 1 + steps // config.evaluate_every)
        saves = steps // config.checkpoint_every
        yield Part("pretrain", "checkpoints", saves * 12 * self.model.parameters / known("disk"), f"{saves} of 3 GB")

    def sft(self) -> Iterator[Part]:
        config = self.preset.sft
        tokens = config.epochs * ALPACA * known("Alpaca") / (1 - config.replay)
        steps = tokens / config.batch_size / self.config.context
        yield Part("sft", "steps", self._trained(tokens), f"{tokens / 1e6:.1f}M tokens, {steps:,.0f} steps")
        yield from self._around("sft", "compile, block", 1 + steps // config.evaluate_every)

    def dpo(self) -> Iterator[Part]:
        config = self.preset.dpo
        tokens = PAIRS * known("HH-RLHF") / (1 - known("padding of pairs"))
        steps = PAIRS / config.batch_size
        reference = self._forward(self.model, tokens) / self.card.count
        yield Part("dpo", "reference", reference, f"{PAIRS:,} pairs, forward")
        yield Part("dpo", "steps", self._trained(tokens), f"{tokens / 1e6:.1f}M positions, {steps:,.0f} steps")
        held_out = HELD_OUT_PAIRS * known("HH-RLHF") * (2 + steps // config.evaluate_every)
        seconds = self._forward(self.model, held_out) / self.card.count
        yield Part("dpo", "held-out pairs", seconds, f"{held_out / 1e6:.0f}M positions, forward")
        yield from self._around("dpo", "compile, block", 0)

    def evaluations(self) -> Iterator[Part]:
        names = {name: self.config for name in ("random", "pretrain", "sft", "dpo")} | EXTERNAL
        for name, config in names.items():
            model, scored = Model.of(config), self._scored(name in ("sft", "dpo"))
            seconds = self._forward(model, scored, self.half)
            if self.half:  # an eighth of the items at most in both precisions
                seconds += self._forward(model, scored / 8) + self._forward(model, scored / 8, half=False)
            yield Part(f"evaluate {name}", "scoring", seconds, f"{scored / 1e6:.1f}M positions")
            yield Part(f"evaluate {name}", "GSM8K", self.problems(config), f"{GSM8K:,} items, all to the last token")
            yield Part(f"evaluate {name}", "host", known("stage") + known("statistics"))

    def speed(self) -> Iterator[Part]:
        config, models = self.preset.evaluation, 6
        rounds = (1 + config.speed_repeats) * config.speed_new_tokens * models
        seconds = sum(
            rounds * self._decoded(self.config, rows, config.speed_prompt + config.speed_new_tokens, half=False)
            for rows in config.speed_batch_sizes
        )
        yield Part("speed", "decoding", seconds, f"{rounds * len(config.speed_batch_sizes):,} steps")
        yield Part("speed", "notebook", models * known("stage"))

    def ablations(self) -> Iterator[Part]:
        config = self.preset.ablations
        base = replace(ablation_base(self.preset), vocab_size=VOCABULARY)
        small, train = Model.of(base), config.train
        variants, graphs = len(config.variants) + 1, self._graphs()
        tokens = config.steps * train.batch_size * train.accumulate * base.context
        trainings = variants * config.seeds
        each = tokens * small.flops_a_token / self.card.training
        workers = self.card.count
        how = f"{trainings} of {tokens / 1e6:.1f}M tokens, {small.parameters / 1e6:.0f}M parameters"
        yield Part("ablations", "trainings", trainings * each / workers, how)
        held_out = known("WikiText-103 held-out") * (1 + config.steps // train.evaluate_every)
        around = known("training begins") + self._forward(small, held_out)
        yield Part("ablations", "around the trainings", trainings * around / workers)
        yield Part("ablations", "compile", graphs * known("compile, block"), f"{graphs} graphs of a block")
        positions = config.length_streams * config.length_factor * base.context
        read = positions * (2 * small.products + small.attention * config.length_factor) / self.card.forward(False)
        by_position = 5 * config.seeds * (4 * read + 2)
        yield Part("ablations", "loss by position", by_position, f"5 variants, {config.seeds} seeds, 4 modes")
        yield Part("step times", "compile", graphs * known("compile, block"), f"{graphs} graphs of a block")
        a_step = self.preset.pretrain.batch_size * self.preset.pretrain.accumulate * self.config.context
        rounds = variants * (config.rounds + 2)
        seconds = step(self.model, self.device, 1, a_step, self.preset.pretrain.accumulate).total
        seconds += tokens / config.steps * small.flops_a_token / self.card.training
        yield Part("step times", "steps", rounds * seconds, f"{rounds} at each of two sizes")

    # Pieces ---------------------------------------------------------------------------------------------------------

    def _trained(self, tokens: float) -> float:
        return tokens * self.model.flops_a_token / self.card.training / self.card.count

    def _forward(self, model: Model, positions: float, half: bool = True) -> float:
        return positions * model.flops_a_token / 3 / self.card.forward(half)

    def _around(self, stage: str, compiled: str, evaluations: float) -> Iterator[Part]:
        """What a stage of training does beside its steps."""
        yield Part(stage, "compile", known(compiled))
        if evaluations:
            seconds = self._forward(self.model, evaluations * known("WikiText-103 held-out")) / self.card.count
            yield Part(stage, "held-out losses", seconds, f"{evaluations:.0f} times")
        yield Part(stage, "notebook", known("stage") + known("training begins"))

    def _scored(self, against_reference: bool) -> float:
        """Positions that all scoring protocols compute for a model."""
        config = self.preset.evaluation
        text = known("WikiText-2") * (1 + config.window / config.stride + 1)
        prompts = config.sentiment_templates * (1 + config.sentiment_draws)
        pairs = HELD_OUT_PAIRS * known("HH-RLHF") * (1 + against_reference)
        answers = 1_000 * known("Alpaca") * (1 + against_reference)
        return text + SST2 * known("SST-2") * prompts + pairs + answers

    def problems(self, config: ModelConfig) -> float:
        """Seconds of GSM8K for a model: the largest batches that half of the free memory holds."""
        evaluation, size = self.preset.evaluation, 2 if self.half else 4
        cached = 2 * config.n_layer * config.d_model * size
        weights = parameter_counts(config)["total"] * (6 if self.half else 4)
        prompt = known("GSM8K") + 150 * evaluation.problem_shots
        room = max(evaluation.batch_tokens, (self.card.memory - weights) / 2 / cached)
        rows = min(GSM8K, max(1, room // (prompt + evaluation.problem_new_tokens)))
        batches = -(-GSM8K // rows)
        new = evaluation.problem_new_tokens
        seconds = batches * new * self._decoded(config, rows, known("GSM8K") + new, self.half)
        seconds += GSM8K * new * known("row")
        return seconds + self._forward(Model.of(config), GSM8K * known("GSM8K"), self.half)

    def _decoded(self, config: ModelConfig, rows: float, positions: float, half: bool) -> float:
        """Seconds of one step of decoding: weights and cache are read once, and every kernel is started."""
        size = 2 if half and self.card.bf16 else 4
        weights = parameter_counts(config)["total"] * size
        cache = rows * positions * 2 * config.n_layer * config.d_model * size
        kernels = 14 * config.n_layer + 10
        return (weights + cache) / self.card.reading + kernels * known("kernel")

    def _graphs(self) -> int:
        """Different graphs among the variants: sinks and optimizers change none."""
        names = {name for name in self.preset.ablations.variants if not name.startswith(("sinks=", "optimizer="))}
        return 1 + len(names)


GROUPS = {  # columns of the table of cards, and the stages that they add up
    "data": ("data",),
    "pretrain": ("pretrain",),
    "SFT": ("sft",),
    "DPO": ("dpo",),
    "evaluations": ("evaluate", "speed"),
    "ablations": ("ablations",),
    "step times": ("step times",),
    "rest": ("compare",),
}


def minutes(pipeline: Pipeline) -> dict[str, float]:
    """Minutes by group of stages, and in all."""
    parts = list(pipeline.parts())
    found = {
        name: sum(part.seconds for part in parts if part.stage.startswith(stages)) / 60
        for name, stages in GROUPS.items()
    }
    return {**found, "all": sum(part.seconds for part in parts) / 60}


def tables() -> str:
    """The tables of docs/scale.md: parts on one H100, the same by card, and what is taken as known."""
    one = Pipeline(CARDS["H100"])  # of the evaluations, the one that takes longest stands for all
    lines = ["| stage | part | minutes | what |", "|---|---|---:|---|"]
    parts = [part for part in one.parts() if not part.stage.startswith("evaluate") or part.stage == "evaluate dpo"]
    lines += [f"| {part.stage} | {part.name} | {part.seconds / 60:.1f} | {part.how} |" for part in parts]
    names = [*GROUPS, "all"]
    lines += ["", f"| minutes | {' | '.join(names)} | USD an hour | USD |", "|---|" + "---:|" * (len(names) + 2)]
    for name, card in CARDS.items():
        found = minutes(Pipeline(card))
        shown = " | ".join(f"{found[key]:,.0f}" for key in names)
        lines.append(f"| {name} | {shown} | {card.price:.2f} | {found['all'] / 60 * card.price:,.2f} |")
    exact = minutes(Pipeline(CARDS["H100"], half=False))["evaluations"]
    lines += ["", f"One H100 with every evaluation in fp32: {exact:.0f} minutes of evaluations."]
    lines += ["", "| taken as known | | | source |", "|---|---:|---|---|"]
    lines += [f"| {name} | {value:,.7g} | {unit} | {source} |" for name, (value, unit, source) in KNOWN.items()]
    return "\n".join(lines)
