"""The tokenizer: ids, sinks before every sequence, save and load without our code, determinism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig

from basics.errors import DataError, SourceError
from threefold.config import SourceConfig, TokenizerConfig
from threefold.data import corpus
from threefold.data.arrays import Documents
from threefold.data.tokenizer import (
    build_tokenizer,
    decode_stream,
    encode,
    load_tokenizer,
    sink_ids,
    sink_tokens,
    tokenizer_hash,
    with_sinks,
)

DATA = Path(os.environ.get("THREEFOLD_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
GPT2 = DATA / "gpt2-bpe"
real = pytest.mark.skipif(
    not GPT2.is_dir(), reason=f"no GPT-2 tokenizer: THREEFOLD_DATA or {DATA.parent.name}/{DATA.name}"
)
TEXTS = [
    f"The {word} number {i} sat on the mat; it's {i * i}." for i in range(300) for word in ("cat", "dog", "größte")
]


@pytest.fixture(scope="module")
def trained():
    return build_tokenizer(TokenizerConfig(vocab_size=400), TEXTS, sinks=1, context=128)


def plain(tokenizer, text):
    return next(encode(tokenizer, [text])).tolist()


@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_sinks_stand_before_every_sequence(sinks):
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=400), TEXTS, sinks=sinks)
    assert len(tokenizer) == 400
    prefix = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|sink1|>", "<|sink2|>", "<|sink3|>"][:sinks])
    assert sink_ids(tokenizer) == prefix and len(set(prefix)) == sinks
    assert tokenizer("The cat").input_ids == prefix + plain(tokenizer, "The cat")
    assert tokenizer("The cat", add_special_tokens=False).input_ids == plain(tokenizer, "The cat")
    assert tokenizer.decode(tokenizer("The cat").input_ids, skip_special_tokens=True) == "The cat"
    assert tokenizer.bos_token == ("<|bos|>" if sinks else "<|endoftext|>")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id not in prefix


@given(text=st.text(max_size=60))
def test_any_text_comes_back(trained, text):
    assert trained.decode(plain(trained, text), clean_up_tokenization_spaces=False) == text


def test_special_tokens_in_a_text_are_text(trained):
    ids = plain(trained, "a <|bos|> and <|endoftext|>")
    assert trained.bos_token_id not in ids and trained.eos_token_id not in ids
    assert trained.decode(ids) == "a <|bos|> and <|endoftext|>"
    assert trained("<|endoftext|>").input_ids == [trained.bos_token_id, trained.eos_token_id]  # unless asked for


def test_a_saved_folder_loads_anywhere(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=400).save_pretrained(tmp_path)  # as beside a checkpoint
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded("The cat").input_ids == trained("The cat").input_ids
        assert loaded.model_max_length == 128
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 0, 0)
        assert tokenizer_hash(loaded) == tokenizer_hash(trained)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode("The cat").ids == trained("The cat").input_ids
    with pytest.raises(SourceError, match=r"no tokenizer\.json in it"):
        load_tokenizer(tmp_path / "nowhere")


def test_without_sinks_keeps_ids(trained, tmp_path):
    bare = with_sinks(trained, 0)
    assert bare("The cat").input_ids == plain(trained, "The cat")
    assert bare.bos_token_id == bare.eos_token_id == trained.eos_token_id
    assert len(bare) == len(trained) and sink_ids(bare) == []
    assert tokenizer_hash(bare) == tokenizer_hash(trained)
    bare.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("The cat").input_ids == plain(trained, "The cat")
    assert sink_ids(trained) == [1]  # the original is as it was


def test_with_sinks_adds_the_missing_ones(trained):
    four = with_sinks(trained, 4)
    assert sink_ids(four) == [1, 400, 401, 402] and len(four) == 403
    assert plain(four, TEXTS[0]) == plain(trained, TEXTS[0])
    assert tokenizer_hash(four) == tokenizer_hash(trained)


def test_encoded_documents_are_the_texts(trained):
    documents = Documents.of(list(encode(trained, [*TEXTS[:5], ""])), trained.eos_token_id)
    assert [trained.decode(documents[i]) for i in range(6)] == [*TEXTS[:5], ""]
    assert documents.tokens[0] == trained.eos_token_id
    assert (documents.tokens[documents.offsets[1:] - 1] == trained.eos_token_id).all()


def test_training_is_deterministic(trained):
    program = (
        "from threefold.config import TokenizerConfig\n"
        "from threefold.data.tokenizer import build_tokenizer, tokenizer_hash\n"
        f"print(tokenizer_hash(build_tokenizer(TokenizerConfig(vocab_size=400), {TEXTS!r})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": "2"}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert output.strip() == tokenizer_hash(trained)


def test_impossible_sizes():
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size = 100: at least 258 \(256 bytes and 2 special\)"):
        build_tokenizer(TokenizerConfig(vocab_size=100), TEXTS)
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size = 5000, but the text gives only \d+ tokens"):
        build_tokenizer(TokenizerConfig(vocab_size=5000), TEXTS)


def test_the_sample_fills_a_tokenizer():
    sources = [SourceConfig(source="sample-text"), SourceConfig(source="sample-stories")]
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=1024), corpus.mixture_texts(sources))
    text = "Wilma sang of the market."
    assert len(plain(tokenizer, text)) < len(text) / 2.5


@real
@pytest.mark.parametrize("sinks", [0, 2])
def test_gpt2_keeps_its_ids(sinks, tmp_path):
    tokenizer = build_tokenizer(TokenizerConfig(kind="gpt2"), sinks=sinks, data_dir=DATA)
    assert sink_ids(tokenizer) == list(range(50257, 50257 + sinks))
    assert len(tokenizer) == 50257 + sinks and tokenizer.eos_token_id == 50256
    assert plain(tokenizer, "Hello, world!") == [15496, 11, 995, 0]
    official = AutoTokenizer.from_pretrained(GPT2)
    text = (DATA / "wikitext-2" / "wiki.valid.raw").read_text(encoding="utf-8")[:200_000]
    assert plain(tokenizer, text) == official(text).input_ids
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("Hello, world!").input_ids == [*range(50257, 50257 + sinks), 15496, 11, 995, 0]


def test_another_tokenizer_is_not_gpt2s(trained, tmp_path):
    (tmp_path / "gpt2-bpe").mkdir()
    trained.backend_tokenizer.save(str(tmp_path / "gpt2-bpe" / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer\.json: not GPT-2's tokenizer"):
        build_tokenizer(TokenizerConfig(kind="gpt2"), data_dir=tmp_path)


def test_names_of_sinks():
    assert sink_tokens(0) == [] and sink_tokens(3) == ["<|bos|>", "<|sink1|>", "<|sink2|>"]


@given(st.lists(st.integers(0, 399), max_size=60))
def test_streamed_text_is_the_decoded_text(trained, ids):
    ids = [*ids, *trained("a", add_special_tokens=False)["input_ids"]]  # no character is cut off at the end
    assert "".join(decode_stream(trained, ids)) == trained.decode(ids, skip_special_tokens=True)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_streamed_text_never_holds_half_a_character(trained, text):
    ids = trained(text, split_special_tokens=True)["input_ids"]
    assert "".join(decode_stream(trained, ids)) == text
    for end in range(len(ids)):
        assert text.startswith("".join(decode_stream(trained, ids[:end])))


def test_streamed_text_comes_with_the_token_that_completes_it(trained):
    ids = iter(trained("aé€𝄞", add_special_tokens=False)["input_ids"])  # 1 to 4 bytes, no merges
    assert list(decode_stream(trained, ids)) == list("aé€𝄞")
    ids = iter(trained("a€b", add_special_tokens=False)["input_ids"])
    pieces = decode_stream(trained, ids)
    assert (next(pieces), len(list(ids))) == ("a", 4), "nothing is read ahead"


def test_streamed_text_keeps_a_byte_that_no_character_has(trained):
    ids = trained("aé", add_special_tokens=False)["input_ids"]
    assert list(decode_stream(trained, [ids[0], ids[2], ids[0], ids[2]])) == ["a", "\ufffd", "a", "\ufffd"]
