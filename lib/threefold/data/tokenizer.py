"""The tokenizer of a run: GPT-2's byte-level BPE, or one learned on the preset's own pretraining text.

Special tokens: `<|bos|>` is the first attention sink, `<|sink1|>`.. the further ones; `<|endoftext|>` ends a document
and pads. A tokenizer with sinks puts them before every sequence by itself (its post-processor), so that transformers,
vLLM or llama.cpp run the model as it was trained.
"""

import codecs
import copy
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from basics.errors import DataError, SourceError
from basics.files import refuse_pointer, sha256_json
from threefold.config import GPT2_VOCABULARY, TokenizerConfig
from threefold.data.sources import gpt2_tokenizer_file
from threefold.data.templates import chat_template

BOS = "<|bos|>"
EOS = "<|endoftext|>"
BYTES = 256  # every byte is a token of its own
CHUNK = 2048  # texts tokenised at a time


def sink_tokens(sinks: int) -> list[str]:
    """The texts of k sink tokens: `<|bos|>`, `<|sink1|>`, ..."""
    return [BOS, *(f"<|sink{index}|>" for index in range(1, sinks))][:sinks]


def build_tokenizer(
    config: TokenizerConfig,
    texts: Iterable[str] = (),
    sinks: int = 1,
    data_dir: str | Path = "",
    context: int | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer a preset asks for, with `sinks` sink tokens (0: none, and `<|endoftext|>` is BOS and EOS as in
    GPT-2).

    kind "train": a byte-level BPE of `vocab_size` tokens learned on `texts`; the same texts in the same order give the
    same tokenizer. kind "gpt2": GPT-2's ids unchanged, and one new id for each sink; found like a data source
    (`gpt2-bpe`). context: the model's positions, for tools that ask the tokenizer. Raises DataError if the texts do not
    hold enough for that many tokens, SourceError if GPT-2's files are nowhere.
    """
    if config.kind == "gpt2":
        file = gpt2_tokenizer_file(data_dir)
        refuse_pointer(file)
        backend = Tokenizer.from_file(str(file))
        if backend.get_vocab_size() != GPT2_VOCABULARY or backend.token_to_id(EOS) != GPT2_VOCABULARY - 1:
            raise DataError(f"{file}: not GPT-2's tokenizer (50,257 tokens, the last one {EOS})")
    else:
        backend = train_bpe(texts, config.vocab_size, [EOS, *sink_tokens(sinks)], config.split_digits)
    return wrap(backend, sinks, context)


def train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str], split_digits: bool = False
) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; GPT-2's splitting into words) whose ids begin with the special tokens.

    Raises DataError if vocab_size cannot be reached on these texts or is smaller than bytes and special tokens
    together.
    """
    least = BYTES + len(special_tokens)
    if vocab_size < least:
        raise DataError(
            f"tokenizer.vocab_size = {vocab_size}: at least {least} (256 bytes and {len(special_tokens)} special)"
        )
    tokenizer = Tokenizer(models.BPE())
    splitting = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split_digits:
        splitting = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splitting])
    tokenizer.pre_tokenizer = splitting
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"tokenizer.vocab_size = {vocab_size}, but the text gives only {tokenizer.get_vocab_size()} tokens: "
            "set a smaller tokenizer.vocab_size or more text in data.pretrain"
        )
    return tokenizer


def wrap(backend: Tokenizer, sinks: int, context: int | None = None) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around a byte-level BPE that knows EOS; sink tokens it lacks are added at the end."""
    prefix = sink_tokens(sinks)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [EOS, *prefix]])
    backend.post_processor = _prefixing(prefix, [backend.token_to_id(token) for token in prefix])
    further = {"extra_special_tokens": prefix[1:]} if prefix[1:] else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=prefix[0] if prefix else EOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        **further,
        **({"model_max_length": context} if context else {}),
    )


def with_sinks(tokenizer: PreTrainedTokenizerFast, sinks: int) -> PreTrainedTokenizerFast:
    """The same ids for a model with `sinks` sink tokens; those the tokenizer lacks get new ids at the end.

    sinks = 0 gives GPT-2's form: nothing is put before a sequence, BOS and EOS are `<|endoftext|>`.
    """
    length = tokenizer.model_max_length
    context = length if length < 10**9 else None  # transformers writes 1e30 for "unknown"
    return wrap(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), sinks, context)


def sink_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids it puts before every sequence: one for each sink of the model, none for GPT-2's kind."""
    return list(tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids)


def set_chat_template(tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    """Make `apply_chat_template` give the prompts of a form (see `threefold.data.templates`), sinks in front."""
    tokenizer.chat_template = chat_template(form, "".join(tokenizer.convert_ids_to_tokens(sink_ids(tokenizer))))


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a folder by `save_pretrained`. Raises SourceError if there is none or it is damaged."""
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SourceError(f"{folder}: no tokenizer.json in it")
    refuse_pointer(file)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a file that is not a tokenizer
        said = " ".join(str(error).split())[:300]
        raise SourceError(f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {said}") from error
    for key in ("local_files_only", "trust_remote_code"):  # how it was loaded would be saved with it
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what decides a text's ids: vocabulary, merges and splitting. Sinks and padding do not count."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("truncation", "padding", "post_processor", "added_tokens"):
        state.pop(part, None)
    # A sink has another id in a tokenizer trained with it and in GPT-2's; the ids of text are what is left.
    special = re.compile(r"<\|(bos|endoftext|sink\d+)\|>")
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: id for token, id in vocabulary.items() if not special.fullmatch(token)}
    state["eos"] = tokenizer.eos_token_id
    return sha256_json(state)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each text, uint32, without sinks and EOS. What looks like a special token in a text is plain text."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    texts = iter(texts)
    while batch := list(islice(texts, CHUNK)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(encoding.ids, np.uint32)


def decode_stream(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come, special tokens left out. A token may hold only a part of a character, which waits
    for the rest. The pieces together are what `tokenizer.decode` makes of all ids, but for a character cut off at the
    end. The tokenizer must be a byte-level BPE, as all are here."""
    special, byte_of = set(tokenizer.all_special_ids), {char: byte for byte, char in bytes_to_unicode().items()}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # unlike tokenizers', it holds no invalid byte
    for id in ids:
        if id not in special:
            token = tokenizer.convert_ids_to_tokens(id)
            if piece := decoder.decode(bytes(map(byte_of.__getitem__, token))):
                yield piece


def _prefixing(prefix: list[str], ids: list[int]) -> processors.PostProcessor:
    offsets = processors.ByteLevel(trim_offsets=False)
    if not prefix:
        return offsets
    before = " ".join(prefix)
    template = processors.TemplateProcessing(
        single=f"{before} $A", pair=f"{before} $A $B:1", special_tokens=list(zip(prefix, ids, strict=True))
    )
    return processors.Sequence([offsets, template])
