"""The published methods, one a file: a frozen dataclass of hyperparameters over pure functions of tensors."""

from .base import DecoderMethod, EncoderMethod, Method, Stage, TensorMethod
from .damro import DAMRO
from .fastervlm import FasterVLM
from .fastv import FastV
from .gsearch import GSearch, PSigmoid
from .hired import HiRED
from .pyramiddrop import PyramidDrop
from .registry import METHODS, available, get_method
from .tsllava import TSLLaVA
from .vtc_cls import VTCCLS

__all__ = [
    "DAMRO",
    "METHODS",
    "VTCCLS",
    "DecoderMethod",
    "EncoderMethod",
    "FastV",
    "FasterVLM",
    "GSearch",
    "HiRED",
    "Method",
    "PSigmoid",
    "PyramidDrop",
    "Stage",
    "TSLLaVA",
    "TensorMethod",
    "available",
    "get_method",
]
