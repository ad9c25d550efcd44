"""From the records of a run to tables, figures, insights and claims. Every function takes a `Comparison`."""

from threefold.comparison.load import Comparison
from threefold.comparison.results import Result

__all__ = ["Comparison", "Result"]
