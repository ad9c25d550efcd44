"""`python -m benchmarks [PART ...]`: threefold and its peers on the same data, model and machine, interleaved.

Each part writes benchmarks/results/<part>.json and .md as soon as it is measured; a failed part does not stop the rest.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.harness import Options, run, write
from benchmarks.parts import PARTS
from benchmarks.setup import SIZES

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--size", choices=SIZES, default="7m", help="of the model and of a round")
    parser.add_argument(
        "--data",
        choices=("auto", "real", "sample"),
        default="auto",
        help="for parts that do not fix it; auto: ../shared/data where it exists, else the sample",
    )
    parser.add_argument("--rounds", type=int, default=-1, help="default: each part's own number")
    parser.add_argument("--threads", type=int, default=0, help="default: the number of idle cores")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="peers with TEXT in their name")
    parser.add_argument("--missing", action="store_true", help="leave out parts that have results")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    failed = []
    for part in options.parts or PARTS:
        if options.missing and (options.results / f"{part}.json").is_file():
            print(f"{part}: measured already")
            continue
        chosen = Options(options.size, options.data, options.rounds, options.threads, tuple(options.only))
        try:
            result = run(part, chosen, lambda line: print(line, flush=True))
        except SystemExit as error:
            print(f"{part}: {error}", file=sys.stderr)
            failed.append(part)
            continue
        _, table = write(result, options.results)
        print(f"\n{table.read_text(encoding='utf-8')}", flush=True)
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; --missing measures the parts that have no results")
