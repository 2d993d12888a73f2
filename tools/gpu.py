"""`make gpu`: builds for the local card, runs the wrapper conformance first, then tests, compute-sanitizer and the benchmarks.

Needs no network and no virtual environment: an interpreter with torch >= 2.10, numpy and pytest, and cmake, ninja and nvcc. Every step has
a time limit and a log in build/gpu/; what is known so far is in build/gpu/summary.json after every step, so a cut-off run keeps it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu"
CONFORMANCE = FOLDER / "conformance"
TOTAL_SECONDS = 530.0  # all of it stays under 9 minutes
# Tests that say nothing new on a machine with a card: of the emulator, wheels, the programs; of benchmarks, which want the machine alone.
ELSEWHERE = ("kernels", "packaging", "cli", "test_examples.py", "test_bench.py")
ON_THE_CARD = "import tokensieve as ts, torch; print(ts.select_topk(torch.rand(1, 8, device='cuda'), 2), torch.cuda.get_device_name())"
GRACE_SECONDS = 8.0  # after the interrupt that a step gets at its limit, to write down what it has


@dataclass
class Step:
    """A command with a limit; `needs` names steps that must have passed."""

    name: str
    command: list[str]
    seconds: float
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""  # what its log says where the machine does not let it run at all: skipped, not failed
    partial: bool = False  # what it wrote until its limit is worth keeping by itself: cut off, not failed


@dataclass
class Result:
    name: str
    status: str  # passed | failed | timed out | cut off | skipped
    seconds: float
    note: str
    log: str


class Runner:
    """Runs groups of steps side by side and keeps the summary on disk up to date."""

    def __init__(self, total: float) -> None:
        self.deadline = time.monotonic() + total
        self.results: list[Result] = []
        self.running: list[subprocess.Popen[bytes]] = []

    def group(self, *steps: Step) -> None:
        with ThreadPoolExecutor(len(steps)) as pool:
            pending = [pool.submit(self._run, step) for step in steps]
            try:
                self.results += [p.result() for p in pending]
            except KeyboardInterrupt:
                for process in self.running:
                    stop(process)
                self.results += [p.result() for p in pending]
                raise
            finally:
                self.save()

    def passed(self, name: str) -> bool:
        return any(r.name == name and r.status == "passed" for r in self.results)

    def save(self) -> None:
        temporary = FOLDER / "summary.tmp"
        temporary.write_text(json.dumps([asdict(r) for r in self.results], indent=1) + "\n")
        temporary.replace(FOLDER / "summary.json")

    def _run(self, step: Step) -> Result:
        log = FOLDER / f"{step.name}.log"
        missing = [name for name in step.needs if not self.passed(name)]
        limit = min(step.seconds, self.deadline - time.monotonic() - GRACE_SECONDS)
        if missing or limit < 1:
            return Result(step.name, "skipped", 0.0, f"{missing[0]} did not pass" if missing else "no time left", "")
        start = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment() | step.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.running.append(process)
            try:
                code = process.wait(limit)
                refused = bool(code and step.unavailable and step.unavailable in log.read_text(errors="replace"))
                status = "skipped" if refused else "passed" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                stop(process)
                status = "cut off" if step.partial else "timed out"
            self.running.remove(process)
        return Result(step.name, status, time.monotonic() - start, last_line(log), str(log.relative_to(ROOT)))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C to the step's own process group, then an end to it."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    lines = [line.strip(" =") for line in log.read_text(errors="replace").splitlines() if line.strip(" =")]
    return lines[-1][:110] if lines else ""


def environment() -> dict[str, str]:
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    packages = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": packages, "PATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def local_arch() -> str:
    """Compute capability of the first card as CMake writes it: 9.0 -> 90a (wgmma and TMA exist as 90a only), 8.9 -> 89.

    Raises:
        SystemExit: no card answers.
    """
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"], capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("tokensieve: make gpu needs an NVIDIA card, but there is no nvidia-smi. `make test` tests without one.")
    if done.returncode != 0 or not done.stdout.strip():
        sys.exit(f"tokensieve: make gpu needs an NVIDIA card, but nvidia-smi says: {(done.stdout + done.stderr).strip()}")
    capability, name = done.stdout.splitlines()[0].split(",", 1)
    arch = arch_name(capability.strip())
    print(f"{name.strip()}, compute capability {capability.strip()}: building for {arch}", flush=True)
    return arch


def arch_name(capability: str) -> str:
    """CMake's name of a compute capability.

    Example:
        >>> arch_name("9.0"), arch_name("8.6"), arch_name("10.0"), arch_name("12.0")
        ('90a', '86', '100a', '120')
    """
    digits = capability.replace(".", "")
    return digits + "a" if digits in ("90", "100") else digits


def conformance_command(arch: str) -> list[str]:
    """nvcc alone: the first thing to run on a card must not depend on anything else that could fail to build."""
    target = f"arch=compute_{arch},code=sm_{arch}"
    options = ["-std=c++17", "-O2", "-gencode", target, "-Icsrc", "-DTOKENSIEVE_CONFORMANCE_MAIN"]
    return [nvcc(), *options, "csrc/testing/conformance.cu", "-o", str(CONFORMANCE)]


def nvcc() -> str:
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=environment()["PATH"]) or "nvcc"


def ops_once() -> int:
    """Every op once on the card, the pruning path ragged besides, for compute-sanitizer."""
    import tokensieve as ts
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from every_op import GROUPS, given

    for dtype, (B, H, Hkv, L, N, D) in ((torch.float32, (2, 4, 2, 3, 77, 64)), (torch.bfloat16, (1, 8, 8, 1, 577, 128))):
        query, key = (torch.randn(B, h, n, D, device="cuda", dtype=dtype) for h, n in ((H, L), (Hkv, N)))
        hidden, positions = torch.randn(B, N, 40, device="cuda", dtype=dtype), torch.arange(N, device="cuda").expand(B, N)
        scores = ts.attention_scores(query, key, causal=True)
        index = ts.select_topk(scores, N // 3)
        gathered = ts.gather_tokens((hidden, positions), index)
        kept = ts.prune_tokens(query[:, :, -1:], key, (hidden, positions), N // 4, key_range=(5, N - 3))
        hidden.requires_grad_(True)
        ts.gather_tokens(hidden, index).sum().backward()
        torch.cuda.synchronize()
        on_cpu = ts.select_topk(scores.cpu(), N // 3)
        if not torch.equal(on_cpu, index.cpu()) or not torch.equal(gathered[1], index) or kept.index.shape[1] != N // 4 + 8:
            print("the card selects other tokens than the CPU")
            return 1
        print(f"pruning {dtype}", flush=True)
    for name, run in GROUPS.items():
        run(given(1, "cuda"))
        torch.cuda.synchronize()
        print(name, flush=True)  # what a cut-off log has seen
    print("all ops ran")
    return 0


def steps(runner: Runner, arch: str, jobs: int) -> None:
    """The whole run, group by group."""
    me, python = [sys.executable, str(Path(__file__).resolve())], sys.executable
    archs = {"TOKENSIEVE_CUDA_ARCHS": arch, "TOKENSIEVE_WITH_CUDA": "ON"}
    runner.group(
        Step("build", [python, "tools/build.py", "--jobs", str(jobs)], 200, environment=archs),
        Step("build-conformance", conformance_command(arch), 200),
    )
    runner.group(
        Step("conformance", [str(CONFORMANCE)], 20, needs=("build-conformance",)),
        Step("card", [python, "-c", ON_THE_CARD], 60, needs=("build",)),  # without it every gpu test would be skipped, and pass
    )
    pytest = [python, "-m", "pytest", "--continue-on-collection-errors"]
    few_threads, ignored = {"OMP_NUM_THREADS": "2"}, [f"--ignore=tests/{name}" for name in ELSEWHERE]
    # The sweeps on warpgroups, off until they have passed here: the same tests, and rows, once more.
    wgmma, sums = {"TOKENSIEVE_WGMMA": "1"}, [f"tests/ops/test_attention_{name}.py" for name in ("all_rows", "lse", "pagerank")]
    runner.group(
        # One line a test, so that a cut-off log still says what passed. 1467 tests take 170 s in one process of a CPU.
        Step("tests-gpu", [*pytest, "-v", *spread(jobs, 8), "-m", "gpu and not wheel"], 170, needs=("card",), environment=few_threads),
        Step(
            "tests-cpu",
            [*pytest, "-q", *spread(jobs, 8), "-m", "not gpu and not wheel and not slow", *ignored],
            170,
            needs=("build",),
            environment=few_threads,
        ),
        Step("tests-wgmma", [*pytest, "-v", "-m", "gpu and not wheel", *sums], 170, ("conformance", "card"), few_threads | wgmma),
    )
    sanitizer = shutil.which("compute-sanitizer", path=environment()["PATH"])
    if sanitizer:
        exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # an allocation a tensor, so that a byte too far is seen
        watched = {"ops": ("card", [*me, "--ops-once"]), "wrappers": ("build-conformance", [str(CONFORMANCE)])}
        # Torch asks the driver for functions that it may not have; our own calls report what they get.
        tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
        runner.group(
            *(
                Step(
                    f"{tool}-{what}",
                    [sanitizer, "--tool", tool, *options, "--error-exitcode", "9", *command],
                    60,
                    (needed,),
                    exact,
                    "not supported",
                    partial=what == "ops",
                )
                for tool, options in tools.items()
                for what, (needed, command) in watched.items()
            )
        )
    else:
        runner.results.append(Result("compute-sanitizer", "skipped", 0.0, "not installed", ""))
    bench = [python, "-m", "bench", "--device", "cuda"]
    again = [*bench, "colsum", "--no-compile", "--out", "build/gpu/bench-wgmma"]
    runner.group(Step("bench-wgmma", again, 30, needs=("tests-wgmma",), environment=wgmma, partial=True))
    runner.group(Step("bench", bench, 300, needs=("card",), partial=True))  # saves family by family


def spread(jobs: int, most: int) -> list[str]:
    """Options that give pytest processes of their own, where pytest-xdist is installed."""
    return ["-n", str(max(1, min(most, jobs // 2)))] if importlib.util.find_spec("xdist") else []


def table(results: list[Result]) -> str:
    width = max((len(r.name) for r in results), default=4)
    return "\n".join(f"{r.name:<{width}}  {r.status:<9}  {r.seconds:5.0f} s  {r.note}" for r in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of everything together")
    parser.add_argument("--ops-once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ops_once:
        return ops_once()
    FOLDER.mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments.seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        steps(runner, local_arch(), arguments.jobs)
    except KeyboardInterrupt:
        interrupted = True
    runner.save()
    print(table(runner.results))
    allowed = ("compute-sanitizer", "memcheck", "racecheck")  # some virtual machines have none
    fine = ("passed", "cut off")
    bad = [r for r in runner.results if r.status not in fine and not (r.status == "skipped" and r.name.startswith(allowed))]
    return 130 if interrupted else 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
