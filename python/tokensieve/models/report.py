"""What a sieve did: tokens and FLOPs per layer, time of the prune steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


class Timer:
    """Times prune steps without waiting for a GPU: CUDA events on the stream, read only when someone asks."""

    def __init__(self) -> None:
        self._steps: list[Any] = []
        self._start: Any = None

    def clear(self) -> None:
        """Forgets the steps of the last prompt."""
        self._steps = []

    def start(self, device: torch.device) -> None:
        """Before a prune step."""
        if device.type == "cuda":
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> None:
        """After it."""
        if isinstance(self._start, float):
            self._steps.append(time.perf_counter() - self._start)
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._steps.append((self._start, end))

    def seconds(self) -> tuple[float, ...]:
        """Seconds of every step; waits for a GPU that is still at it."""
        result = []
        for step in self._steps:
            if isinstance(step, float):
                result.append(step)
            else:
                step[1].synchronize()
                result.append(step[0].elapsed_time(step[1]) / 1e3)
        return tuple(result)


@dataclass(frozen=True)
class Report:
    """The last prompt with image tokens, or the last call of an encoder, layer by layer: what entered each.

    Counts are sums over the batch; FLOPs count a multiply-add as two.

    The prune steps are in `prune_seconds`, not in the FLOPs: PyramidDrop projects the keys of a layer once more at each stage.
    """

    method: Any
    dense_tokens: tuple[int, ...]  # tokens that each layer would have processed
    tokens: tuple[int, ...]  # tokens that it did
    image_tokens: tuple[int, ...]  # image tokens among them
    dense_flops: tuple[float, ...]
    flops: tuple[float, ...]
    prune_seconds: tuple[float, ...]  # one per drop that took place between decoder layers

    @property
    def saved(self) -> float:
        """Share of the layers' FLOPs that was saved, 0 to 1."""
        dense = sum(self.dense_flops)
        return 1 - sum(self.flops) / dense if dense else 0.0

    def __str__(self) -> str:
        lines = [f"{self.method!r}", "layer   tokens   of which image   of dense   GFLOPs   dense GFLOPs"]
        rows = zip(self.tokens, self.image_tokens, self.dense_tokens, self.flops, self.dense_flops)
        for layer, (tokens, image, dense, flops, dense_flops) in enumerate(rows):
            lines.append(f"{layer:5d} {tokens:8d} {image:16d} {tokens / max(dense, 1):10.1%} {flops / 1e9:8.3f} {dense_flops / 1e9:14.3f}")
        total, dense_total = sum(self.flops) / 1e9, sum(self.dense_flops) / 1e9
        milliseconds = ", ".join(f"{1e3 * s:.2f}" for s in self.prune_seconds)
        steps = f"; prune steps: {milliseconds} ms" if milliseconds else ""
        lines.append(f"total {total:.3f} of {dense_total:.3f} GFLOPs ({self.saved:.1%} saved){steps}")
        return "\n".join(lines)
