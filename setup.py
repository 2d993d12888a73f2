"""Drives CMake and tags the wheel py3-none-<platform>: the libraries hold no Python symbol, so one wheel serves every CPython."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def cmake_arguments(output: Path) -> list[str]:
    """The three build variables, as CMake options."""
    arguments = [f"-DTOKENSIEVE_OUTPUT_DIR={output}", f"-DPython3_EXECUTABLE={sys.executable}"]
    if archs := os.environ.get("TOKENSIEVE_CUDA_ARCHS"):
        arguments.append(f"-DTOKENSIEVE_CUDA_ARCHS={archs}")
    if with_cuda := os.environ.get("TOKENSIEVE_WITH_CUDA"):
        arguments.append(f"-DTOKENSIEVE_WITH_CUDA={with_cuda}")
    return arguments


class CMakeBuild(build_ext):
    """Configures and builds the CMake project once; the libraries land in the package folder."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("tokensieve._C")).parent.resolve()
        if self.editable_mode:
            package = ROOT / "python" / "tokensieve"
        package.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("TOKENSIEVE_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *cmake_arguments(package)], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        if json.loads((package / "_build_info.json").read_text())["cuda"] is None:
            (package / "_C_cuda.so").unlink(missing_ok=True)  # of an earlier build in the same folder, with nvcc
            print("tokensieve: built the CPU library only (no nvcc found, or TOKENSIEVE_WITH_CUDA=OFF)", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[Extension("tokensieve._C", sources=[])], cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel})
