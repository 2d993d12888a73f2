"""`python -m bench` runs everything, `python -m bench select gather --quick` some of it, `python -m bench report` shows what is stored."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ROOT, store

LEVELS = ("baseline", "avx2", "avx512")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="family", help=f"{', '.join(store.ORDER)}; all where none is given; or: report")
    parser.add_argument("--quick", action="store_true", help="a few cases, short samples, no torch.compile; under 40 s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--cpu", choices=LEVELS, help="lower the instruction level of everyone: tokensieve, torch, MKL and oneDNN")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--strict", action="store_true", help="a missed target is a failure too")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results/<machine>; build/bench/<machine> with --quick)")
    parser.add_argument("--readme", action="store_true", help="report: write the table into README.md between its markers")
    parser.add_argument("--machine", help="report: a folder of bench/results; the newest one where none is given")
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.what if name not in (*store.ORDER, "report")]
    if unknown:
        parser.error(f"unknown family {unknown[0]!r}; there are: {', '.join(store.ORDER)}, report")
    if "report" in parsed.what and len(parsed.what) > 1:
        parser.error("report stands alone")
    return parsed


def lower_cpu(level: str) -> None:
    """Must run before torch is imported."""
    os.environ["TOKENSIEVE_CPU"] = level
    os.environ["ATEN_CPU_CAPABILITY"] = "default" if level == "baseline" else level
    if level != "avx512":
        os.environ["MKL_ENABLE_INSTRUCTIONS"] = {"baseline": "SSE4_2", "avx2": "AVX2"}[level]
        os.environ["ONEDNN_MAX_CPU_ISA"] = {"baseline": "SSE41", "avx2": "AVX2"}[level]


def family_rows(family: str, settings: Any, ceiling: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
    """Rows of a family; a string says why a row was refused. A case that cannot run costs its own row, not the others."""
    from .harness import WrongOutput, measure

    module = importlib.import_module(f"bench.bench_{family}")
    for case in module.build(settings):
        if settings.quick and not case.quick:
            continue
        try:
            yield getattr(module, "measure", measure)(case, settings, ceiling)
        except WrongOutput as error:
            yield str(error)
        except Exception as error:  # an op that fails, a probe that dies, no memory
            yield f"{case.op} {case.case} {case.dtype}: {type(error).__name__}: {error}"


def run(arguments: argparse.Namespace) -> int:
    import torch

    from . import machine, report
    from .harness import Settings

    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(device=device, quick=arguments.quick, compile=not (arguments.quick or arguments.no_compile))
    record, start = machine.record(device), time.perf_counter()
    folder = arguments.out or (ROOT / "build" / "bench" if arguments.quick else store.RESULTS) / record["name"]
    ceiling = machine.ceilings(device, settings.quick)
    print(report.describe({"machine": record, "ceilings": ceiling}), flush=True)
    if record["load_average"][0] > 0.7 * record["cores"]:
        print(f"warning: the machine is busy (load {record['load_average'][0]}); do not keep these numbers", file=sys.stderr)
    refused, missed, interrupted = [], 0, False
    families = arguments.what or list(store.ORDER)
    for family in families:
        rows: list[dict[str, Any]] = []
        try:
            for row in family_rows(family, settings, ceiling):
                if isinstance(row, str):
                    refused.append(row)
                    print(f"REFUSED: {row}", file=sys.stderr)
                else:
                    rows.append(row)
                    if sys.stderr.isatty():
                        print(f"\r\033[K{family}: {len(rows)} rows, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr)
        except KeyboardInterrupt:
            interrupted = True
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        if rows:
            store.save(folder, family, {"schema": 1, "machine": record, "ceilings": ceiling, "quick": settings.quick, "rows": rows})
        report.show(family, rows)
        if device == "cpu" and os.getloadavg()[0] > record["cores"] + 1:
            print(f"warning: load {os.getloadavg()[0]:.1f} on {record['cores']} cores: others were busy, do not keep this", file=sys.stderr)
        missed += sum(not t["met"] for row in rows for t in row["targets"])
        if interrupted:
            break
    if any(folder.glob("*.json")):
        write_pages(folder)
    print(f"\n{'interrupted; ' if interrupted else ''}{time.perf_counter() - start:.0f} s, results in {_shown(folder)}", end="")
    print(f"; {missed} targets missed" if missed else "", end="")
    print(f"; {len(refused)} rows refused: an output was wrong or a case did not run" if refused else "")
    return 130 if interrupted else 1 if refused or (missed and arguments.strict) else 0


def write_pages(folder: Path) -> None:
    """table.md and, where matplotlib is installed, ratios.png beside the JSON."""
    from . import plot, report

    contents = store.load(folder)
    (folder / "table.md").write_text(report.markdown(contents, whole=True) + "\n")
    plot.draw(contents, folder / "ratios.png")


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def show(arguments: argparse.Namespace) -> int:
    from . import report

    folders = [store.RESULTS / arguments.machine] if arguments.machine else store.machines()
    if not folders or not any(folders[0].glob("*.json")):
        print(f"no results below {_shown(store.RESULTS)}: run `make bench`", file=sys.stderr)
        return 1
    contents = store.load(folders[0])
    print(report.describe(next(iter(contents.values()))))
    for family, content in contents.items():
        report.show(family, content["rows"])
    write_pages(folders[0])
    if arguments.readme:
        report.write_readme(ROOT / "README.md", report.markdown(contents))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    if parsed.cpu:
        lower_cpu(parsed.cpu)
    try:
        return show(parsed) if parsed.what == ["report"] else run(parsed)
    except KeyboardInterrupt:  # before the first row
        return 130


if __name__ == "__main__":
    sys.exit(main())
