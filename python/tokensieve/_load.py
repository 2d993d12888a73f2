"""Loads the compiled libraries once and remembers why one did not load."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
CPU_LEVELS = ("baseline", "avx2", "avx512")


@dataclass
class LoadState:
    """What loaded: `cuda_error` is None where the CUDA library works, else the reason in one sentence."""

    cpu_level: str
    cuda_loaded: bool
    cuda_error: str | None
    build: dict[str, Any]
    wgmma: bool = False  # whether the kernels on sm_90a's warpgroup tensor cores were asked for


def _build_facts() -> dict[str, Any]:
    path = FOLDER / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load_cpu() -> str:
    library = FOLDER / "_C.so"
    if not library.exists():
        raise ImportError(
            f"tokensieve: the compiled library {library.name} is missing. Install the wheel, or run `make build` in a source checkout."
        )
    torch.ops.load_library(str(library))
    wanted = os.environ.get("TOKENSIEVE_CPU")
    if wanted is not None:
        if wanted not in CPU_LEVELS:
            raise ImportError(f"tokensieve: TOKENSIEVE_CPU must be one of {', '.join(CPU_LEVELS)}, got {wanted!r}")
        try:
            torch.ops.tokensieve.set_cpu_level(CPU_LEVELS.index(wanted))
        except RuntimeError as error:
            raise ImportError(f"tokensieve: TOKENSIEVE_CPU={wanted} is not supported by this machine ({error})") from error
    return CPU_LEVELS[torch.ops.tokensieve.cpu_level()]


def _load_cuda(build: dict[str, Any]) -> str | None:
    """Loads the CUDA library; returns the reason where it can't be."""
    library = FOLDER / "_C_cuda.so"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not library.exists():
        return "this wheel was built without nvcc and holds no CUDA library"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} (built by nvcc {(build.get('cuda') or {}).get('nvcc', 'unknown')}) did not load: {error.__cause__ or error}"
    return None


def _want_wgmma(cuda_loaded: bool) -> bool:
    wanted = os.environ.get("TOKENSIEVE_WGMMA", "0")
    if wanted not in ("0", "1"):
        raise ImportError(f"tokensieve: TOKENSIEVE_WGMMA must be 0 or 1, got {wanted!r}")
    if wanted == "1" and cuda_loaded:
        try:
            torch.ops.tokensieve.set_wgmma(True)
        except RuntimeError as error:
            raise ImportError(f"tokensieve: TOKENSIEVE_WGMMA=1 can't be had ({error})") from error
    return wanted == "1" and cuda_loaded


def _load() -> LoadState:
    build = _build_facts()
    level = _load_cpu()
    error = _load_cuda(build)
    wgmma = _want_wgmma(error is None)
    return LoadState(cpu_level=level, cuda_loaded=error is None, cuda_error=error, build=build, wgmma=wgmma)


STATE = _load()
