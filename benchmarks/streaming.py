"""Memory and speed of one stream at growing lengths: a Markdown table.

    python benchmarks/streaming.py                  # about a minute on one core

A small randomly initialised model generates one stream up to the last length. At each length on the way: the size of
the streaming cache, the size of a full cache, the process's peak resident memory so far, and the speed since the
previous length, in CPU time, on which other processes have little influence. Memory is constant where the columns of
the cache and of the peak do not grow.
"""

import argparse
import resource
import sys
import time

import torch

from threefold.config import ModelConfig
from threefold.model import Decoder, KVCache, StreamingCache, stream

MODEL = ModelConfig(n_layer=2, d_model=64, n_head=2, d_ff=160, context=256, vocab_size=512)


def peak_rss() -> float:
    """Peak resident memory of this process in MiB (ru_maxrss counts KiB on Linux, bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 65536], metavar="TOKENS")
    parser.add_argument("--window", type=int, default=-1, metavar="W", help="default: the context less the sinks")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Decoder(MODEL).eval()
    cache = StreamingCache.of(model, 1, options.window)
    tokens = stream(model, [0], cache, max(options.lengths))

    print(
        f"Model: {MODEL.n_layer} layers, width {MODEL.d_model}, context {MODEL.context}; cache of {cache.sinks} sink "
        f"and a window of {cache.window}; threads: {options.threads}; peak at its start {peak_rss():.1f} MiB.\n"
    )
    print(
        "| generated tokens | streaming cache, KiB | cache of everything, KiB | peak RSS, MiB | tokens per CPU second |"
    )
    print("|---:|---:|---:|---:|---:|")
    done = 0
    for length in sorted(options.lengths):
        begun = time.process_time()
        for _ in range(length - done):
            next(tokens)
        speed = (length - done) / (time.process_time() - begun)
        held, everything = (part.nbytes / 2**10 for part in (cache, KVCache(MODEL, 1, length, device="meta")))
        print(f"| {length:,} | {held:,.0f} | {everything:,.0f} | {peak_rss():.1f} | {speed:,.0f} |", flush=True)
        done = length


if __name__ == "__main__":
    main()
