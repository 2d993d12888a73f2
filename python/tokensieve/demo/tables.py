"""The tables of the demo."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .model import Subject
    from .run import Result


def show(console: Console, subject: Subject, method: Any, result: Result, origin: str) -> None:
    """Prints what was measured, and plainly what it does not mean."""

    def part(title: str, table: Table) -> None:
        console.print(f"\n[bold]{title}[/]")
        console.print(table)

    console.print(f"[bold]{method.title}[/] ({method.paper}) on {escape(origin)}")
    console.print(f"Model: {subject.description}.", markup=False)
    if subject.random:
        console.print("[yellow]Random weights: timings and mechanics are real, the choice of tokens is not.[/]")
    console.print(f"Prompt: {subject.length} tokens, {subject.image_tokens} of them image.")
    report = result.run.report
    part("Tokens and GFLOPs of each decoder layer", layers(report))
    part(f"Prefill on this machine, vision tower included, median of {len(result.dense)}", seconds(result))
    if result.steps:
        part("The prune step alone, beside the method's eager code on the same tensors", steps(result))
        console.print(f"[dim]Both sides: {result.steps[0].includes}; best of several runs.[/]")
    if result.answers:
        console.print(f"\ndense:  {result.answers[0]}\npruned: {result.answers[1]}", markup=False)


def grid(*headings: str) -> Table:
    """A table with numbers to the right of its first column."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def layers(report: Any) -> Table:
    """Tokens and FLOPs, one row for each run of equal layers."""
    table = grid("layers", "tokens", "dense", "image tokens", "GFLOPs", "dense", "saved")
    counts = list(zip(report.tokens, report.dense_tokens, report.image_tokens, report.flops, report.dense_flops))
    first = 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[i] != counts[first]:
            tokens, dense, image, flops, dense_flops = counts[first]
            name = f"{first}" if i == first + 1 else f"{first}-{i - 1}"
            row = (name, f"{tokens}", f"{dense}", f"{image}", f"{flops / 1e9:.2f}", f"{dense_flops / 1e9:.2f}")
            table.add_row(*row, f"{1 - flops / dense_flops:.1%}")
            first = i
    table.add_section()
    means = [f"{sum(column) / len(counts):.0f}" for column in (report.tokens, report.dense_tokens, report.image_tokens)]
    total, dense_total = sum(report.flops) / 1e9, sum(report.dense_flops) / 1e9
    n = len(counts)
    table.add_row("mean", *means, f"{total / n:.2f}", f"{dense_total / n:.2f}", f"{report.saved:.1%}")
    table.add_row("total", "", "", "", f"{total:.1f}", f"{dense_total:.1f}", "")
    return table


def seconds(result: Result) -> Table:
    """Measured prefill seconds."""
    dense, pruned = statistics.median(result.dense), statistics.median(result.pruned)
    table = grid("dense", "pruned", "ratio", "prune steps inside")
    steps = ", ".join(f"{1e3 * s:.2f}" for s in result.run.report.prune_seconds) or "0"
    table.add_row(f"{dense:.3f} s", f"{pruned:.3f} s", f"{dense / pruned:.2f}x", f"{steps} ms")
    return table


def steps(result: Result) -> Table:
    """The prune step alone, beside eager code on the same tensors."""
    table = grid("place", "tokens", "tokensieve", "eager code", "ratio")
    for step in result.steps:
        ratio = f"{step.eager / step.fused:.1f}x"
        table.add_row(step.place, f"{step.tokens}", f"{1e3 * step.fused:.3f} ms", f"{1e3 * step.eager:.3f} ms", ratio)
    return table
