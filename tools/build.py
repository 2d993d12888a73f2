"""Configures and builds the libraries in a source checkout (what `make build` and `make testing` call)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path, options: list[str], jobs: str, target: str = "all") -> None:
    """Runs CMake and the build, quiet unless it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}", *options]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", jobs, "--target", target]):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}\ntokensieve: the build failed: {' '.join(command)}")
        for line in done.stdout.splitlines():
            if "tokensieve:" in line or "warning" in line.lower():
                print(line.removeprefix("-- "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", default=str(os.cpu_count() or 1))
    parser.add_argument("--testing", action="store_true", help="build the numpy module of the kernel tests instead of the libraries")
    arguments = parser.parse_args()
    # Not set: -U forgets what an earlier build put into CMake's cache.
    options = [f"-D{n}={os.environ[n]}" if os.environ.get(n) else f"-U{n}" for n in ("TOKENSIEVE_CUDA_ARCHS", "TOKENSIEVE_WITH_CUDA")]
    if arguments.testing:
        folder = ROOT / "build" / "testing"
        options = ["-DTOKENSIEVE_TESTING=ON", "-DTOKENSIEVE_WITH_CUDA=OFF", f"-DTOKENSIEVE_OUTPUT_DIR={folder}"]
        build(folder, options, arguments.jobs, "_kernels")
    else:
        build(ROOT / "build" / "cmake", options, arguments.jobs)


if __name__ == "__main__":
    main()
