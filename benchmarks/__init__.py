"""Speed against what a user would pick instead, measured by turns; see `python -m benchmarks --help`."""
