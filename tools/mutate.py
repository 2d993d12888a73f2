"""Breaks the kernels one line at a time and lists what the kernel tests do not notice (what `make mutate` calls).

Every barrier, wait and fence is dropped once, every comparison and every +-1 is shifted once, in a copy of the sources under build/mutate.
A mutant runs through its kernel's tests in the plain build; if it survives, under ThreadSanitizer (dropped synchronisation) or under
AddressSanitizer (shifted bounds). Stop it at any time: finished mutants are kept in build/mutate/results.jsonl and not run again.
One file, one line of it, run again after a new test: make mutate ARGS="--fresh csrc/select/gather_kernel.cuh:31".
A survivor is either a missing test or a line that makes no difference; the second kind deserves a comment in the kernel, or removal.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sanitize import ROOT, environment, pytest_command

WORK = ROOT / "build" / "mutate"
SOURCE = WORK / "source"
RESULTS = WORK / "results.jsonl"
TIMEOUT = 600  # of one test run; a mutant may spin

DROPS = re.compile(
    r"(?:simt::)?(?:__syncthreads|__syncwarp|__threadfence|cluster_sync|named_barrier|cp_async_wait<[^>]*>|cp_async_commit"
    r"|fence_async_shared|wgmma_fence|wgmma_commit|wgmma_wait<[^>]*>"
    r"|(?:warp|tile<\w+>)::sync)\([^;]*\);"
)
COMPARISON = re.compile(r"(?<=[\w)\]]) (<=|<|>=|>) (?=[\w(\-*&])")
OFFSET = re.compile(r" ([+-]) 1\b(?![.\w])")
SHIFTED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}


@dataclass(frozen=True)
class Mutant:
    """One changed line: text[start:end] of `path`'s line becomes `replacement`."""

    path: str
    line: int
    text: str
    start: int
    end: int
    replacement: str
    kind: str  # "sync" or "bound"

    def describe(self) -> str:
        old = self.text[self.start : self.end].strip()
        if self.kind == "sync":
            return f"{self.path}:{self.line}: drop {old}"
        end = self.replacement[len(self.replacement.rstrip()) :] + self.text[self.end :]
        changed = f"{self.text[: self.start]} [{old} -> {self.replacement.strip()}]{end}"
        return f"{self.path}:{self.line}: {changed.strip()}"


def picks_one_of_two(code: str, comparison: re.Match[str]) -> bool:
    """Whether this is the comparison of `a < b ? a : b`: both are the same where they are equal, so no shift changes anything."""
    rest = re.match(r"(.+?) \? (.+?) : (.+)", code[comparison.end() :])
    if rest is None:
        return False
    right, first, second = (re.sub(r"static_cast<\w+>\(([^()]*)\)", r"\1", part) for part in rest.groups())
    return code[: comparison.start()].endswith(first) and second.startswith(right)


def tests_of(path: Path) -> list[str]:
    """The kernel tests of a file: score_grad_kernel.cuh has score_grad's, topk_gather_kernel.cuh those of both, others their room's."""
    tests = ROOT / "tests" / "kernels"
    words = path.stem.removesuffix("_kernel").split("_")
    found = set(tests.glob(f"test_{'_'.join(words)}*.py")) or {f for word in words for f in tests.glob(f"test_{word}*.py")}
    if not found:
        units = {p.stem.split("_")[0] for p in (ROOT / path).parent.glob("*.cuh")}
        found = {f for unit in units for f in tests.glob(f"test_{unit}*.py")}
    return sorted(str(f.relative_to(ROOT)) for f in found)


def find_mutants(path: Path) -> list[Mutant]:
    """Every place of a kernel file that a mutation applies to."""
    mutants = []
    name = str(path.relative_to(ROOT))
    for number, text in enumerate(path.read_text().splitlines(), 1):
        code = re.sub(r'"[^"]*"', lambda m: '"' * len(m[0]), text).split("//")[0]  # no mutants in strings and comments
        if re.match(r"\s*(#|template\b|static_assert|using\b)", code):
            continue
        found = [(m.span(), ";", "sync") for m in DROPS.finditer(code)]
        shifts = [m for m in COMPARISON.finditer(code) if not picks_one_of_two(code, m)]
        found += [(m.span(), f" {SHIFTED[m[1]]} ", "bound") for m in shifts]
        found += [(m.span(), f" {m[1]} 0", "bound") for m in OFFSET.finditer(code)]
        mutants += [Mutant(name, number, text, *span, replacement, kind) for span, replacement, kind in sorted(found)]
    return mutants


def mutants_of(place: str) -> list[Mutant]:
    """Those of a file, or of FILE:LINE."""
    name, colon, line = place.partition(":")
    path = Path(name).resolve()
    if not path.is_file() or ROOT not in path.parents or (colon and not line.isdecimal()):
        sys.exit(f"mutate: {place} must be a kernel file of this tree, or FILE:LINE")
    return [m for m in find_mutants(path) if not colon or m.line == int(line)]


def configure(stage: str, jobs: str) -> None:
    folder = WORK / stage
    command = ["cmake", "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
    command += ["-DTOKENSIEVE_TESTING=ON", "-DTOKENSIEVE_WITH_CUDA=OFF", f"-DTOKENSIEVE_OUTPUT_DIR={folder}"]
    subprocess.run([*command, f"-DTOKENSIEVE_SIMT_SANITIZE={stage}"], check=True, stdout=subprocess.DEVNULL)
    if not compile_stage(stage, jobs):
        sys.exit(f"mutate: the unchanged sources do not build: cmake --build {folder} --target _kernels")


def compile_stage(stage: str, jobs: str) -> bool:
    command = ["cmake", "--build", str(WORK / stage), "--parallel", jobs, "--target", "_kernels"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def tests_pass(stage: str, tests: list[str]) -> bool:
    command = pytest_command(["-x", "--no-header", *tests])
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=SOURCE, env=environment(stage, WORK / stage), stdout=quiet, stderr=quiet)
    try:
        return process.wait(timeout=TIMEOUT) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def outcome_of(mutant: Mutant, jobs: str) -> str:
    """The build that killed the mutant, "survived", or "does not compile"."""
    target = SOURCE / mutant.path
    original = target.read_text()
    lines = original.splitlines(keepends=True)
    ending = "\n" if lines[mutant.line - 1].endswith("\n") else ""
    lines[mutant.line - 1] = mutant.text[: mutant.start] + mutant.replacement + mutant.text[mutant.end :] + ending
    target.write_text("".join(lines))
    try:
        for stage in ("none", "thread" if mutant.kind == "sync" else "address"):
            if not compile_stage(stage, jobs):
                return "does not compile"
            if not tests_pass(stage, tests_of(Path(mutant.path))):
                return f"killed ({'plain' if stage == 'none' else stage})"
        return "survived"
    finally:
        target.write_text(original)


def prepare(tests: list[str], kinds: set[str], jobs: str) -> None:
    """A fresh copy of the sources and tests (they may change meanwhile), built for every stage; unchanged, all must pass."""
    for folder in ("csrc", "tests/kernels", "tests/reference"):
        shutil.copytree(ROOT / folder, SOURCE / folder, dirs_exist_ok=True)  # keeps times: what is built stays built
    for file in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy2(ROOT / file, SOURCE / file)
    for stage in ["none", *(["thread"] if "sync" in kinds else []), *(["address"] if "bound" in kinds else [])]:
        print(f"mutate: building and testing the unchanged sources, sanitizer {stage} ...", flush=True)
        configure(stage, jobs)
        if not tests_pass(stage, tests):
            sys.exit(f"mutate: the unchanged kernels fail their tests, sanitizer {stage}")


def report(results: dict[Mutant, str], planned: int) -> None:
    counted = [o for o in results.values() if o != "does not compile"]
    survivors = [m for m, outcome in results.items() if outcome == "survived"]
    print(f"\nmutate: {len(results)} of {planned} mutants run, {len(results) - len(counted)} did not compile, ", end="")
    print(f"{len(counted) - len(survivors)} of {len(counted)} killed, {len(survivors)} survived")
    for mutant in survivors:
        print(f"  {mutant.describe()}")


def load_results() -> dict[Mutant, str]:
    if not RESULTS.exists():
        return {}
    entries = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {Mutant(**entry["mutant"]): entry["outcome"] for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", metavar="FILE[:LINE]", help="kernel files, or one line of them; default csrc/*/*.cuh")
    parser.add_argument("--kind", choices=["sync", "bound"], help="only dropped synchronisation, or only shifted bounds")
    parser.add_argument("--every", type=int, default=1, help="run every n-th mutant only: a sample")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--fresh", action="store_true", help="run the mutants again that earlier runs finished")
    parser.add_argument("--jobs", default=str(os.cpu_count() or 1))
    arguments = parser.parse_args()
    places = arguments.places or [str(f) for f in sorted((ROOT / "csrc").glob("*/*.cuh"))]
    mutants = [m for place in places for m in mutants_of(place) if arguments.kind in (None, m.kind)][:: arguments.every]
    if arguments.list:
        print("\n".join(m.describe() for m in mutants), f"\n{len(mutants)} mutants")
        return
    WORK.mkdir(parents=True, exist_ok=True)
    known = {} if arguments.fresh else load_results()
    results = {m: known[m] for m in mutants if m in known}
    try:
        prepare(sorted({test for m in mutants for test in tests_of(Path(m.path))}), {m.kind for m in mutants}, arguments.jobs)
        for number, mutant in enumerate(mutants, 1):
            if mutant in results:
                continue
            start = time.monotonic()
            results[mutant] = outcome_of(mutant, arguments.jobs)
            with RESULTS.open("a") as log:
                log.write(json.dumps({"mutant": asdict(mutant), "outcome": results[mutant]}) + "\n")
            print(f"[{number}/{len(mutants)}] {results[mutant]:18} {time.monotonic() - start:4.0f} s  {mutant.describe()}", flush=True)
    except KeyboardInterrupt:
        print("\nmutate: stopped; run it again to go on")
    report(results, len(mutants))


if __name__ == "__main__":
    main()
