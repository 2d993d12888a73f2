"""The list of methods, for the command line, the documentation, the tests and the benchmarks."""

from __future__ import annotations

import difflib

from .ademvl import ADEMVL
from .aim import AIM
from .aim_merge import AIMMerge
from .atp_llava import ATPLLaVA
from .ats import ATS
from .avit import AViT
from .base import Method
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
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vtc_cls import VTCCLS

_ALL: tuple[type[Method], ...] = (
    PyramidDrop,
    FastV,
    FasterVLM,
    GSearch,
    PSigmoid,
    VTCCLS,
    HiRED,
    TSLLaVA,
    DAMRO,
    FoPru,
    GlobalCom2,
    MIRAGE,
    ADEMVL,
    DivPrune,
    VisPruner,
    SliME,
    LRS,
    PAINT,
    DART,
    FEATHER,
    SparseVLM,
    AIM,
    DyVTE,
    ATPLLaVA,
    VideoLLMMoD,
    VAR,
    LSceneLLM,
    DynamicViT,
    AViT,
    ATS,
    IARed2,
    ToPViM,
    ToMe,
    ToMeSD,
    EViT,
    Turbo,
    PiToMe,
    DiffRate,
    ToFu,
    PruMerge,
    PruMergePlus,
    VisionZip,
    AIMMerge,
    DPCKNN,
    ChatUniVi,
    LLaVolta,
    LLaVAOneVision,
    Leopard,
    STViT,
    TextHawk2,
    PVC,
    REDVILLM,
)
METHODS: dict[str, type[Method]] = {method.__name__: method for method in _ALL}


def available() -> tuple[str, ...]:
    """Names of all methods.

    Example:
        >>> available()[:3]
        ('PyramidDrop', 'FastV', 'FasterVLM')
    """
    return tuple(METHODS)


def get_method(name: str) -> type[Method]:
    """The method of that name, in any case.

    Raises:
        TypeError: name is no string.
        ValueError: an unknown name; the message has the nearest one.

    Example:
        >>> get_method("fastv")(ratio=0.75).keep_count(0, 576)
        144
        >>> get_method("FastVML")
        Traceback (most recent call last):
        ValueError: tokensieve.methods: unknown method 'FastVML'; did you mean 'FastV'? There are: PyramidDrop, FastV, FasterVLM...
    """
    if not isinstance(name, str):
        raise TypeError(f"tokensieve.methods: name must be a str, got {name!r}")
    by_key = {key.lower(): method for key, method in METHODS.items()}
    if name.lower() in by_key:
        return by_key[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_key, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"tokensieve.methods: unknown method {name!r}; did you mean {by_key[near].__name__!r}? There are: {', '.join(METHODS)}"
    )
