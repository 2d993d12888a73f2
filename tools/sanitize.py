"""Runs the kernel tests under AddressSanitizer + UBSan and under ThreadSanitizer (what `make sanitize` calls).

Each sanitizer has its own build tree (build/testing-address, build/testing-thread) and its own Python process, with the sanitizer's
runtime preloaded; the processes run side by side. A finding ends its process with a report. torch is not imported: the kernel tests need
numpy alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build import ROOT, build

SYMBOLS = "symbolize=1:print_stacktrace=1"
OPTIONS = {
    "address": {"ASAN_OPTIONS": f"detect_leaks=0:detect_stack_use_after_return=1:{SYMBOLS}", "UBSAN_OPTIONS": SYMBOLS},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0:history_size=4"},
}
RUNTIMES = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}


def tree(sanitizer: str) -> Path:
    """The build folder of a sanitizer; "none" is the one of `make testing`."""
    return ROOT / "build" / ("testing" if sanitizer == "none" else f"testing-{sanitizer}")


def build_tree(sanitizer: str, jobs: str) -> None:
    """Builds the module `_kernels` for one sanitizer."""
    options = ["-DTOKENSIEVE_TESTING=ON", "-DTOKENSIEVE_WITH_CUDA=OFF", f"-DTOKENSIEVE_OUTPUT_DIR={tree(sanitizer)}"]
    build(tree(sanitizer), [*options, f"-DTOKENSIEVE_SIMT_SANITIZE={sanitizer}"], jobs, "_kernels")


def environment(sanitizer: str, folder: Path) -> dict[str, str]:
    """The variables that a Python process needs to load a sanitized module."""
    variables = {"TOKENSIEVE_KERNELS_DIR": str(folder), "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    if sanitizer != "none":
        # libstdc++ must be there when the sanitizer starts: it looks up __cxa_throw only once.
        found = [
            subprocess.run(["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
            for name in RUNTIMES[sanitizer]
        ]
        variables |= {"LD_PRELOAD": " ".join(found), **OPTIONS[sanitizer]}
    return os.environ | variables


def pytest_command(arguments: list[str]) -> list[str]:
    """pytest on the kernel tests alone: tests/conftest.py, which imports torch, stays out."""
    plugins = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:xdist"]
    plugins += ["--capture=sys"]  # a sanitizer's report ends the process: written to pytest's own file it would be lost
    paths = [] if any((ROOT / argument.split("::")[0]).exists() for argument in arguments) else ["tests/kernels"]
    return [sys.executable, "-m", "pytest", "-q", "--confcutdir", "tests/kernels", *plugins, *arguments, *paths]


def run_tests(sanitizer: str, arguments: list[str]) -> int:
    """Runs pytest under one sanitizer and prints all that it said, in one piece; returns its exit code."""
    start = time.monotonic()
    done = subprocess.run(
        pytest_command(arguments), cwd=ROOT, env=environment(sanitizer, tree(sanitizer)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = done.stdout.decode(errors="replace")
    print(f"{said}sanitize {sanitizer}: ran in {time.monotonic() - start:.0f} s, exit {done.returncode}", flush=True)
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", default=str(os.cpu_count() or 1))
    parser.add_argument("--only", choices=["address", "thread"], help="one sanitizer instead of both")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest (after --)")
    arguments = parser.parse_args()
    chosen = [arguments.only] if arguments.only else ["address", "thread"]
    for sanitizer in chosen:
        start = time.monotonic()
        build_tree(sanitizer, arguments.jobs)
        print(f"sanitize {sanitizer}: built in {time.monotonic() - start:.0f} s", flush=True)
    print("sanitize: running the tests, minutes; each sanitizer's output comes when it is done", flush=True)
    with ThreadPoolExecutor(len(chosen)) as pool:  # each is one process: side by side on two cores
        codes = list(pool.map(lambda sanitizer: run_tests(sanitizer, arguments.pytest), chosen))
    failed = [sanitizer for sanitizer, code in zip(chosen, codes) if code != 0]
    sys.exit(f"sanitize: failed under {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
