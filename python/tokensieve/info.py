"""What loaded, built by what, for which machines, and why a library did not load. Also `python -m tokensieve.info`."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from . import _load
from ._version import __version__
from .methods import METHODS


def cpu_levels() -> list[str]:
    """Instruction levels of this build that this processor can run, lowest first.

    Example:
        >>> cpu_levels()[0]
        'baseline'
    """
    return list(_load.CPU_LEVELS[: torch.ops.tokensieve.best_cpu_level() + 1])


def facts() -> dict[str, Any]:
    """The facts behind `tokensieve info`, as plain values.

    Returns:
        version, python, torch, platform, folder, cpu_level, cpu_levels, cpu_levels_built, threads, compiler, torch_abi, cuda_loaded,
        cuda_error (None where the CUDA library works), cuda_built (None or {"nvcc", "archs"}), wgmma (asked for by TOKENSIEVE_WGMMA=1),
        gpus ([{"name", "arch"}]).

    Example:
        >>> facts()["cpu_level"] in facts()["cpu_levels"]
        True
    """
    state, build = _load.STATE, _load.STATE.build
    gpus = []
    if torch.version.cuda is not None and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            gpus.append({"name": torch.cuda.get_device_name(i), "arch": f"{major}{minor}"})
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "folder": str(_load.FOLDER),
        "cpu_level": _load.CPU_LEVELS[torch.ops.tokensieve.cpu_level()],
        "cpu_levels": cpu_levels(),
        "cpu_levels_built": build.get("cpu_levels", []),
        "threads": torch.get_num_threads(),
        "compiler": build.get("compiler", "unknown"),
        "torch_abi": build.get("torch_abi", "unknown"),
        "cuda_loaded": state.cuda_loaded,
        "cuda_error": state.cuda_error,
        "cuda_built": build.get("cuda"),
        "wgmma": state.wgmma,
        "gpus": gpus,
    }


def lines() -> list[tuple[str, str]]:
    """The facts as (name, sentence) rows for people.

    Example:
        >>> [name for name, _ in lines()]
        ['tokensieve', 'torch', 'platform', 'CPU library', 'CUDA library', 'CUDA build', 'GPUs']
    """
    f = facts()
    built = f["cuda_built"]
    missing = [level for level in f["cpu_levels_built"] if level not in f["cpu_levels"]]
    cpu = f"loaded, runs at level {f['cpu_level']} (this machine can: {', '.join(f['cpu_levels'])}"
    cpu += f"; built but not supported here: {', '.join(missing)})" if missing else ")"
    return [
        ("tokensieve", f"{f['version']}, Python {f['python']}, in {f['folder']}"),
        ("torch", f"{f['torch']}; the libraries use the stable ABI of torch {f['torch_abi']}"),
        ("platform", f"{f['platform']}, {f['threads']} threads"),
        ("CPU library", f"{cpu}, compiled by {f['compiler']}"),
        ("CUDA library", f"loaded{', with wgmma' if f['wgmma'] else ''}" if f["cuda_loaded"] else f"not loaded: {f['cuda_error']}"),
        ("CUDA build", "none in this install" if not built else f"nvcc {built['nvcc']}, for {_archs(built['archs'])}"),
        ("GPUs", ", ".join(f"{g['name']} (sm_{g['arch']})" for g in f["gpus"]) or "none found"),
    ]


HOOKS = {
    "enc": "before the language model",
    "dec": "between decoder layers",
    "vid": "over the frames of a video",
    "vit": "inside a vision transformer",
}


def method_rows() -> list[tuple[str, str, str, str]]:
    """The registry of methods as (name, paper, where it hooks, what it does) rows.

    Example:
        >>> [row[0] for row in method_rows()][:3]
        ['PyramidDrop', 'FastV', 'FasterVLM']
    """
    rows = []
    for name, method in METHODS.items():
        summary = (method.__doc__ or "").strip().splitlines()[0]
        what = summary.partition("): ")[2] or summary  # the class docstring starts with "Name (paper): "
        rows.append((name, method.paper, HOOKS.get(method.hook, method.hook), what))
    return rows


def _archs(archs: list[str]) -> str:
    return ", ".join(f"sm_{arch}" for arch in archs)


def main() -> None:
    """Prints the facts as plain text, without the [cli] extra."""
    for name, text in lines():
        print(f"{name:<13} {text}")


if __name__ == "__main__":
    main()
    sys.exit(0)
