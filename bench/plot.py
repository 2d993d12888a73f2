"""One picture of a machine's results: how many times longer smart eager and the methods' own code take, on a log axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import store

COLOURS = {
    "topk+sort": "#4c72b0",
    "index_select": "#4c72b0",
    "smart eager": "#4c72b0",
    "incremental eager": "#4c72b0",
    "chunked eager": "#4c72b0",
    "sort+cumsum": "#4c72b0",
    "torch.quantile": "#4c72b0",
    "nonzero": "#4c72b0",
    "mask+nonzero": "#4c72b0",
    "unpatched": "#dd8452",
    "torch.gather": "#55a868",
    "torch.compile": "#8172b3",
    "eager code": "#c44e52",
}
LABELS = {
    "#4c72b0": "smart eager: topk + sort, sort + cumsum, index_select, few-row matmul + softmax",
    "#55a868": "torch.gather",
    "#8172b3": "torch.compile of smart eager",
    "#c44e52": "the methods' own code",
    "#dd8452": "the model as it is",
}
FAMILIES = tuple(name for name in store.ORDER if name not in ("overhead", "memory"))


def draw(contents: dict[str, dict[str, Any]], path: Path) -> bool:
    """Writes the PNG; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        (family, row) for family in FAMILIES for row in contents.get(family, {}).get("rows", []) if COLOURS.keys() & row["ratios"].keys()
    ]
    if not rows:
        return False
    figure, axes = plt.subplots(figsize=(11, 1.6 + 0.235 * (len(rows) + len(FAMILIES))), layout="constrained")
    ticks, names, used, bottom, top = [], [], set(), 0.8, 2.0
    y, family_before = 0.0, None
    for family, row in rows:
        if family != family_before:
            y += 0.9 if family_before else 0.0
            family_before = family
        ratios = {name: value for name, value in row["ratios"].items() if name in COLOURS}
        low, high = min(ratios.values()), max(ratios.values())
        axes.hlines(y, low, high, color="#d9d9d9", linewidth=2.5, zorder=1)
        for order, name in enumerate(reversed(ratios)):  # smart eager, the first of the peers, lies on top
            axes.scatter(ratios[name], y, s=34, color=COLOURS[name], zorder=3 + order, edgecolor="white", linewidth=0.6)
            used.add(COLOURS[name])
        bottom, top = min(bottom, low), max(top, high)
        _label(axes, high, y, 7, "left")
        if high / low > 1.25:
            _label(axes, low, y, -7, "right")
        ticks.append(y)
        names.append(f"{row['op']}  {row['case']}  {row['dtype']}")
        y += 1.0
    _finish(axes, ticks, names, y, (bottom * 0.4, top * 2.2))
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=LABELS[c]) for c in LABELS if c in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    machine = next(iter(contents.values()))["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_level']}"
    axes.set_title(f"Time of the alternatives, tokensieve = 1   ({where}, torch {machine['torch']})", loc="left", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _label(axes: Any, value: float, y: float, shift: int, side: str) -> None:
    text = f"{value:,.0f}x" if value >= 10 else f"{value:#.2g}x"
    white = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    place = {"xytext": (shift, 0), "textcoords": "offset points", "va": "center", "ha": side}
    axes.annotate(text, (value, y), **place, fontsize=7.5, bbox=white, zorder=2.5)


def _finish(axes: Any, ticks: list[float], names: list[str], rows: float, limits: tuple[float, float]) -> None:
    axes.axvline(1.0, color="#222222", linewidth=1.0, zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(limits)
    few = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 50, 100, 500, 1000, 5000)
    many = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200)
    marks = [x for x in (few if limits[1] / limits[0] > 500 else many) if limits[0] <= x <= limits[1]]
    axes.set_xticks(marks, [f"{x:g}x" for x in marks])
    axes.minorticks_off()
    axes.set_yticks(ticks, names, fontsize=7.5)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.grid(axis="x", color="#eeeeee", zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("times as long as tokensieve (right of the line: we are faster)", fontsize=8.5)
