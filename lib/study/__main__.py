"""`python -m study`: the command line where the package is not installed, and a worker's under torchrun."""

import sys

from study.cli import main

sys.exit(main())
