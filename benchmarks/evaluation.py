"""Evaluation: few-shot scoring and batched generation, ours and what transformers and lm-eval do with the same weights.

Answers are compared in fp32: labels' log-likelihoods of the same prompts, and greedy tokens one for one.
"""

import time
from abc import ABC, abstractmethod
from typing import Any

import torch

from benchmarks.setup import Setup
from threefold.evaluation import LanguageModel, sentiment
from threefold.model import Decoder, generate, to_transformers

BATCH = 32

Times = dict[str, tuple[float, float]]


TEMPLATE = sentiment.TEMPLATES[0]


def few_shot(setup: Setup, items: list[dict], pool: list[dict]) -> list[str]:
    """A prompt for each item, after the same demonstrations."""
    shown = sentiment.draw(pool, setup.size.shots, 0, 0)
    head = "".join(TEMPLATE.demonstration(item) + TEMPLATE.separator for item in shown)
    return [head + TEMPLATE.text(item["sentence"]) for item in items]


class _Scoring(ABC):
    """Few-shot sentiment: every item's prompt holds the same demonstrations, and both labels are scored after it."""

    def __init__(self, setup: Setup):
        self.setup, self.tokenizer, template = setup, setup.tokenizer, TEMPLATE
        self.items, pool = setup.sentiment()
        self.requests = []
        for prompt in few_shot(setup, self.items, pool):
            context = self._ids(prompt)
            for label in template.labels:
                whole = self._ids(f"{prompt} {label}")
                self.requests.append(([*setup.sinks, *context], whole[len(context) :]))
        longest = max(len(context) + len(target) - 1 for context, target in self.requests)
        if longest > setup.size.model.context:
            raise SystemExit(f"a prompt of {longest} tokens does not fit {setup.size.model.context}: fewer shots")
        tokens = sum(len(context) for context, _ in self.requests) / len(self.requests)
        self.settings = {"precision": "fp32", "tokens a prompt": round(tokens), "items": len(self.items)}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @abstractmethod
    def score(self) -> list[float]:
        """The log-likelihood of each label, in the order of the requests."""

    @property
    @abstractmethod
    def embedding(self) -> torch.nn.Module:
        """What each computed position passes first."""

    def check(self) -> dict[str, list[float]]:
        positions = []
        hook = self.embedding.register_forward_hook(lambda _, inputs, out: positions.append(inputs[0].numel()))
        found = {"log-likelihoods": self.score()}
        hook.remove()
        self.settings["positions an item"] = round(sum(positions) / len(self.items), 1)
        return found

    def round(self) -> Times:
        begun = time.perf_counter()
        self.score()
        return {"score": (len(self.items), time.perf_counter() - begun)}


class OurScoring(_Scoring):
    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = LanguageModel.from_model(setup.model(), setup.tokenizer, "ours", "")

    @property
    def embedding(self) -> torch.nn.Module:
        return self.model.decoder.embed

    def score(self) -> list[float]:
        return [span.sum() for span in self.model.loglikelihoods(self.requests)]


class TransformersScoring(_Scoring):
    """Rows sorted by length, padded right, in batches; logits only where a label is."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model = to_transformers(setup.model()).eval()
        self.settings["batch"] = BATCH

    @property
    def embedding(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    @torch.inference_mode()
    def score(self) -> list[float]:
        order = sorted(range(len(self.requests)), key=lambda i: -sum(map(len, self.requests[i])))
        found = [0.0] * len(order)
        for start in range(0, len(order), BATCH):
            batch = [self.requests[i] for i in order[start : start + BATCH]]
            rows = [[*context, *target[:-1]] for context, target in batch]
            width = max(map(len, rows))
            tokens_BT, mask_BT = torch.zeros(2, len(rows), width, dtype=torch.long)
            for row, ids in enumerate(rows):
                tokens_BT[row, : len(ids)], mask_BT[row, : len(ids)] = torch.tensor(ids), 1
            first = min(len(context) - 1 for context, _ in batch)
            out = self.model(tokens_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=width - first)
            for row, (context, target) in enumerate(batch):
                at = len(context) - 1 - first
                logp_TV = out.logits[row, at : at + len(target)].log_softmax(-1)
                found[order[start + row]] = logp_TV.gather(1, torch.tensor(target)[:, None]).sum().item()
        return found


class HarnessScoring(_Scoring):
    """lm-eval's own scorer on the same token ids."""

    def __init__(self, setup: Setup):
        from lm_eval.models.huggingface import HFLM

        super().__init__(setup)
        model = to_transformers(setup.model()).eval()
        self.model = HFLM(pretrained=model, tokenizer=setup.tokenizer, batch_size=BATCH, device="cpu")
        self.settings["batch"] = BATCH

    @property
    def embedding(self) -> torch.nn.Module:
        return self.model.model.get_input_embeddings()

    def score(self) -> list[float]:
        # lm-eval uses the strings as keys of its cache only; it does not tokenise them again.
        requests = [((str(i // 2), str(i % 2)), context, target) for i, (context, target) in enumerate(self.requests)]
        return [total for total, _ in self.model._loglikelihood_tokens(requests, disable_tqdm=True)]


class _Generation(ABC):
    """Prompts of several lengths in one batch, greedy, a fixed number of new tokens: starts of texts, and prompts that
    share demonstrations, as evaluations have them; in fp32, where tokens are compared, and in bf16."""

    def __init__(self, setup: Setup, models: dict[str, Any]):
        self.new = setup.size.new_tokens
        room = setup.size.model.context - self.new
        items, pool = setup.sentiment()
        asked = setup.tokenizer(few_shot(setup, items, pool), add_special_tokens=False).input_ids
        fitting = [[*setup.sinks, *ids] for ids in asked if len(setup.sinks) + len(ids) <= room]
        if len(fitting) < setup.size.prompts:
            raise SystemExit(f"only {len(fitting)} prompts leave room for {self.new} tokens: fewer shots")
        self.models = models
        self.prompts = {"": setup.prompts(), "few-shot, ": fitting[: setup.size.prompts]}
        self.settings = {"prompts": setup.size.prompts, "new tokens each": self.new}
        for name, prompts in self.prompts.items():
            mean = sum(map(len, prompts)) / len(prompts)
            self.settings[f"{name}tokens a prompt"] = round(mean)
            self.settings[f"{name}padding if all are read together"] = f"{1 - mean / max(map(len, prompts)):.0%}"

    @abstractmethod
    def generate(self, model: Any, prompts: list[list[int]]) -> list[list[int]]:
        """The new tokens of each prompt."""

    def check(self) -> dict[str, list[float]]:
        return {
            f"{name}tokens": [float(token) for row in self.generate(self.models["fp32"], prompts) for token in row]
            for name, prompts in self.prompts.items()
        }

    def round(self) -> Times:
        times = {}
        for name, prompts in self.prompts.items():
            for dtype, model in self.models.items():
                begun = time.perf_counter()
                rows = self.generate(model, prompts)
                times[name + dtype] = (sum(map(len, rows)), time.perf_counter() - begun)
        return times


class OurGeneration(_Generation):
    def __init__(self, setup: Setup):
        super().__init__(setup, {"fp32": setup.model().eval(), "bf16": setup.model().eval().bfloat16()})

    def generate(self, model: Decoder, prompts: list[list[int]]) -> list[list[int]]:
        return generate(model, prompts, self.new)


class TransformersGeneration(_Generation):
    def __init__(self, setup: Setup):
        made = [to_transformers(setup.model(), setup.tokenizer).eval() for _ in range(2)]
        super().__init__(setup, {"fp32": made[0], "bf16": made[1].bfloat16()})
        self.pad = setup.eos

    @torch.inference_mode()
    def generate(self, model: Any, prompts: list[list[int]]) -> list[list[int]]:
        width = max(map(len, prompts))
        tokens_BT = torch.full((len(prompts), width), self.pad)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, ids in enumerate(prompts):
            tokens_BT[row, width - len(ids) :], mask_BT[row, width - len(ids) :] = torch.tensor(ids), 1
        out_BT = model.generate(
            tokens_BT,
            attention_mask=mask_BT,
            max_new_tokens=self.new,
            min_new_tokens=None,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self.pad,
        )
        return out_BT[:, width:].tolist()
