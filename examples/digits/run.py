"""Accuracy against kept tokens, measured on real data without a network: a small ViT on scikit-learn's digits, no fine-tuning.

    PYTHONPATH=python .venv/bin/python examples/digits/run.py

Under 3 minutes on 2 cores; writes accuracy.png and accuracy.csv beside this file.

Every digit lies somewhere on an empty canvas, on 4 x 4 of its 8 x 8 patches: which patches matter differs from picture to picture, as it
does in photos. A CLIP vision transformer is trained on all tokens, once for every seed. Then each method shortens its sequence in blocks 2,
3 and 4 of 0 to 5, at the same budgets: EViT, ToMe, pruning by CLS attention (FasterVLM's ranking, inside the encoder), and two that look at
nothing: random patches, and evenly spaced ones. "Kept" are the patches (EViT: and the fused token) that leave block 4.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokensieve as ts
import torch
from sklearn.datasets import load_digits
from tokensieve.methods import BlockMethod, BlockStep, BlockView, EViT, ToMe
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE, DIGIT, PATCH, DEPTH = 32, 16, 4, 6
PATCHES = (SIDE // PATCH) ** 2
BLOCKS = (2, 3, 4)  # a quarter, half and three quarters of the depth, as EViT in 12 blocks
SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.125)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Drop(BlockMethod):
    """Keeps counts[i] patches in block BLOCKS[i]: those that CLS attends to most, evenly spaced ones, or random ones."""

    counts: tuple[int, ...]
    by: str = "attention"
    seed: int = 0
    needs_cls = True

    def blocks(self, depth: int) -> tuple[int, ...]:
        return BLOCKS

    def step(self, view: BlockView) -> BlockStep | None:
        B, N, _ = view.tokens.shape
        n, k = N - 1, self.counts[BLOCKS.index(view.block)]
        if k >= n:
            return None
        if self.by == "attention":
            kept = ts.select_topk(view.cls_scores(key_range=(1, N)), k)
        elif self.by == "uniform":
            kept = torch.div(torch.arange(k) * 2 * n + n, 2 * k, rounding_mode="floor").expand(B, k)
        else:
            draws = torch.rand(B, n, generator=torch.Generator().manual_seed(self.seed * DEPTH + view.block))
            kept = ts.select_topk(draws, k)
        index = torch.nn.functional.pad(kept + 1, (1, 0))
        return BlockStep(ts.gather_tokens(view.tokens, index), index)


def counts(share: float) -> tuple[int, ...]:
    """Patches left after each of the three blocks, the same share of those before it each time."""
    return tuple(round(PATCHES * share ** ((i + 1) / len(BLOCKS))) for i in range(len(BLOCKS)))


@dataclass(frozen=True)
class EViTCounts(EViT):
    """EViT with a number of tokens for each block, so that its budget is the one of the others: the fused token counts."""

    counts: tuple[int, ...] = ()

    def keep_count(self, candidates: int) -> int:
        smaller = [k - 1 for k in self.counts if k < candidates]
        return max(smaller, default=candidates)


def merged(kept: tuple[int, ...]) -> ToMe:
    before = (PATCHES, *kept)
    r = [0] * DEPTH
    for block, n, k in zip(BLOCKS, before, kept):
        r[block] = n - k
    return ToMe(r=tuple(r))


METHODS: dict[str, Callable[[tuple[int, ...], int], BlockMethod]] = {
    "ToMe": lambda kept, seed: merged(kept),
    "EViT": lambda kept, seed: EViTCounts(layers=BLOCKS, counts=kept),
    "CLS attention": lambda kept, seed: Drop(kept),
    "uniform": lambda kept, seed: Drop(kept, "uniform"),
    "random": lambda kept, seed: Drop(kept, "random", seed),
}


def data(seed: int, test: int = 540) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(digits, labels, test digits, test labels); digits (n, 1, 16, 16) in -1..1, up-sampled from 8 x 8."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    images = interpolate(images, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)[order]
    return images[test:], labels[test:], images[:test], labels[:test]


def placed(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Each digit on an empty canvas, on a random 4 x 4 of its 8 x 8 patches: (n, 3, 32, 32)."""
    canvas = torch.full((len(digits), 1, SIDE, SIDE), -1.0)
    places = torch.randint(0, (SIDE - DIGIT) // PATCH + 1, (len(digits), 2), generator=generator) * PATCH
    for image, digit, (down, right) in zip(canvas, digits, places.tolist()):
        image[:, down : down + DIGIT, right : right + DIGIT] = digit
    return canvas.expand(-1, 3, -1, -1)


def build(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=10,
        initializer_factor=1.0,
    )
    return CLIPVisionModelWithProjection(config)


def train(model: Any, digits: Tensor, labels: Tensor, epochs: int, seed: int, batch: int = 64) -> None:
    """Plain training on all tokens, every digit at a new place each time: AdamW, one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(digits) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(digits), generator=generator).split(batch):
            loss = cross_entropy(model(placed(digits[part], generator)).image_embeds, labels[part])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: Any, method: BlockMethod, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(share of right answers, tokens that enter a block, mean over blocks)."""
    with torch.no_grad(), ts.sieve(model, method) as run:
        right = (model(images).image_embeds.argmax(1) == labels).float().mean()
    return float(right), sum(run.report.tokens) / DEPTH / len(images)


def measure(seeds: int, epochs: int, width: int, shares: tuple[float, ...] = SHARES) -> list[dict[str, Any]]:
    """One row for each method and budget."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        digits, labels, test, truth = data(seed)
        model, start = build(seed, width), time.perf_counter()
        train(model, digits, labels, epochs, seed)
        images = placed(test, torch.Generator().manual_seed(seed))
        print(f"seed {seed}: trained in {time.perf_counter() - start:.0f} s", flush=True)
        for share in shares:
            kept = counts(share)
            for name, make in METHODS.items():
                found.setdefault((name, kept[-1]), []).append(accuracy(model, make(kept, seed), images, truth))
    rows = []
    for (name, kept), values in found.items():
        scores = [score for score, _ in values]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        mean = statistics.fmean(scores)
        rows.append({"method": name, "kept": kept, "mean_tokens": values[0][1], "accuracy": mean, "stdev": spread, "seeds": len(scores)})
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against kept patches, mean and spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.5), dpi=120)
    for (name, marker), colour in zip(zip(METHODS, "osD^v"), ("#0a7d5a", "#1f5fbf", "#7a4fb5", "#8a8a8a", "#c0392b")):
        mine = sorted((row["kept"], 100 * row["accuracy"], 100 * row["stdev"]) for row in rows if row["method"] == name)
        x, y, spread = zip(*mine)
        axes.errorbar(x, y, yerr=spread, label=name, color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.6)
    axes.axvline(PATCHES / 2, color="#bbbbbb", linestyle=":", linewidth=1)
    axes.set_xlabel(f"patches kept of {PATCHES}, after three of {DEPTH} blocks")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(
        f"Digits on a canvas; ViT trained on all tokens, not fine-tuned (mean and deviation of {rows[0]['seeds']} seeds)",
        fontsize=9,
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of accuracy.png and accuracy.csv")
    options = parser.parse_args(arguments)
    rows = measure(options.seeds, options.epochs, options.width)
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    plot(rows, options.output / "accuracy.png")
    for row in rows:
        print(f"{row['method']:14} {row['kept']:3d} of {PATCHES} kept: {row['accuracy']:6.1%} +- {row['stdev']:.1%}")
    return rows


if __name__ == "__main__":
    main()
