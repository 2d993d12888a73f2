"""The benchmark harness: it refuses wrong outputs, its files hold what they promise, and reports come out of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokensieve import ops

from bench import __main__ as cli
from bench import bench_merge, bench_overhead, cases, checks, harness, machine, plot, report, store
from bench.harness import OURS, Case, Settings, Target, Timing, WrongOutput
from tools import gpu

ROOT = Path(__file__).resolve().parent.parent
QUICK = Settings(quick=True, compile=False)
CEILING = {
    "copy_bytes_per_s": 1e10,
    "read_bytes_per_s": 2e10,
    "cached_bytes_per_s": {"1000000": 5e10},
    "gemm_flops_per_s": 1e11,
    "gemm_dtype": "f32",
}


def doubling(wrong: str | None = None, **options: Any) -> Case:
    """x + x; the contender called `wrong` is off by one in the last element."""

    def contender(name: str) -> Any:
        def double(x: torch.Tensor) -> torch.Tensor:
            out = x + x
            if name == wrong:
                out[-1] += 1
            return out

        return double

    def check(inputs: harness.Inputs, output: torch.Tensor, ours: bool) -> str | None:
        return checks.equal(output, 2 * inputs[0])

    return Case(
        op="double",
        case="64 numbers",
        dtype="f32",
        inputs=lambda seed: (cases.randn(seed, 64),),
        ours=contender(OURS),
        peers={"other": contender("other")},
        check=check,
        bytes=512,
        **options,
    )


def test_measure_row_holds_the_promised_fields() -> None:
    row = harness.measure(doubling(targets=(Target(1e9, "other"), Target(1e9, of="median_us"))), QUICK, CEILING)
    assert set(store.FIELDS) <= set(row)
    assert row["correct"] is True
    assert row["device"] == "cpu"
    assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
    assert row["peers"].keys() == row["ratios"].keys() == {"other"}
    assert row["ratios"]["other"] == pytest.approx(row["peers"]["other"] / row["median_us"])
    assert row["floor_us"] == pytest.approx(512 / 5e4)
    assert [t["met"] for t in row["targets"]] == [False, True]
    json.dumps(row)


def test_operator_calls_are_counted_and_shown() -> None:
    """Views and allocations do not count; ToMe's two ops are two calls."""
    row = harness.measure(doubling(calls=True), QUICK, CEILING)
    assert row["operator_calls"] == {OURS: 1, "other": 1}
    assert "; 1 operator calls, other 1" in report.against(row)
    assert "operator_calls" not in harness.measure(doubling(), QUICK, CEILING)
    layer = next(case for case in bench_merge.build(QUICK) if case.calls)
    inputs = layer.inputs(0)
    assert harness.count_calls(layer.ours, inputs) == 2
    assert harness.count_calls(layer.peers["eager code"], inputs) > 10


@pytest.mark.parametrize("who", [OURS, "other"])
def test_measure_refuses_a_wrong_output_before_timing(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "interleave", lambda *a, **k: pytest.fail("a wrong output was timed"))
    with pytest.raises(WrongOutput, match=f"double 64 numbers f32: output of {who} is wrong: 1 of 64 values differ"):
        harness.measure(doubling(wrong=who), QUICK, CEILING)


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ceilings", lambda device, quick: CEILING)


@pytest.mark.usefixtures("known_ceilings")
def test_run_with_a_wrong_output_exits_1_and_records_no_such_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench.bench_select as family

    monkeypatch.setattr(family, "build", lambda settings: [doubling(wrong=OURS, quick=True), doubling(quick=True)])
    assert cli.main(["select", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "REFUSED: double" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "select.json").read_text())["rows"]) == 1


@pytest.mark.usefixtures("known_ceilings")
def test_run_goes_on_after_a_case_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench.bench_select as family

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")

    broken = doubling(quick=True)
    broken.ours = fails
    monkeypatch.setattr(family, "build", lambda settings: [broken, doubling(quick=True)])
    assert cli.main(["select", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "REFUSED: double 64 numbers f32: RuntimeError: no memory" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "select.json").read_text())["rows"]) == 1


@pytest.mark.usefixtures("known_ceilings")
def test_run_keeps_measured_rows_when_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bench.bench_select as family

    def interrupted(settings: Settings) -> Any:
        yield doubling(quick=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(family, "build", interrupted)
    assert cli.main(["select", "gather", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "select.json").read_text())["rows"]) == 1
    assert not (tmp_path / "gather.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.usefixtures("known_ceilings")
def test_run_missed_target_fails_only_when_strict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bench.bench_select as family

    monkeypatch.setattr(family, "build", lambda settings: [doubling(quick=True, targets=(Target(1e9, "other"),))])
    arguments = ["select", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--strict"]) == 1


def test_overhead_has_a_row_of_every_op() -> None:
    public = {name for name in ops.__all__ if callable(getattr(ops, name)) and not isinstance(getattr(ops, name), type)}
    assert {case.op for case in bench_overhead.build(QUICK)} == public


def test_quick_run_of_a_real_family_writes_a_whole_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "overhead", "--quick", "--device", "cpu", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "overhead.json").read_text())
    assert {"name", "cpu", "cores", "torch", "cpu_level", "commit", "date"} <= set(content["machine"])
    assert {"copy_bytes_per_s", "read_bytes_per_s", "gemm_flops_per_s"} <= set(content["ceilings"])
    assert {row["op"] for row in content["rows"]} >= {"attention_scores", "select_topk", "gather_tokens", "prune_tokens"}
    assert all("overhead_us" in row for row in content["rows"])
    assert "over torch.add" in done.stdout


def test_every_family_builds_and_has_a_quick_case() -> None:
    import importlib

    for family in store.ORDER:
        module = importlib.import_module(f"bench.bench_{family}")
        assert any(case.quick for case in module.build(Settings())), family


def test_every_registered_method_has_a_row() -> None:
    from bench import bench_methods

    assert bench_methods.missing() == []


def test_unknown_family_is_an_error_that_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["selekt"])
    assert "unknown family 'selekt'; there are: select, gather" in capsys.readouterr().err


def test_interleave_gives_everyone_samples_and_stops() -> None:
    order: list[str] = []

    def sampler(name: str, seconds: float) -> Any:
        def sample() -> float:
            order.append(name)
            time.sleep(seconds)
            return seconds

        return sample

    timings = harness.interleave({"a": sampler("a", 0.001), "b": sampler("b", 0.004)}, 0.05)
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert timings["a"].samples > timings["b"].samples >= 5
    assert timings["a"].median_us == pytest.approx(1000)


def test_floor_takes_the_larger_of_memory_and_gemm() -> None:
    assert machine.floor_us(CEILING, 500_000, 0) == (pytest.approx(10.0), "cache")
    assert machine.floor_us(CEILING, 2_000_000, 0) == (pytest.approx(100.0), "memory")
    assert machine.floor_us(CEILING, 0, 10**8) == (pytest.approx(1000.0), "gemm")


def test_checks_find_what_is_wrong() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.5]])
    assert checks.selection(scores, torch.tensor([[1, 3]]), 2, exact=True) is None
    assert checks.selection(scores, torch.tensor([[1, 2]]), 2, exact=True)
    assert checks.selection(scores, torch.tensor([[3, 1]]), 2, exact=False)
    assert checks.near(torch.tensor([1.0, torch.nan]), torch.ones(2), 0.1)
    assert checks.best(scores.double(), torch.tensor([[1, 2]]), (0, 4), 2, 0.01)
    assert checks.best(scores.double(), torch.tensor([[1, 3]]), (0, 4), 2, 0.01) is None
    assert checks.kept(torch.tensor([[0, 1, 3]]), (1, 3), 4, 1) is None
    assert checks.kept(torch.tensor([[0, 1, 2]]), (1, 3), 4, 1)


def content(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schema": 1, "machine": machine.record("cpu"), "ceilings": CEILING, "quick": False, "rows": rows}


def some_row() -> dict[str, Any]:
    timings = {"call": {OURS: Timing(10.0, 9.0, 11.0, 5), "smart eager": Timing(25.0, 20.0, 30.0, 5)}}
    return harness.make_row(doubling(targets=(Target(3, "smart eager"),)), timings, QUICK, CEILING, [])


def test_report_table_markdown_and_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = {"select": content([some_row()])}
    report.show("select", contents["select"]["rows"])
    assert "2.50x smart eager" in capsys.readouterr().out
    text = report.markdown(contents)
    assert "| double | 64 numbers | f32 | 10.0 (9.00-11.0) |" in text
    assert "MISSED: >= 3x smart eager" in text
    earlier = content([some_row()])
    earlier["machine"] |= {"commit": "0123456789abcdef", "date": "2020-01-01T00:00:00"}
    assert " Measured at commit 0123456789: gather.\n" in report.markdown({"gather": earlier, **contents})
    assert "Measured at commit" not in text
    assert "<details>" not in text
    folded = report.markdown({"select": content([some_row(), {**some_row(), "case": "no target", "targets": []}])})
    assert folded.index("64 numbers") < folded.index("<summary>1 more rows") < folded.index("no target") < folded.index("</details>")
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n")
    report.write_readme(readme, text)
    assert readme.read_text() == f"head\n{report.BEGIN}\n{text}\n{report.END}\ntail\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md has no <!-- bench:begin -->"):
        report.write_readme(readme, text)


def test_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.draw({"select": content([some_row()])}, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes()[:4] == b"\x89PNG"


def test_cuda_measure_has_all_modes_and_notes_who_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logic alone: streams, events and graphs are stand-ins. The real thing runs in `make gpu`."""
    from bench import cuda

    class Fake:
        L2_cache_size = 1024

        def __init__(self, *args: Any, **options: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

        def elapsed_time(self, end: Any) -> float:
            return 1.0

        def nothing(self, *args: Any) -> None: ...

        record = synchronize = replay = wait_stream = nothing

    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph", "Event", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    case = doubling()
    inputs = case.inputs(0)
    calls = 0

    def syncs(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x + x

    real = cuda.capture

    def capture(fn: Any, rotated: Any) -> Any:
        if fn is syncs:
            raise RuntimeError("operation not permitted when stream is capturing")
        return real(fn, rotated)

    monkeypatch.setattr(cuda, "capture", capture)
    contenders = {OURS: case.ours, **case.peers, "syncs": syncs}
    modes, notes = cuda.measure(case, contenders, inputs, QUICK)
    assert {mode: set(timings) for mode, timings in modes.items()} == {
        "cold": {OURS, "other"},
        "graph": {OURS, "other"},
        "eager": {OURS, "other", "syncs"},
    }
    assert modes["cold"][OURS].median_us == pytest.approx(1000 / cuda.MAX_COPIES)
    assert calls
    assert notes == ["syncs: cannot be captured in a graph (operation not permitted when stream is capturing)"]
    row = harness.make_row(case, modes, QUICK, CEILING, notes)
    assert row["mode"] == "cold"
    assert set(row["modes"]) == {"cold", "graph", "eager"}
    assert [line[1] for line in report.expanded([row])] == ["64 numbers", "  graph, warm L2", "  calls from Python"]


def test_gpu_runner_keeps_what_passed_failed_and_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1.0)
    runner = gpu.Runner(60)
    python = sys.executable
    runner.group(
        gpu.Step("good", [python, "-c", "print('all fine')"], 30),
        gpu.Step("bad", [python, "-c", "raise SystemExit(3)"], 30),
        gpu.Step("hung", [python, "-c", "import time; time.sleep(60)"], 1),
        gpu.Step("long", [python, "-c", "import time; print('half of it', flush=True); time.sleep(60)"], 3, partial=True),
    )
    runner.group(gpu.Step("after", [python, "-c", ""], 30, needs=("bad",)))
    status = {r["name"]: r["status"] for r in json.loads((tmp_path / "summary.json").read_text())}
    assert status == {"good": "passed", "bad": "failed", "hung": "timed out", "long": "cut off", "after": "skipped"}
    assert "all fine" in gpu.table(runner.results)
    assert (tmp_path / "long.log").read_text().startswith("half of it")


def test_gpu_steps_find_the_checkout_and_the_packages_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/packages")
    assert gpu.environment()["PYTHONPATH"].split(os.pathsep) == [str(gpu.ROOT / "python"), "/somewhere/packages"]
    monkeypatch.delenv("PYTHONPATH")
    assert gpu.environment()["PYTHONPATH"] == str(gpu.ROOT / "python")


def test_gpu_runs_what_builds_and_what_checks_the_wrappers_first(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[tuple[gpu.Step, ...]] = []

    class Recorder(gpu.Runner):
        def group(self, *steps: gpu.Step) -> None:
            groups.append(steps)

    monkeypatch.setattr(gpu.shutil, "which", lambda name, **_: f"/bin/{name}")
    gpu.steps(Recorder(1.0), "90a", 16)
    names = [[step.name for step in group] for group in groups]
    assert names[:3] == [["build", "build-conformance"], ["conformance", "card"], ["tests-gpu", "tests-cpu", "tests-wgmma"]]
    assert names[-1] == ["bench"]
    by_name = {step.name: step for group in groups for step in group}
    assert by_name["build"].environment["TOKENSIEVE_CUDA_ARCHS"] == "90a"
    assert all(by_name[n].needs == ("card",) for n in ("tests-gpu", "memcheck-ops", "bench"))  # skipped tests would pass
    assert all((gpu.ROOT / "tests" / name).exists() for name in gpu.ELSEWHERE)
    assert [n for n, step in by_name.items() if step.partial] == ["memcheck-ops", "racecheck-ops", "bench-wgmma", "bench"]
    assert {n for n, step in by_name.items() if "TOKENSIEVE_WGMMA" in step.environment} == {"tests-wgmma", "bench-wgmma"}
    assert sum(max(step.seconds for step in group) for group in groups[:-1]) < gpu.TOTAL_SECONDS


def test_gpu_without_a_card_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "tools/gpu.py"], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PATH": "/nonexistent"}
    )
    assert done.returncode == 1
    assert "needs an NVIDIA card" in done.stderr


def test_interrupt_of_a_real_run_exits_130_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "gather", "--device", "cpu", "--no-compile", "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the machine's line: the ceilings are measured
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
