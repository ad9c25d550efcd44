"""Training: our stages, plain transformers loops, transformers' Trainer and TRL, on the same rows, examples and pairs.

All use AdamW (fused) with gradients clipped at 1. Every contestant computes the loss of the first batch in fp32 from
the same weights before anything is timed. Ours and the plain loops count whole steps, data included; Trainer and TRL
are timed from the beginning of the first step to the end of the last one. In a round every contestant trains on the
same examples in the same number of steps.
"""

import copy
import math
import tempfile
import threading
import time
from typing import Any

import torch

from benchmarks.setup import Setup
from threefold.config import TrainConfig
from threefold.data.packing import pack_documents, pack_examples, pack_pairs
from threefold.model import to_transformers
from threefold.model.device import pick_device
from threefold.training import train
from threefold.training.objectives import MicroBatch, NextToken, Objective, Preference, reference_logprobs

RATE, CLIP, BETA = 1e-4, 1.0, 0.1
DISTURBED = (
    1.1  # scales the policy's last norm in the check: with equal models the DPO loss is log 2, whatever is computed
)

DEVICE = pick_device()

Times = dict[str, tuple[float, float]]


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    """A collated batch where the model is."""
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


def computed(items: int, positions: int, padding: int) -> dict[str, float]:
    """What a contestant computes for its items: positions for each, padding included, and the share of padding."""
    return {"positions an item": round(positions / items, 1), "padding": round(padding / positions, 3)}


# Ours ---------------------------------------------------------------------------------------------------------------


class _Ours:
    """`threefold.training.train` for one round of steps; each round continues with the same model."""

    def __init__(self, setup: Setup):
        self.setup, self.size, self.model = setup, setup.size, setup.model()
        self.settings: dict[str, Any] = {}

    def config(self, steps: int, batch_size: int) -> TrainConfig:
        return TrainConfig(
            steps=steps, batch_size=batch_size, optimizer="adamw", learning_rate=RATE, clip=CLIP, compile="on"
        )

    def seconds(self, objective: Objective, rows: Any, config: TrainConfig) -> tuple[Any, float]:
        """The result of `train`, and the seconds that it reports for its steps."""
        with tempfile.TemporaryDirectory() as folder:
            result = train(self.model, objective, rows, config, folder, seed=0, progress=lambda _: None).result
        self.settings["numerics"] = result.note
        return result, result.seconds


class OurPretraining(_Ours):
    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.rows = pack_documents([setup.stream()], self.size.model, setup.eos, setup.sinks)
        self.settings["parameters"] = sum(p.numel() for p in self.model.parameters())
        # 12 L T D a position for the products of queries, keys and values over the whole width, forward and backward.
        c = self.size.model
        self.settings["flops_per_token"] = {
            "6N": 6 * self.settings["parameters"],
            "6N + attention": 6 * self.settings["parameters"] + 12 * c.n_layer * c.context * c.d_model,
        }

    def check(self) -> dict[str, list[float]]:
        batch = MicroBatch.of(next(self.rows.batches(self.size.rows, seed=0))).to(DEVICE)
        loss = NextToken()(self.model.to(DEVICE), batch)
        return {"loss": [loss.sum.item() / loss.weight]}

    def round(self) -> Times:
        result, seconds = self.seconds(NextToken(), self.rows, self.config(self.size.steps, self.size.rows))
        return {"train": (result.tokens, seconds)}


class OurFineTuning(_Ours):
    """Packed rows; a step has as many rows as hold the peers' number of examples."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.examples = setup.examples(self.size.examples * self.size.steps)
        self.rows = pack_examples(self.examples, self.size.model, setup.eos, setup.sinks)
        batch = math.ceil(len(self.rows) / self.size.steps)
        self.steps = math.ceil(len(self.rows) / batch)
        self.batch = batch
        self.settings |= {"rows per step": batch, "examples a row": round(len(self.examples) / len(self.rows), 2)}
        whole = self.rows.rows(range(len(self.rows)))
        self.settings |= computed(len(self.examples), whole.tokens_BT.numel(), whole.n_padding)

    def check(self) -> dict[str, list[float]]:
        setup = self.setup
        rows = pack_examples(self.examples[: self.size.examples], self.size.model, setup.eos, setup.sinks)
        loss = NextToken()(self.model.to(DEVICE), MicroBatch.of(rows.rows(range(len(rows)))).to(DEVICE))
        return {"loss": [loss.sum.item() / loss.weight]}

    def round(self) -> Times:
        _, seconds = self.seconds(NextToken(), self.rows, self.config(self.steps, self.batch))
        return {"train": (len(self.examples) * self.steps * self.batch / len(self.rows), seconds)}


class OurPreferences(_Ours):
    def __init__(self, setup: Setup):
        super().__init__(setup)
        pairs = setup.pairs(max(self.size.pairs * self.size.steps, self.size.reference))
        self.rows = pack_pairs(pairs[: self.size.pairs * self.size.steps], self.size.model, setup.eos, setup.sinks)
        self.asked = pack_pairs(pairs[: self.size.reference], self.size.model, setup.eos, setup.sinks)
        self.first = pack_pairs(pairs[: self.size.pairs], self.size.model, setup.eos, setup.sinks)
        batches = list(self.rows.batches(self.size.pairs, seed=0, steps=self.size.steps))
        positions, padding = sum(b.tokens_BT.numel() for b in batches), sum(b.n_padding for b in batches)
        self.settings |= computed(len(self.rows), positions, padding)
        self.reference = copy.deepcopy(self.model)
        self.logprobs_P2 = reference_logprobs(self.reference, self.rows, batch_size=self.size.pairs)

    def check(self) -> dict[str, list[float]]:
        logprobs_P2 = reference_logprobs(self.reference, self.first, batch_size=self.size.pairs, precision="fp32")
        policy, objective = copy.deepcopy(self.model).to(DEVICE), Preference(BETA, logprobs_P2)
        objective.to(DEVICE)
        with torch.no_grad():
            policy.norm.weight.mul_(DISTURBED)
            batch = MicroBatch.of(next(self.first.batches(self.size.pairs, shuffle=False)))
            loss = objective(policy, batch.to(DEVICE))
        return {"logprobs": logprobs_P2.T.flatten().tolist(), "loss": [loss.sum.item() / loss.weight]}

    def round(self) -> Times:
        size, begun = self.size, time.perf_counter()
        reference_logprobs(self.reference, self.asked, batch_size=size.pairs)
        reference = time.perf_counter() - begun
        objective = Preference(BETA, self.logprobs_P2)
        _, seconds = self.seconds(objective, self.rows, self.config(size.steps, size.pairs))
        return {"train": (size.pairs * size.steps, seconds), "reference": (len(self.asked), reference)}


# Plain loops --------------------------------------------------------------------------------------------------------


class PlainLoop:
    """`LlamaForCausalLM` under bf16 autocast, as in most training scripts."""

    compiled = False

    def __init__(self, setup: Setup):
        self.size = setup.size
        self.rows = pack_documents([setup.stream()], self.size.model, setup.eos, setup.sinks)
        self.model = to_transformers(setup.model()).train().to(DEVICE)
        self.model.config.use_cache = False
        self.forward = torch.compile(self.model) if self.compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.1, fused=True)
        self.settings = {"attention": self.model.config._attn_implementation, "optimizer": "AdamW, fused"}

    def loss(self, batch: Any, forward: Any) -> torch.Tensor:
        """Each row is one text after a BOS, so plain causal attention equals what ours computes."""
        tokens_BT, targets_BT = batch.tokens_BT.to(DEVICE), batch.targets_BT.to(DEVICE)
        return forward(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss

    def check(self) -> dict[str, list[float]]:
        with torch.no_grad():
            return {"loss": [self.loss(next(self.rows.batches(self.size.rows, seed=0)), self.model).item()]}

    def round(self) -> Times:
        tokens, begun = 0, time.perf_counter()
        for batch in self.rows.batches(self.size.rows, seed=0, steps=self.size.steps):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = self.loss(batch, self.forward)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            tokens += batch.n_tokens
            loss.item()
        return {"train": (tokens, time.perf_counter() - begun)}


class CompiledLoop(PlainLoop):
    compiled = True


# Trainers -----------------------------------------------------------------------------------------------------------


class _Trained:
    """A Trainer that trains in a thread of its own and pauses after each round's steps."""

    trainer: Any

    def __init__(self, steps: int, items: float):
        self.steps, self.items = steps, items
        self.thread: threading.Thread | None = None
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.taken, self.begun, self.spent, self.error = 0, 0.0, 0.0, None

    def _start(self) -> None:
        from transformers import TrainerCallback

        outer, threads = self, torch.get_num_threads()

        class Gate(TrainerCallback):
            def on_step_begin(self, args, state, control, **rest):
                if outer.taken == 0:
                    outer.begun = time.perf_counter()

            def on_step_end(self, args, state, control, **rest):
                outer.taken += 1
                if outer.taken == outer.steps:
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
                    outer.spent, outer.taken = time.perf_counter() - outer.begun, 0
                    outer.done.release()
                    outer.go.acquire()

        def run() -> None:
            torch.set_num_threads(threads)
            outer.go.acquire()
            try:
                outer.trainer.train()
            except BaseException as error:  # passed to the waiting thread, which raises it
                outer.error = error
                outer.done.release()

        self.trainer.add_callback(Gate())
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def computed(self, items: int) -> dict[str, float]:
        """`computed` over an epoch of this many items."""
        batches = list(self.trainer.get_train_dataloader())
        positions = sum(batch["input_ids"].numel() for batch in batches)
        padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches if "attention_mask" in batch)
        return computed(items, positions, padding)

    def round(self) -> Times:
        if self.thread is None:
            self._start()
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error
        return {"train": (self.items, self.spent)}


def _arguments(setup: Setup, batch_size: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="threefold-bench-"),
        "per_device_train_batch_size": batch_size,
        "max_steps": 1_000_000,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "use_cpu": DEVICE == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }


class TransformersTrainer(_Trained):
    def __init__(self, setup: Setup):
        from datasets import Dataset
        from transformers import Trainer, TrainingArguments

        size = setup.size
        rows = pack_documents([setup.stream()], size.model, setup.eos, setup.sinks)
        self.first = next(rows.batches(size.rows, seed=0))
        batches = list(rows.batches(size.rows, seed=0, steps=size.steps))
        data = {
            "input_ids": torch.cat([batch.tokens_BT for batch in batches]).tolist(),
            "labels": torch.cat([batch.targets_BT for batch in batches]).tolist(),
        }
        super().__init__(size.steps, sum(batch.n_tokens for batch in batches))
        self.model = to_transformers(setup.model()).train()
        self.model.config.use_cache = False
        arguments = TrainingArguments(bf16=True, **_arguments(setup, size.rows))
        self.settings = {"bf16": True, "optimizer": arguments.optim}

        def collate(rows):
            parts = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
            return {**parts, "shift_labels": parts["labels"]}

        self.trainer = Trainer(self.model, arguments, train_dataset=Dataset.from_dict(data), data_collator=collate)

    def check(self) -> dict[str, list[float]]:
        with torch.no_grad():
            targets_BT = self.first.targets_BT.to(DEVICE)
            tokens_BT = self.first.tokens_BT.to(DEVICE)
            found = self.model.to(DEVICE)(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT)
        return {"loss": [found.loss.item()]}


class TrlFineTuning(_Trained):
    """TRL's SFTTrainer: bf16, nothing recomputed."""

    options: dict[str, Any] = {"bf16": True, "gradient_checkpointing": False}  # noqa: RUF012

    def __init__(self, setup: Setup):
        self.setup, self.size = setup, setup.size
        self.examples = setup.examples(self.size.examples * self.size.steps)
        self.trainer = self._trainer(self.options, self.examples)
        rows = self.trainer.args.per_device_train_batch_size * self.size.steps
        super().__init__(self.size.steps, len(self.examples) * rows / len(self.trainer.train_dataset))
        self.settings = {**self.options, "optimizer": self.trainer.args.optim, **self.computed(len(self.examples))}

    def _trainer(self, options: dict[str, Any], examples: list) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        setup, model = self.setup, self.size.model
        data = [
            {
                "input_ids": [*setup.sinks, *prompt, *response, setup.eos],
                "completion_mask": [0] * (len(setup.sinks) + len(prompt)) + [1] * (len(response) + 1),
            }
            for prompt, response in examples
        ]
        batch = self.size.examples
        if options.get("packing"):  # as many rows as ours has for the examples of a step
            batch = math.ceil(len(pack_examples(self.examples, model, setup.eos, setup.sinks)) / self.size.steps)
        arguments = SFTConfig(
            completion_only_loss=True,
            **{"max_length": model.context + 1, **_arguments(setup, batch), **options},
        )
        return SFTTrainer(
            to_transformers(setup.model()).train(),
            arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=setup.tokenizer,
        )

    def check(self) -> dict[str, list[float]]:
        options = {**self.options, "bf16": False, "gradient_checkpointing": False}
        exact = self._trainer(options, self.examples[: self.size.examples])
        rows = [exact.train_dataset[index] for index in range(len(exact.train_dataset))]
        with torch.no_grad():
            loss = exact.model(**on_device(exact.data_collator(rows))).loss
        return {"loss": [loss.item()]}


class TrlFineTuningGrouped(TrlFineTuning):
    """Batches of similar length. transformers' sampler sorts groups of at most a quarter of the data: of a round's few
    batches it would sort none, so this sampler sorts them all, as it sorts 50 batches of a long training."""

    options = {**TrlFineTuning.options, "train_sampling_strategy": "group_by_length"}  # noqa: RUF012

    def _trainer(self, options: dict[str, Any], examples: list) -> Any:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        trainer = super()._trainer(options, examples)
        lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
        batch = trainer.args.per_device_train_batch_size
        order = get_length_grouped_indices(lengths, batch, mega_batch_mult=self.size.steps)
        trainer._get_train_sampler = lambda _=None: order
        return trainer


class TrlFineTuningPacked(TrlFineTuning):
    """Several examples a row, kept apart by their positions."""

    options = {**TrlFineTuning.options, "packing": True}  # noqa: RUF012


class TrlFineTuningPaddingFree(TrlFineTuning):
    """All examples of a batch in one row, kept apart by their positions."""

    options = {**TrlFineTuning.options, "padding_free": True, "max_length": None}  # noqa: RUF012


class TrlFineTuningDefault(TrlFineTuning):
    options = {}  # noqa: RUF012


class TrlPreferences(_Trained):
    """TRL's DPOTrainer: bf16, nothing recomputed, the reference's log-probabilities computed before training."""

    options: dict[str, Any] = {"bf16": True, "gradient_checkpointing": False, "precompute_ref_log_probs": True}  # noqa: RUF012

    def __init__(self, setup: Setup):
        self.setup, self.size = setup, setup.size
        n = self.size.pairs * self.size.steps
        self.pairs = setup.pairs(max(n, self.size.reference))
        super().__init__(self.size.steps, n)
        self.trainer = self._trainer(self.options, self.pairs[:n])
        self.settings = {**self.options, "optimizer": self.trainer.args.optim, **self.computed(n)}

    def _trainer(self, options: dict[str, Any], pairs: list) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        outer = self

        class Tokenised(DPOTrainer):
            """Takes pairs that are already tokenised to the same ids as ours."""

            def _prepare_dataset(self, dataset, *rest):
                return dataset

        data = [
            dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)) for ids in map(self._ids, pairs)
        ]
        arguments = DPOConfig(
            beta=BETA,
            max_length=self.size.model.context + 1,
            **_arguments(outer.setup, self.size.pairs),
            **options,
        )
        return Tokenised(
            to_transformers(self.setup.model()).train(),
            args=arguments,
            train_dataset=Dataset.from_list(data),
            processing_class=self.setup.tokenizer,
            # A model built in memory has no name by which TRL could load a copy from the hub.
            ref_model=None if options.get("precompute_ref_log_probs") else to_transformers(self.setup.model()),
        )

    def _ids(self, pair: tuple) -> tuple[list[int], list[int], list[int]]:
        prompt, chosen, rejected = pair
        return [*self.setup.sinks, *prompt], [*chosen, self.setup.eos], [*rejected, self.setup.eos]

    def _batch(self, trainer: Any, pairs: list) -> dict[str, torch.Tensor]:
        rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), self._ids(pair), strict=True)) for pair in pairs]
        return on_device(trainer.data_collator(rows))

    def check(self) -> dict[str, list[float]]:
        pairs = self.pairs[: self.size.pairs]
        exact = self._trainer({**self.options, "bf16": False, "gradient_checkpointing": False}, pairs)
        inputs = self._batch(exact, pairs)
        chosen, rejected = exact.compute_ref_log_probs(exact.ref_model or exact.model, inputs)
        if exact.precompute_ref_logps:
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        with torch.no_grad():
            exact.model.model.norm.weight.mul_(DISTURBED)
            loss = exact.compute_loss(exact.model, inputs)
        return {"logprobs": torch.cat([chosen, rejected]).tolist(), "loss": [loss.item()]}

    def round(self) -> Times:
        times = super().round()
        if not self.trainer.precompute_ref_logps:
            return times
        pairs, size = self.pairs[: self.size.reference], self.size.pairs
        begun = time.perf_counter()
        for start in range(0, len(pairs), size):
            inputs = self._batch(self.trainer, pairs[start : start + size])
            self.trainer.compute_ref_log_probs(self.trainer.model, inputs)
        return {**times, "reference": (len(pairs), time.perf_counter() - begun)}


class TrlPreferencesDefault(TrlPreferences):
    options = {}  # noqa: RUF012
