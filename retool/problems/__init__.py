"""Where problems come from: procedural families, jsonl and parquet files, hub data sets."""

from retool.problems.families import FAMILIES, Family, Item, register
from retool.problems.load import ProblemError, load_problems

__all__ = ["FAMILIES", "Family", "Item", "ProblemError", "load_problems", "register"]
