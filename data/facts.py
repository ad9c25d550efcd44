"""What every registered source that can be found here holds, as the Markdown table of data/README.md.

    python data/facts.py [--data-dir DATA]

Documents, words and bytes are those of the text pretraining would read; tokens are GPT-2's if its tokenizer is found.
A source that is not found is left out and named on standard error.
"""

import argparse
import sys

from basics.errors import SourceError
from threefold.config import SourceConfig, TokenizerConfig
from threefold.data import corpus
from threefold.data.registry import registry
from threefold.data.tokenizer import build_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="", help="local data folder (default: $THREEFOLD_DATA)")
    data_dir = parser.parse_args().data_dir
    try:
        tokenizer = build_tokenizer(TokenizerConfig(kind="gpt2"), data_dir=data_dir)
    except SourceError as error:
        tokenizer = None
        print(f"no token counts: {error}", file=sys.stderr)
    print("| source | split | found | documents | words | bytes | GPT-2 tokens |")
    print("|---|---|---|---:|---:|---:|---:|")
    for source in registry().values():
        for split in source.all_splits if source.kind == "dataset" else ():
            try:
                facts = corpus.describe(SourceConfig(source=source.name, split=split), data_dir, tokenizer)
            except SourceError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            counts = " | ".join(f"{facts.get(key, 0):,}" for key in ("documents", "words", "bytes", "tokens"))
            print(f"| {facts['name']} | {facts['split']} | {facts['kind']} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
