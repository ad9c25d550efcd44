"""Stand-ins for what preset `full` takes from the hub: repositories with the layout, file forms and columns of the
published ones (several configs, many shards, files in folders, what must not be taken), and random content."""

import gzip
import json
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from fake_hub import parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as bpe
from transformers import GPT2Config, GPT2LMHeadModel

MODELS = {"openai-community/gpt2": 12, "distilbert/distilgpt2": 6}  # layers
WEIGHTS = "model.safetensors"
SHARDS = 41  # of the English Wikipedia
WORDS = ["river", "mill", "stone", "runs", "turns", "over", "north", "with", "water", "grain", "and", "slow", "year"]
NEVER_TAKEN = ("pytorch_model.bin", "flax_model.msgpack", "onnx/model.safetensors")  # of a model's repository


def data_sets() -> dict[str, dict[str, bytes]]:
    """{repository: files}, with a few more rows than those of Alpaca that preset `full` leaves to the evaluation."""
    random = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(random.choice(WORDS, words)) + f" {random.integers(10**6)}."

    def wikitext(articles: int) -> bytes:
        lines = [line for n in range(articles) for line in ("", f" = Article {n} = \n", "", f" {text(300)} \n")]
        return parquet([{"text": line} for line in lines])

    def dialogues(rows: int) -> bytes:
        asked = [f"\n\nHuman: {text(8)}\n\nAssistant:" for _ in range(rows)]
        pairs = [{"chosen": f"{prompt} {text(9)}", "rejected": f"{prompt} {text(9)}"} for prompt in asked]
        return gzip.compress("".join(json.dumps(pair) + "\n" for pair in pairs).encode())

    def split_files(folder: str, rows: dict[str, bytes]) -> dict[str, bytes]:
        return {f"{folder}/{split}-00000-of-00001.parquet": content for split, content in rows.items()}

    instructions = [{"instruction": f"{text(5)}", "input": "", "output": text(6), "text": ""} for _ in range(1060)]
    problems = [{"question": f"{text(9)} How many?", "answer": f"{text(5)}\n#### {n}"} for n in range(20)]
    sentences = [{"sentence": text(6), "label": n % 2, "idx": n} for n in range(60)]
    stories = [[{"text": text(80)} for _ in range(20)] for _ in range(5)]
    articles = [{"id": str(n), "url": "", "title": "", "text": text(60)} for n in range(3 * SHARDS)]
    all_three = ("train", "validation", "test")
    return {
        "datasets/Salesforce/wikitext": {
            "README.md": _card("wikitext-103-raw-v1", "wikitext-2-raw-v1", splits=all_three),
            "wikitext-103-raw-v1/train-00000-of-00002.parquet": wikitext(20),
            "wikitext-103-raw-v1/train-00001-of-00002.parquet": wikitext(20),
            **split_files("wikitext-103-raw-v1", {"validation": wikitext(2), "test": wikitext(2)}),
            **split_files("wikitext-2-raw-v1", {split: wikitext(2) for split in all_three}),
        },
        "datasets/wikimedia/wikipedia": {
            "README.md": _card("20231101.ang", "20231101.en", splits=("train",), rows=len(articles)),
            **{
                f"20231101.en/train-{n:05}-of-{SHARDS:05}.parquet": parquet(articles[3 * n : 3 * n + 3])
                for n in range(SHARDS)
            },
            **split_files("20231101.ang", {"train": parquet(articles[:1])}),
        },
        "datasets/roneneldan/TinyStories": {
            "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
            "TinyStories-train.txt": b"not to be read",
            **{f"data/train-{n:05}-of-00004-2d5a1467fff1081b.parquet": parquet(stories[n]) for n in range(4)},
            "data/validation-00000-of-00001-869c898b519ad725.parquet": parquet(stories[4]),
        },
        "datasets/tatsu-lab/alpaca": {
            "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
            "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(instructions),
        },
        "datasets/Anthropic/hh-rlhf": {
            "README.md": b"---\nlicense: mit\n---\n",
            "red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(b'{"transcript": "not to be read"}\n'),
            **{
                f"{folder}/{split}.jsonl.gz": dialogues(rows)
                for folder in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
                for split, rows in (("train", 3), ("test", 1))
            },
        },
        "datasets/nyu-mll/glue": {
            "README.md": _card("cola", "sst2", splits=("train", "validation")),
            **split_files("cola", {split: parquet(sentences[:1]) for split in ("train", "validation")}),
            **split_files("sst2", {"train": parquet(sentences), "validation": parquet(sentences[:4])}),
        },
        "datasets/openai/gsm8k": {
            "README.md": _card("main", "socratic", splits=("train", "test")),
            **split_files("main", {"train": parquet(problems[:18]), "test": parquet(problems[18:])}),
            **split_files("socratic", {"train": parquet(problems[:1]), "test": parquet(problems[:1])}),
        },
    }


def _card(*configs: str, splits: tuple[str, ...] = (), rows: int = 0) -> bytes:
    """A data card with configs, each in a folder of its name. rows: of the last config's train split, as cards say."""
    lines = ["configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {config}/{split}-*" for split in splits]
    if rows:
        lines += ["dataset_info:", f"- config_name: {configs[-1]}", "  splits:"]
        lines += [f"  - name: train\n    num_bytes: 1\n    num_examples: {rows}"]
    return ("---\n" + "\n".join(lines) + "\n---\n").encode()


def models(folder: Path, **sizes: int) -> dict[str, dict[str, bytes | Path]]:
    """{repository: files} of GPT-2 and DistilGPT-2 with random weights, in a folder. sizes: of `GPT2Config`, to make
    them small."""
    tokenizer = _tokenizer().to_str().encode()
    repositories: dict[str, dict[str, bytes | Path]] = {}
    for number, (name, layers) in enumerate(MODELS.items()):
        saved = folder / name
        torch.manual_seed(number)
        model = GPT2LMHeadModel(GPT2Config(**{"n_layer": layers, **sizes}))
        model.save_pretrained(saved)
        # the published files have no prefix and hold the masks, which are no weights
        weights = {key.removeprefix("transformer."): value for key, value in load_file(saved / WEIGHTS).items()}
        mask = torch.ones(1, 1, model.config.n_positions, model.config.n_positions).tril()
        weights |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(model.config.n_layer)}
        save_file(weights, saved / WEIGHTS, {"format": "pt"})
        repositories[name] = {
            "config.json": saved / "config.json",
            WEIGHTS: saved / WEIGHTS,
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": json.dumps(
                {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}
            ).encode(),
            **dict.fromkeys(NEVER_TAKEN, b"not to be read"),
        }
    return repositories


def _tokenizer() -> Tokenizer:
    """A byte-level BPE with as many tokens as GPT-2's, whose merges join pairs of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (not letter.isascii(), letter))
    merges = list(islice(product(letters, letters), 50_000))
    vocabulary = [*letters, *map("".join, merges), "<|endoftext|>"]
    tokenizer = Tokenizer(bpe.BPE({token: number for number, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
