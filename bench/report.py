"""Results as tables: for the terminal (rich where it is installed and the output is a terminal) and for the README (markdown)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import store

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEADER = ("op", "case", "dtype", "us", "p10-p90", "floor", "against", "target")
CALL_BOUND_US = {
    "cpu": 4.0,
    "cuda": 5.0,
}  # below, the call (1-3 us) or the launch (2-3 us) is most of it: a share of a roofline says nothing
MODES = {"call": "call", "cold": "caches flushed", "graph": "graph, warm L2", "eager": "calls from Python"}
README_FAMILIES = tuple(name for name in store.ORDER if name != "overhead")  # which is a sentence below the table


def number(us: float) -> str:
    """Three significant digits, thousands separated.

    Example:
        >>> number(0.01234), number(12.345), number(1234.5)
        ('0.0123', '12.3', '1,234')
    """
    return f"{us:,.0f}" if us >= 1000 else f"{us:#.3g}".rstrip(".")


def ratio(value: float) -> str:
    return f"{value:,.0f}x" if value >= 100 else f"{value:#.3g}x".replace(".x", "x")


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def against(row: dict[str, Any]) -> str:
    """Each peer's time over ours: above 1 we are faster."""
    if "peers_peak_bytes" in row:
        peaks = [f"{name} {size(value)}" for name, value in row["peers_peak_bytes"].items()]
        peaks += [f"map alone {size(row['map_bytes'])}"] if "eager code" not in row["peers_peak_bytes"] else []
        return f"peak {size(row['peak_bytes'])}; " + ", ".join(peaks)
    if "overhead_us" in row:
        return f"{row['overhead_us']:+.2f} us over torch.add"
    text = ", ".join(f"{ratio(value)} {name}" for name, value in row["ratios"].items())
    if "operator_calls" in row:
        own, *peers = row["operator_calls"].items()
        text += f"; {own[1]} operator calls, " + ", ".join(f"{name} {calls}" for name, calls in peers)
    return text


def judged(row: dict[str, Any]) -> str:
    return ", ".join(("met: " if t["met"] else "MISSED: ") + t["target"] for t in row["targets"])


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    floor = f"{row['floor_us'] / row['median_us']:.0%} {row['floor_bound']}" if row["bytes"] else ""
    if row["bytes"] and row["median_us"] < CALL_BOUND_US[row["device"]]:
        floor = "call-bound"
    spread = f"{number(row['p10_us'])}-{number(row['p90_us'])}"
    return row["op"], row["case"], row["dtype"], number(row["median_us"]), spread, floor, against(row), judged(row)


def expanded(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of the rows; further timings follow their row."""
    out = []
    for row in rows:
        out.append(cells(row))
        for mode in list(row.get("modes", {}))[1:]:
            timed = {**row, **row["modes"][mode], "targets": []}
            values = list(cells(timed))
            values[0], values[1], values[2] = "", f"  {MODES[mode]}", ""
            out.append(tuple(values))
    return out


def describe(content: dict[str, Any]) -> str:
    """One paragraph: the machine and its ceilings."""
    m, c = content["machine"], content["ceilings"]
    where = f"{m['gpu']}, CUDA {m['cuda']}" if "gpu" in m else f"{m['cpu']}, {m['cores']} cores, {m['cpu_level']}"
    rates = f"copy {c['copy_bytes_per_s'] / 1e9:,.0f} GB/s, read {c['read_bytes_per_s'] / 1e9:,.0f} GB/s, "
    rates += f"{c['gemm_dtype']} matmul {c['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s"
    commit = (m["commit"] or "unknown")[:10] + (" + changes" if m["uncommitted_changes"] else "")
    return f"{where}; torch {m['torch']}; commit {commit}; {m['date'][:10]}. Measured ceilings: {rates}."


def newest(contents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return max(contents.values(), key=lambda content: str(content["machine"]["date"]))


def older(contents: dict[str, dict[str, Any]]) -> str:
    """Which families an earlier commit measured, if any; their rows have ceilings of their own."""
    current, by_commit = newest(contents)["machine"]["commit"], dict[str, list[str]]()
    for family, content in contents.items():
        if content["machine"]["commit"] != current:
            by_commit.setdefault((content["machine"]["commit"] or "unknown")[:10], []).append(family)
    return "".join(f" Measured at commit {commit}: {', '.join(families)}." for commit, families in by_commit.items())


def show(family: str, rows: list[dict[str, Any]]) -> None:
    """The family's table on the terminal."""
    if not rows:
        return
    table = expanded(rows)
    if sys.stdout.isatty() and _rich_table(family, table):
        return
    widths = [max(len(line[i]) for line in (HEADER, *table)) for i in range(len(HEADER))]
    print(f"\n{family}")
    for line in (HEADER, *table):
        print("  " + "  ".join(cell.rjust(w) if i in (3, 4) else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip())


def _rich_table(family: str, table: list[tuple[str, ...]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    out = Table(title=family, title_justify="left", header_style="bold")
    for i, name in enumerate(HEADER):
        out.add_column(name, justify="right" if i in (3, 4) else "left", no_wrap=i in (2, 3, 4, 5))
    for line in table:
        out.add_row(*line[:-1], f"[red]{line[-1]}[/red]" if "MISSED" in line[-1] else f"[green]{line[-1]}[/green]")
    Console().print(out)
    return True


def in_readme(row: dict[str, Any]) -> bool:
    """One sample in float32 on a CPU, in bfloat16 on a GPU: the rest is in the machine's table.md."""
    return "B=8" not in row["case"] and row["dtype"] in (("f32",) if row["device"] == "cpu" else ("bf16", "f32"))


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| op | case | dtype | µs, median (p10-p90) | caches flushed | of the floor | peers take |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        op, case, dtype, us, spread, floor, peers, _ = cells(row)
        cold = number(row["modes"]["cold"]["median_us"]) if "cold" in row.get("modes", {}) else ""
        lines.append(f"| {op} | {case} | {dtype} | {us} ({spread}) | {cold} | {floor} | {peers} |")
    return lines


def markdown(contents: dict[str, dict[str, Any]], whole: bool = False) -> str:
    """The measured table from the JSON of one machine: the README's choice of rows, those without a target folded away, or the whole."""
    rows = [row for family in README_FAMILIES for row in contents.get(family, {}).get("rows", [])]
    lines = [describe(newest(contents)) + older(contents), ""]
    if whole:
        lines += table(rows)
    else:
        rows = [row for row in rows if in_readme(row)]
        aimed, others = [row for row in rows if row["targets"]], [row for row in rows if not row["targets"]]
        lines += table(aimed)
        if others:
            summary = f"<summary>{len(others)} more rows, without a target: the prune steps of all methods, and further cases</summary>"
            lines += ["", "<details>", summary, "", *table(others), "", "</details>"]
    overhead = [row for row in contents.get("overhead", {}).get("rows", []) if "overhead_us" in row]
    if overhead:
        calls = ", ".join(f"{row['op']} {row['overhead_us']:+.1f}" for row in overhead)
        lines += ["", f"A call on 8 tokens, in µs over `torch.add`: {calls}."]
    lines += [
        "",
        "2x means that the peer takes twice our time. The floor is the compulsory bytes over the measured bandwidth (of a cache, where the",
        "row fits into one), or the FLOPs over the measured matmul rate, whichever is larger.",
    ]
    missed = [row for content in contents.values() for row in content["rows"] if any(not t["met"] for t in row["targets"])]
    if missed:
        lines += ["", "Targets missed on this machine: " + "; ".join(f"{row['op']} {row['case']} ({judged(row)})" for row in missed) + "."]
    return "\n".join(lines)


def write_readme(readme: Path, text: str) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    content = readme.read_text()
    if BEGIN not in content or END not in content:
        raise ValueError(f"{readme.name} has no {BEGIN} ... {END}")
    head, rest = content.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
