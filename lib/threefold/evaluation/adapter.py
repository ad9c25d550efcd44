"""One interface to every model under evaluation: our Decoder and any causal language model of transformers.

Protocols work with texts and token ids; the adapter batches, scores and generates. Three rules hold for every model:
weights are loaded strictly and hashed; a text is tokenised without special tokens and gets the prefix that the model's
own tokenizer would put before it (our BOS, nothing for GPT-2); only the positions that are scored reach the vocabulary.
"""

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from basics import paths
from basics.errors import EvaluationError
from basics.files import sha256_bytes, sha256_file
from threefold.config import ModelConfig
from threefold.data.tokenizer import tokenizer_hash
from threefold.evaluation import loading
from threefold.evaluation.backends import UNLIMITED, Backend, DecoderBackend, TransformersBackend, as_decoder
from threefold.evaluation.batching import FULL, Request, Row, batches_of, rows_of
from threefold.memory import free_memory, keep_freed_memory
from threefold.model.decoder import Decoder
from threefold.model.device import pick_device
from threefold.model.generation import common_prefix_length

BATCH_TOKENS = 16384
SHARED_PREFIX = 16  # shorter common prefixes are not worth a cache


@dataclass
class LanguageModel:
    """A model, its tokenizer and the hash of its weights.

    context: positions it can attend over, prefix included; UNLIMITED where it has no limit. prefix_ids: what its
    tokenizer puts before every text.
    facts: parameters, precision, backend, tokenizer hash, revision: part of every evaluation's settings.
    """

    name: str
    backend: Backend
    tokenizer: Any
    weights_sha256: str
    facts: dict[str, Any] = field(default_factory=dict)
    room: int = sys.maxsize  # positions of a batch that the device has been found to hold

    def __post_init__(self) -> None:
        keep_freed_memory()
        if not getattr(self.tokenizer, "is_fast", False):
            raise EvaluationError(f"{self.name}: its tokenizer gives no character offsets (a fast tokenizer is needed)")
        if self.tokenizer.eos_token_id is None:
            raise EvaluationError(f"{self.name}: its tokenizer has no end-of-sequence token")
        self._plain = _known_to(self.tokenizer, self.backend.vocab_size, self.name)
        self._plain.no_padding()
        self._plain.no_truncation()
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        whole = self.tokenizer("a").input_ids
        # Some tokenizers also append EOS by default; a suffix is never wanted before a continuation.
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        if not starts:
            raise EvaluationError(f"{self.name}: its tokenizer rewrites a text when it adds special tokens")
        self.prefix_ids: list[int] = list(whole[: starts[0]])
        self.facts = {
            "parameters": sum(p.numel() for p in self.backend.model.parameters()),
            "precision": str(self.backend.dtype).removeprefix("torch."),
            "backend": self.backend.name,
            "context": "unlimited" if self.context == UNLIMITED else self.context,
            "prefix_tokens": len(self.prefix_ids),
            "vocabulary": len(self.tokenizer),
            "tokenizer_sha256": _tokenizer_hash(self.tokenizer),
            **self.facts,
        }

    @property
    def context(self) -> int:
        return self.backend.context

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def start_ids(self) -> list[int]:
        """What lm-eval puts before a text that nothing else precedes: the prefix, or without one BOS or EOS."""
        bos = self.tokenizer.bos_token_id
        return self.prefix_ids or [self.tokenizer.eos_token_id if bos is None else bos]

    @property
    def decoder(self) -> Decoder:
        """The Decoder that runs. Raises EvaluationError where transformers' own model does."""
        if not isinstance(self.backend, DecoderBackend):
            raise EvaluationError(
                f"{self.name} runs through transformers: {type(self.backend.model).__name__} is not a Decoder"
            )
        return self.backend.model

    @cached_property
    def in_bf16(self) -> "LanguageModel":
        """The same model in bf16."""
        backend = copy.deepcopy(self.backend)
        backend.model.to(torch.bfloat16)
        backend.dtype = torch.bfloat16
        facts = {key: value for key, value in self.facts.items() if key != "precision"}
        return LanguageModel(self.name, backend, self.tokenizer, self.weights_sha256, facts)

    def same_tokenizer(self, other: "LanguageModel") -> bool:
        """Whether token ids mean the same to both, so that distributions can be compared position by position."""
        return (
            self.prefix_ids == other.prefix_ids
            and self.backend.vocab_size == other.backend.vocab_size
            and self.facts["tokenizer_sha256"] == other.facts["tokenizer_sha256"]
        )

    # Where models come from ------------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, name: str = "", facts: dict[str, Any] | None = None, **options: Any
    ) -> "LanguageModel":
        """A checkpoint folder: one of ours, or any transformers causal LM in safetensors.

        options: `dtype` (default: torch.float32) and `device` (default: as `pick_device`).
        Raises CheckpointError (missing, extra or misshapen weights; no safetensors) or SourceError (no such folder).
        """
        name = name or Path(folder).name
        model, tokenizer, weights_sha256 = loading.from_folder(Path(folder), name, **options)
        return cls.from_model(model, tokenizer, name, weights_sha256, facts)

    @classmethod
    def from_location(
        cls, location: str, revision: str = "", data_dir: str | Path | None = None, *, name: str = "", **options: Any
    ) -> "LanguageModel":
        """A folder, `package:NAME/FILE.gguf` inside an installed package, or a hub id (cache first, then the hub).

        A folder may also be inside `data_dir`. options: as for `from_checkpoint`. Raises SourceError naming every place
        that was tried, and CheckpointError as `from_checkpoint`.
        """
        if location.startswith("package:"):
            file = loading.package_file(location)
            name = name or file.stem
            model, tokenizer = loading.with_transformers(file.parent, name, gguf_file=file.name, **options)
            return cls.from_model(model, tokenizer, name, sha256_file(file), {"location": location})
        folders = paths.model_folders(location, data_dir)
        if found := next((folder for folder in folders if folder.is_dir()), None):
            return cls.from_checkpoint(found, name, **options)
        snapshot = loading.snapshot(location, revision, folders)
        facts = {"location": location, "revision": snapshot.name}
        return cls.from_checkpoint(snapshot, name or location.rpartition("/")[2], facts, **options)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        name: str,
        weights_sha256: str | None = None,
        facts: dict[str, Any] | None = None,
        *,
        convert: bool = True,
    ) -> "LanguageModel":
        """A Decoder or transformers model in memory; without a hash, that of its state dict is computed.

        Llama, Qwen3 and GPT-2 are converted to our Decoder, which scores faster, if the Decoder can hold them and its
        logits on a probe equal theirs; `convert=False` keeps transformers' model.
        """
        weights_sha256 = weights_sha256 or sha256_state(model)
        decoder = model if isinstance(model, Decoder) else as_decoder(model) if convert else None
        backend = TransformersBackend(model, tokenizer) if decoder is None else DecoderBackend(decoder)
        return cls(name, backend, tokenizer, weights_sha256, facts or {})

    @classmethod
    def random(
        cls, config: ModelConfig, tokenizer: Any, seed: int, name: str = "random", *, device: str | None = None
    ) -> "LanguageModel":
        """The untrained control: freshly initialised weights, hashed like any other."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = Decoder(config)
        return cls.from_model(decoder.to(device or pick_device()), tokenizer, name, facts={"seed": seed})

    # Text and tokens --------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens. Raises EvaluationError for half of a surrogate pair."""
        try:
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            wrong = next(text for text in texts if any("\ud800" <= char <= "\udfff" for char in text))
            raise EvaluationError(f"{wrong[:40]!r} holds half of a surrogate pair, which is not text") from error
        return [encoding.ids for encoding in encodings]

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text [T] and the character at which each ends [T] (never decreasing, last = len(text))."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        ends_T = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64))
        ends_T[-1:] = len(text)
        return np.array(encoding.ids, np.int64), ends_T

    # Scores -----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def loglikelihoods(
        self,
        requests: Sequence[Request],
        *,
        batch_tokens: int = BATCH_TOKENS,
        describe: Callable[[int], str] = "request {}".format,
    ) -> list[np.ndarray]:
        """Log-likelihood in nats of each token of each target after its context (which includes the model's prefix
        ids): float64 arrays as long as the targets.

        Raises EvaluationError naming the item (`describe(index)`) where one is not finite or longer than the context.
        """
        for index, (context, target) in enumerate(requests):
            if not len(context) or not len(target):
                raise EvaluationError(f"{describe(index)}: nothing to score, or nothing to score it after")
            if (length := len(context) + len(target) - 1) > self.context:
                raise EvaluationError(
                    f"{describe(index)}: {length} positions in a context of {self.context} (model {self.name})"
                )
            if min(*context, *target) < 0 or max(*context, *target) >= self.backend.vocab_size:
                raise EvaluationError(f"{describe(index)}: a token id that {self.name} does not know")
        rows = rows_of(requests, self.context if self.backend.branches else 0)
        scores: dict[int, np.ndarray] = {}
        positions = sum(len(row.ids) for row in rows)
        with self.backend.packed(min(positions, batch_tokens), positions):
            shared, prefix = self._shared_prefix(rows)

            def score(batch: list[int]) -> None:
                for index, logp_T in self._score_batch(requests, [rows[i] for i in batch], shared, prefix).items():
                    if not np.isfinite(logp_T).all():
                        said = f"its log-likelihood under {self.name} is {logp_T.sum()}"
                        raise EvaluationError(f"{describe(index)}: {said}")
                    scores[index] = logp_T

            self._in_batches(score, [len(row.ids) - shared for row in rows], shared, batch_tokens, fill=FULL)
        return [scores[index] for index in range(len(requests))]

    def _in_batches(
        self, compute: Callable[[list[int]], None], lengths: list[int], extra: int, batch_tokens: int, fill: int = 0
    ) -> None:
        """Call `compute` with each batch of `batches_of`. Where a GPU runs out of memory, all that is left is computed
        in batches of half as many positions, and so is what this model computes later.

        Raises EvaluationError where one row does not fit.
        """
        waiting = list(range(len(lengths)))
        while waiting:
            done: set[int] = set()
            for batch in batches_of([lengths[i] for i in waiting], extra, min(batch_tokens, self.room), fill):
                chosen = [waiting[i] for i in batch]
                try:
                    compute(chosen)
                except torch.OutOfMemoryError as error:
                    longest = extra + max(lengths[i] for i in chosen)
                    if len(chosen) == 1:
                        raise EvaluationError(
                            f"{self.name}: out of memory with one row of {longest} positions; use a device with more, "
                            "or lower evaluation.window, the shots or model.context"
                        ) from error
                    self.room = len(chosen) * longest // 2
                    free_memory(error)
                    break
                done.update(chosen)
            waiting = [i for i in waiting if i not in done]

    def _shared_prefix(self, rows: list[Row]) -> tuple[int, Any]:
        """(length, cache) of what all rows begin with, e.g. the shots of a prompt. It ends before any scored token."""
        if len(rows) < 4:
            return 0, None
        shared = common_prefix_length([row.ids for row in rows])
        shared = min(shared, min(row.context for row in rows) - 1)
        prefix = self.backend.prefix(rows[0].ids[:shared]) if shared >= SHARED_PREFIX else None
        return (0, None) if prefix is None else (shared, prefix)

    def _score_batch(
        self, requests: Sequence[Request], rows: list[Row], shared: int, prefix: Any
    ) -> dict[int, np.ndarray]:
        """The scores of the requests that these rows hold, from one forward after the shared prefix."""
        tokens_BT = np.zeros((len(rows), max(len(row.ids) for row in rows) - shared), np.int64)
        branches_BT = np.full(tokens_BT.shape, -1)
        indices, at_row, at_column, targets = [], [], [], []
        for number, row in enumerate(rows):
            length = len(row.ids) - shared
            tokens_BT[number, :length] = row.ids[shared:]
            branches_BT[number, :length] = row.branches[shared:]
            for index, begin in row.requests.items():
                context, target = requests[index]
                indices.append(index)
                at_row += [number] * len(target)
                at_column += [len(context) - 1, *range(begin, begin + len(target) - 1)]
                targets += target
        h_BTD = self.backend.states(
            torch.from_numpy(tokens_BT).to(self.device), prefix, branches_BT if branches_BT.max() > 1 else None
        )
        at_column = torch.tensor(at_column, device=self.device) - shared
        h_ND = h_BTD[torch.tensor(at_row, device=self.device), at_column]
        logp_N = self._target_logprobs(h_ND, torch.tensor(targets, device=self.device))
        ends = np.cumsum([len(requests[index][1]) for index in indices])
        return dict(zip(indices, np.split(logp_N, ends[:-1]), strict=True))

    def _target_logprobs(self, h_ND: Tensor, targets_N: Tensor) -> np.ndarray:
        """Log-probability of each target; logits are computed for a bounded number of positions at a time."""
        size = max(1, (2**27 if h_ND.is_cuda else 2**23) // self.backend.vocab_size)
        logp = []
        for h_MD, targets_M in zip(h_ND.split(size), targets_N.split(size), strict=True):
            logits_MV = self.backend.head(h_MD).float()
            logp.append(logits_MV.gather(1, targets_M[:, None])[:, 0] - logits_MV.logsumexp(-1))
        return torch.cat(logp).double().cpu().numpy()

    @torch.inference_mode()
    def logprobs(self, contexts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """Full next-token log-distributions logp_TV (fp32) at positions `starts[i]` and after of each row of ids.

        For a handful of rows at a time: it holds (positions x vocabulary) floats.
        """
        width = max(map(len, contexts))
        tokens_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in contexts])
        h_BTD = self.backend.states(tokens_BT.to(self.device))
        return [
            self.backend.head(h_BTD[row, start : len(ids)]).float().log_softmax(-1)
            for row, (ids, start) in enumerate(zip(contexts, starts, strict=True))
        ]

    # Generation -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = (), *, batch_tokens: int = BATCH_TOKENS
    ) -> list[tuple[str, int]]:
        """Greedy continuation of each prompt, up to EOS, a stop string (cut off) or `max_new_tokens`; "" if nothing.
        With each the number of tokens generated: `max_new_tokens` means that it was cut off, not finished.

        Raises EvaluationError where a prompt and its new tokens exceed the context.
        """
        ids = [self.prefix_ids + encoded for encoded in self.encode(prompts)]
        longest = max(map(len, ids), default=0)
        if longest + max_new_tokens > self.context:
            raise EvaluationError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {self.context} positions of "
                f"{self.name}"
            )
        answers: dict[int, tuple[str, int]] = {}

        def answer(batch: list[int]) -> None:
            continued = self._continue([ids[i] for i in batch], batch, max_new_tokens, list(stop))
            for i, new in zip(batch, continued, strict=True):
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                for term in stop:
                    text = text.split(term)[0]
                answers[i] = (text, len(new))

        size = max(batch_tokens, self.backend.cached_positions())
        self._in_batches(answer, [len(row) for row in ids], max_new_tokens, size)
        return [answers[i] for i in range(len(ids))]

    def _continue(
        self, prompts: list[list[int]], items: list[int], max_new_tokens: int, stop: list[str]
    ) -> list[list[int]]:
        """New ids of each prompt. Where a row's logits are not finite, the rows run one by one to name the item."""
        try:
            return self.backend.generate(prompts, max_new_tokens, self.tokenizer, stop)
        except EvaluationError as error:
            if len(prompts) == 1:
                raise EvaluationError(f"item {items[0]} under {self.name}: {error}") from error
            for prompt, item in zip(prompts, items, strict=True):
                self._continue([prompt], [item], max_new_tokens, stop)
            raise


def sha256_state(model: torch.nn.Module) -> str:
    """SHA-256 over a model's state dict: each tensor's name, type, shape and bytes, in order of name."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _known_to(tokenizer: Any, vocab_size: int, name: str) -> Tokenizer:
    """A copy of the tokenizer that yields only ids below `vocab_size`.

    A padding token and the like, added without a row in the model's embedding, are left out: their text is tokenised as
    any other. A BPE may also hold tokens that no merge makes. Raises EvaluationError where other tokens or EOS have no
    row: tokenizer and model do not belong together.
    """
    beyond = {token: id for token, id in tokenizer.get_vocab().items() if id >= vocab_size}
    if not beyond:
        return copy.deepcopy(tokenizer.backend_tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added, model = {token["id"] for token in state["added_tokens"]}, state["model"]
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", ())}
    unreachable = model["type"] == "BPE" and not model.get("ignore_merges")
    for token, id in beyond.items():
        text_may_yield = id not in added and not (unreachable and len(token) > 1 and token not in merged)
        if text_may_yield or id == tokenizer.eos_token_id:
            raise EvaluationError(
                f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}: they do not belong "
                "together"
            )
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < vocab_size]
    return Tokenizer.from_str(json.dumps(state))


def _tokenizer_hash(tokenizer: Any) -> str:
    """What decides a text's ids: of a BPE without sinks and padding, so that models with and without a BOS compare."""
    if isinstance(tokenizer.backend_tokenizer.model, BPE):
        return tokenizer_hash(tokenizer)
    return sha256_bytes(tokenizer.backend_tokenizer.to_str().encode())
