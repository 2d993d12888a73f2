"""The published methods, one a file: a frozen dataclass of hyperparameters over pure functions of tensors."""

from .ademvl import ADEMVL
from .base import DecoderMethod, EncoderMethod, Method, Stage, TensorMethod
from .damro import DAMRO
from .fastervlm import FasterVLM
from .fastv import FastV
from .fopru import FoPru
from .globalcom2 import GlobalCom2
from .gsearch import GSearch, PSigmoid
from .hired import HiRED
from .mirage import MIRAGE
from .pyramiddrop import PyramidDrop
from .registry import METHODS, available, get_method
from .tsllava import TSLLaVA
from .vtc_cls import VTCCLS

__all__ = [
    "ADEMVL",
    "DAMRO",
    "METHODS",
    "MIRAGE",
    "VTCCLS",
    "DecoderMethod",
    "EncoderMethod",
    "FastV",
    "FasterVLM",
    "FoPru",
    "GSearch",
    "GlobalCom2",
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
