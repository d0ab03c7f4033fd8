"""Comparisons of methods under one budget: train and score methods x data sets x seeds, then tabulate the results."""

from fgfast.compare.comparison import Comparison
from fgfast.compare.entries import Entry

__all__ = ["Comparison", "Entry"]
