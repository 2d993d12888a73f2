"""The published methods, one a file: a frozen dataclass of hyperparameters over pure functions of tensors."""

from .base import DecoderMethod, EncoderMethod, Method, Stage
from .fastervlm import FasterVLM
from .fastv import FastV
from .gsearch import GSearch, PSigmoid
from .pyramiddrop import PyramidDrop
from .registry import METHODS, available, get_method

__all__ = [
    "METHODS",
    "DecoderMethod",
    "EncoderMethod",
    "FastV",
    "FasterVLM",
    "GSearch",
    "Method",
    "PSigmoid",
    "PyramidDrop",
    "Stage",
    "available",
    "get_method",
]
