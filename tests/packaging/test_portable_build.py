"""The portable path: the CPU kernels built without the x86 levels, as on aarch64, give the same bits as every level of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokensieve import _load

ROOT = Path(__file__).resolve().parents[2]
KERNELS = [
    "score/score_cpu.cpp",
    "score/colsum_cpu.cpp",
    "select/topk_cpu.cpp",
    "select/gather_cpu.cpp",
    "similarity/cosine_cpu.cpp",
    "similarity/diverse_cpu.cpp",
    "score/pagerank_cpu.cpp",
    "select/quantiles_cpu.cpp",
    "select/count_cpu.cpp",
    "select/samples_cpu.cpp",
    "merge/match_cpu.cpp",
]
PLANS = [
    "score/score_plan_cpu.cpp",
    "select/topk_plan_cpu.cpp",
    "similarity/cosine_plan_cpu.cpp",
    "similarity/diverse_plan_cpu.cpp",
    "score/pagerank_plan_cpu.cpp",
    "select/quantiles_plan_cpu.cpp",
    "select/count_plan_cpu.cpp",
    "select/samples_plan_cpu.cpp",
    "merge/match_plan_cpu.cpp",
    "testing/portable_check.cpp",
]
SOURCES = sorted(p.relative_to(ROOT / "csrc") for p in (ROOT / "csrc").glob("*/*_cpu.cpp") if p.parent.name != "testing")
CXX_FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
LEVEL_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


def build(compiler: str, folder: Path, levels: list[str], link: list[str]) -> Path:
    """Compiles the check with these levels; one level alone is the portable build."""
    many = ["-DTS_HAVE_X86_LEVELS"] if len(levels) > 1 else []
    objects, commands = [], []
    for number, level in enumerate(levels):
        for source in KERNELS:
            objects.append(str(folder / f"{level}-{Path(source).stem}.o"))
            isa = [f"-DTS_ISA={level}", f"-DTS_ISA_LEVEL={number}", *LEVEL_FLAGS[level]]
            commands.append([compiler, *CXX_FLAGS, *many, *isa, "-c", str(ROOT / "csrc" / source), "-o", objects[-1]])
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a compiler a core: one after the other takes a minute and a half
        list(pool.map(output, commands))
    program = folder / "portable_check"
    sources = [str(ROOT / "csrc" / s) for s in PLANS]
    subprocess.run([compiler, *CXX_FLAGS, *many, *sources, *objects, *link, "-o", str(program)], check=True, capture_output=True, text=True)
    return program


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_cpu_kernel_compiles_without_sse(source: Path) -> None:
    """As on aarch64: simd_portable.h, and no header that comes in by way of immintrin.h."""
    command = ["c++", *CXX_FLAGS, "-U__SSE2__", "-DTS_ISA=baseline", "-DTS_ISA_LEVEL=0", "-fsyntax-only", str(ROOT / "csrc" / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


@pytest.fixture(scope="module")
def portable_hash(tmp_path_factory: pytest.TempPathFactory) -> str:
    return output([str(build("c++", tmp_path_factory.mktemp("portable"), ["baseline"], []))])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are x86-64's")
def test_portable_build_equals_every_level(portable_hash: str, tmp_path: Path) -> None:
    program = build("c++", tmp_path, list(LEVEL_FLAGS), [])
    reached = range(_load.CPU_LEVELS.index(_load.STATE.cpu_level) + 1)
    assert {output([str(program), str(level)]) for level in reached} == {portable_hash}


def test_portable_build_on_aarch64_gives_the_same_bits(portable_hash: str, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if platform.machine() != "x86_64" or compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user-static")
    assert output([emulator, str(build(compiler, tmp_path, ["baseline"], ["-static"]))]) == portable_hash
