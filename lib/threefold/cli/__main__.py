"""`python -m threefold.cli`: the command line where the package is not installed."""

import sys

from threefold.cli import main

sys.exit(main())
