"""From the records of a run to tables, figures, findings and claims. Every function takes a `Comparison`."""

from study.comparison.load import Comparison
from study.comparison.results import Result

__all__ = ["Comparison", "Result"]
