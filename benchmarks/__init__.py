"""Speed compared with the libraries a user would otherwise choose; see `python -m benchmarks --help`."""
