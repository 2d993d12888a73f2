"""Schedules: the share of image tokens that every decoder layer sees, written down, drawn as a curve, or searched for."""

from .bayesian import search_sigmoid
from .curves import check_rates, keep_counts, ratio, sigmoid
from .evaluations import SearchResult
from .greedy import search

__all__ = ["SearchResult", "check_rates", "keep_counts", "ratio", "search", "search_sigmoid", "sigmoid"]
