"""The gate on the built libraries: stable shim of torch 2.10 and the C and C++ runtimes, nothing else; so one wheel serves all."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SPEC = find_spec("tokensieve")
assert SPEC is not None
assert SPEC.origin is not None
FOLDER = Path(SPEC.origin).parent
LIBRARIES = ("_C.so", "_C_cuda.so")
SHIM = {line for line in Path(__file__).with_name("shim_2_10.txt").read_text().split("\n") if line and line[0] != "#"}
RUNTIMES = re.compile(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$")  # versioned by libc, libstdc++, libgcc
OPTIONAL = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}  # weak, in every library
NEEDED = re.compile(r"^(libtorch|libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux.*)\.so(\.\d+)?$")
pytestmark = pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="needs binutils")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Path:
    path = FOLDER / str(request.param)
    if not path.exists():
        pytest.skip(f"{path.name} was not built (no nvcc)")
    return path


def undefined(library: Path) -> dict[str, str]:
    """Name -> "U" or "w" (weak) of every symbol that the library takes from others."""
    lines = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: kind for kind, name in (line.split()[-2:] for line in lines)}


def needed(library: Path) -> set[str]:
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))


def test_undefined_symbols_are_the_pinned_shim_and_the_runtimes(library: Path) -> None:
    names = undefined(library)
    foreign = {n for n in names if not RUNTIMES.search(n) and n not in SHIM and not (n in OPTIONAL and names[n] == "w")}
    assert not foreign, f"{library.name} needs symbols outside the stable ABI of torch 2.10: {sorted(foreign)}"


def test_no_symbol_of_torchs_cpp_api_or_of_python(library: Path) -> None:
    bad = [n for n in undefined(library) if re.match(r"_ZNK?(3c10|2at|5torch|6caffe2)|_?Py[A-Z_]|_ZN?\w*8pybind11", n)]
    assert not bad, bad


def test_needed_libraries(library: Path) -> None:
    libraries = needed(library)
    assert "libtorch.so" in libraries  # without it the CUDA symbols of a CUDA torch do not resolve
    extra = {n for n in libraries if not NEEDED.match(n)}
    assert not extra, f"{library.name} links {sorted(extra)}: cudart must be static, torch's other libraries must not be named"


def test_current_stream_is_a_weak_symbol() -> None:
    library = FOLDER / "_C_cuda.so"
    if not library.exists():
        pytest.skip("_C_cuda.so was not built (no nvcc)")
    assert undefined(library).get("aoti_torch_get_current_cuda_stream") == "w"  # CPU torch does not have it; the library must still load


def test_library_exports_no_function(library: Path) -> None:
    """Hidden visibility: two wheels in one process cannot bind to each other's kernels."""
    lines = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    exported = [name for kind, name in (line.split()[-2:] for line in lines) if kind in "TD" and "tokensieve" in name]
    assert not exported, exported[:5]


def test_library_has_no_path_of_the_build_machine(library: Path) -> None:
    text = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in text
    assert "RUNPATH" not in text
    root = str(Path(__file__).resolve().parents[2]).encode()
    assert root not in library.read_bytes(), "an absolute source path is in the library (macro-prefix-map, -lineinfo)"


def guarded_names(header: Path) -> dict[str, tuple[int, int]]:
    """Function name -> torch version of the innermost TORCH_FEATURE_VERSION guard around its declaration; (0, 0) without one."""
    stack: list[tuple[int, int]] = []
    versions: dict[str, tuple[int, int]] = {}
    for line in header.read_text().splitlines():
        if re.match(r"\s*#\s*if", line):
            guard = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
            stack.append((int(guard[1]), int(guard[2])) if guard else (0, 0))
        elif re.match(r"\s*#\s*endif", line):
            stack.pop()
        for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
            versions.setdefault(name, max(stack, default=(0, 0)))
    return versions


def test_pinned_shim_names_are_in_torch_2_10() -> None:
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    headers = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/c/shim_deprecated.h")
    versions: dict[str, tuple[int, int]] = {}
    for header in headers:
        if (include / header).exists():
            versions |= {n: v for n, v in guarded_names(include / header).items() if n not in versions}
    unknown = SHIM - set(versions)
    assert not unknown, f"not declared by torch {torch.__version__}: {sorted(unknown)}"
    late = {n: versions[n] for n in SHIM if versions[n] > (2, 10)}
    assert not late, f"added after torch 2.10: {late}"
    # torch 2.13's headers show the guards at work, so this test can fail at all
    assert versions.get("torch_from_blob", (2, 11)) == (2, 11)


def test_pinned_shim_names_are_all_used_and_all_exist() -> None:
    built = [FOLDER / name for name in LIBRARIES if (FOLDER / name).exists()]
    if len(built) == len(LIBRARIES):
        used = set().union(*(undefined(path) for path in built))
        assert used >= SHIM, f"pinned but not used any more: {sorted(SHIM - used)}"
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    missing = {n for n in SHIM if not hasattr(libtorch, n)} - {"aoti_torch_get_current_cuda_stream"}
    assert not missing, missing
