"""The published methods, one a file: a frozen dataclass of hyperparameters over pure functions of tensors."""

from .ademvl import ADEMVL
from .base import DecoderMethod, EncoderMethod, Method, Stage, TensorMethod
from .damro import DAMRO
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .fopru import FoPru
from .globalcom2 import GlobalCom2
from .gsearch import GSearch, PSigmoid
from .hired import HiRED
from .lrs import LRS
from .mirage import MIRAGE
from .paint import PAINT
from .pyramiddrop import PyramidDrop
from .registry import METHODS, available, get_method
from .slime import SliME
from .tsllava import TSLLaVA
from .vispruner import VisPruner
from .vtc_cls import VTCCLS

__all__ = [
    "ADEMVL",
    "DAMRO",
    "LRS",
    "METHODS",
    "MIRAGE",
    "PAINT",
    "VTCCLS",
    "DecoderMethod",
    "DivPrune",
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
    "SliME",
    "Stage",
    "TSLLaVA",
    "TensorMethod",
    "VisPruner",
    "available",
    "get_method",
]
