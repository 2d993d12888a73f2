"""The published methods, one a file: a frozen dataclass of hyperparameters over pure functions of tensors."""

from .ademvl import ADEMVL
from .aim import AIM
from .aim_merge import AIMMerge
from .atp_llava import ATPLLaVA
from .ats import ATS
from .avit import AViT
from .base import BlockMethod, DecoderMethod, EncoderMethod, Method, Stage, TensorMethod
from .chatunivi import ChatUniVi
from .damro import DAMRO
from .dart import DART
from .diffrate import DiffRate
from .divprune import DivPrune
from .dpcknn import DPCKNN
from .dynamicvit import DynamicViT
from .dyvte import DyVTE
from .evit import EViT
from .fastervlm import FasterVLM
from .fastv import FastV
from .feather import FEATHER
from .fopru import FoPru
from .globalcom2 import GlobalCom2
from .gsearch import GSearch, PSigmoid
from .hired import HiRED
from .ia_red2 import IARed2
from .leopard import Leopard
from .llava_ov_pool import LLaVAOneVision
from .llavolta import LLaVolta
from .lrs import LRS
from .lscene import LSceneLLM
from .mirage import MIRAGE
from .paint import PAINT
from .pitome import PiToMe
from .prumerge import PruMerge
from .prumerge_plus import PruMergePlus
from .pvc import PVC
from .pyramiddrop import PyramidDrop
from .red_villm import REDVILLM
from .registry import METHODS, available, get_method
from .slime import SliME
from .sparsevlm import SparseVLM
from .stvit import STViT
from .texthawk2 import TextHawk2
from .tofu import ToFu
from .tome import ToMe
from .tomesd import ToMeSD
from .topvim import ToPViM
from .tsllava import TSLLaVA
from .turbo import Turbo
from .var_sink import VAR
from .videollm_mod import VideoLLMMoD
from .views import BlockStep, BlockView
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vtc_cls import VTCCLS

__all__ = [
    "ADEMVL",
    "AIM",
    "ATS",
    "DAMRO",
    "DART",
    "DPCKNN",
    "FEATHER",
    "LRS",
    "METHODS",
    "MIRAGE",
    "PAINT",
    "PVC",
    "REDVILLM",
    "VAR",
    "VTCCLS",
    "AIMMerge",
    "ATPLLaVA",
    "AViT",
    "BlockMethod",
    "BlockStep",
    "BlockView",
    "ChatUniVi",
    "DecoderMethod",
    "DiffRate",
    "DivPrune",
    "DyVTE",
    "DynamicViT",
    "EViT",
    "EncoderMethod",
    "FastV",
    "FasterVLM",
    "FoPru",
    "GSearch",
    "GlobalCom2",
    "HiRED",
    "IARed2",
    "LLaVAOneVision",
    "LLaVolta",
    "LSceneLLM",
    "Leopard",
    "Method",
    "PSigmoid",
    "PiToMe",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "STViT",
    "SliME",
    "SparseVLM",
    "Stage",
    "TSLLaVA",
    "TensorMethod",
    "TextHawk2",
    "ToFu",
    "ToMe",
    "ToMeSD",
    "ToPViM",
    "Turbo",
    "VideoLLMMoD",
    "VisPruner",
    "VisionZip",
    "available",
    "get_method",
]
