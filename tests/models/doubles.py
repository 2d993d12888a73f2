"""Test doubles that reach every corner of the protocol for methods; each states what it reads and keeps in a few lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods.base import DecoderMethod, EncoderMethod, Stage
from tokensieve.methods.views import ImageView, StageView
from torch import Tensor


@dataclass(frozen=True)
class Isolated(EncoderMethod):
    """Features of the whole stream: keep the tokens that differ most from their image's mean."""

    keep: float = 0.5
    scope = "stream"

    def keep_count(self, candidates: int) -> int:
        return round(candidates * self.keep)

    def select(self, view: ImageView) -> Tensor:
        assert view.projected is not None
        distance = (view.projected - view.projected.mean(1, keepdim=True)).norm(dim=2)
        return view.topk(distance)


@dataclass(frozen=True)
class Layers(EncoderMethod):
    """CLS attention, or that of all rows, summed over layers."""

    tokens: int = 5
    read: tuple[int, ...] = (0, 1, 3)
    every: bool = False

    @property
    def rows(self) -> str:  # type: ignore[override]
        return "all" if self.every else "cls"

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        return self.read

    def keep_count(self, candidates: int) -> int:
        return min(self.tokens, candidates)

    def select(self, view: ImageView) -> Tensor:
        return view.topk(sum(ops.attention_scores(q, k, key_range=(1, k.shape[2])) for q, k in view.layers))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Budgets(EncoderMethod):
    """The thumbnail's CLS attention in layer 0 decides what the crops keep; the counts come from data."""

    total: int = 12
    scope = "image"

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        return (0, feature)

    def select(self, view: ImageView) -> Tensor:
        early, late = (ops.attention_scores(q, k, key_range=(1, k.shape[2])) for q, k in view.layers)
        parts = late.shape[0]
        if parts == 1:
            return ops.select_topk(late, self.total, candidates=view.candidates)
        assert view.grid is not None
        assert view.grid[0] * view.grid[1] == parts - 1
        marked = ops.select_topk(early[:1], 8)
        share = torch.zeros(parts).index_add_(0, 1 + marked[0] * (parts - 1) // late.shape[1], torch.ones(8)) / 8
        share[0] = 0.5
        share[1:] /= 2
        return ops.select_topk(late, (share * self.total).long(), max_k=self.total, candidates=view.candidates)


@dataclass(frozen=True)
class Merging(EncoderMethod):
    """Keeps the best patches in falling order, and in the last one's place the mean of all, made before the projector."""

    tokens: int = 4
    ordered = True
    features = ("patches", "cls")

    def keep_count(self, candidates: int) -> int:
        return self.tokens

    def select(self, view: ImageView) -> Tensor:
        query, key = view.layers[0]
        scores = ops.attention_scores(query, key, key_range=(1, key.shape[2]))
        return ops.select_topk(scores, self.tokens, candidates=view.candidates, order="score")

    def replace(self, view: ImageView, index: Tensor) -> Tensor:
        assert view.patches is not None
        assert view.project is not None
        rows = ops.gather_tokens(view.patches, index)
        return view.project(torch.cat([rows[:, :-1], view.patches.mean(1, keepdim=True)], 1))


@dataclass(frozen=True)
class Pivots(DecoderMethod):
    """Like DART: least like a pivot of large keys, by hidden states through the final norm; original positions."""

    layer: int = 2
    keep: float = 0.5

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.layer - 1),)

    def keep_count(self, stage: int, n_full: int) -> int:
        return int(n_full * self.keep)

    def select(self, view: StageView) -> Tensor:
        assert view.key is not None
        assert view.norm is not None
        N = view.hidden.shape[1]
        size = view.key[:, :, -N:].abs().sum((1, 3)).masked_fill(~view.image_mask, -1)
        pivot = ops.gather_tokens(view.norm(view.hidden), ops.select_topk(size, 1))
        alike = torch.nn.functional.cosine_similarity(view.norm(view.hidden), pivot, dim=2)
        return view.topk(-alike)


@dataclass(frozen=True)
class PlainGrid(DecoderMethod):
    """Like FEATHER: pre-RoPE scores over the image range, with a strided grid in the first of two stages; counts from data."""

    layers: tuple[int, ...] = (2, 4)
    share: float = 0.3
    stride: int = 3
    own: bool = False  # project before the layer itself runs

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer, layer if self.own else layer - 1, rope=False) for layer in self.layers)

    def select(self, view: StageView) -> Tensor:
        index = view.topk(view.scores("range"), [int(n * self.share) for n in view.images])
        if view.stage > 0:
            return index
        marks = torch.zeros(index.shape[0], view.hidden.shape[1] + 1, dtype=torch.bool)
        marks.scatter_(1, torch.where(index < 0, view.hidden.shape[1], index), True)
        number, _ = view.patches()
        marks = marks[:, :-1] | ((number >= 0) & (number % self.stride == 0))
        return ops.select_topk(marks.float(), max(view.images), candidates=marks & view.image_mask)


@dataclass(frozen=True)
class Received(DecoderMethod):
    """Like AIM: all query rows rank at several layers, hiding or removing."""

    keep: tuple[int, ...] = (12, 6, 0)
    masking: bool = False

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer + 1, layer, rows="all") for layer in range(1, 1 + len(self.keep)))

    def keep_count(self, stage: int, n_full: int) -> int:
        return min(n_full, self.keep[stage])

    def select(self, view: StageView) -> Tensor:
        return view.topk(view.scores())


@dataclass(frozen=True)
class Recycling(DecoderMethod):
    """Like SparseVLM: text rows chosen from the embeddings rank; dropped tokens come back as one mean after the kept ones."""

    layer: int = 2
    keep: int = 6
    renumber: bool = True
    ordered = True
    embeddings = True

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.layer - 1, rows="all"),)

    def keep_count(self, stage: int, n_full: int) -> int:
        return min(n_full, self.keep + 1)

    def select(self, view: StageView) -> Tensor:
        assert view.embeddings is not None
        assert view.counts is not None
        assert view.query is not None
        first = ops.gather_tokens(view.embeddings, view.columns)
        real = torch.ones_like(view.image_mask) if view.real is None else view.real
        text = real & ~view.image_mask
        mean = (first * view.image_mask[..., None]).sum(1, keepdim=True) / view.image_mask.sum(1)[:, None, None].clamp(min=1)
        rater = ops.select_topk((first * mean).sum(2).masked_fill(~text, -torch.inf), 1)
        rows = torch.zeros(view.query.shape[0], view.query.shape[2]).scatter_(1, rater, 1.0)
        scores = view.scores(query_reduction="sum", row_weights=rows)
        counts = view.counts
        return ops.select_topk(scores, torch.tensor(counts), max_k=max(counts), candidates=view.image_mask, order="score")

    def replace(self, view: StageView, index: Tensor) -> Tensor:
        rows = ops.gather_tokens(view.hidden, index)
        chosen = torch.zeros(index.shape[0], view.hidden.shape[1] + 1, dtype=torch.bool)
        chosen.scatter_(1, torch.where(index < 0, view.hidden.shape[1], index), True)
        gone = (view.image_mask & ~chosen[:, :-1])[..., None]
        mean = (view.hidden * gone).sum(1) / gone.sum(1).clamp(min=1)
        last = (index >= 0).sum(1, keepdim=True) - 1
        return torch.where((torch.arange(index.shape[1]) == last)[..., None], mean[:, None], rows)


@dataclass(frozen=True)
class Exit(DecoderMethod):
    """Like DyVTE: before every layer a gate on the hidden state of the last token decides whether all image tokens of a sample leave."""

    threshold: float = 0.0
    depth: int = 5

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer) for layer in range(1, self.depth))

    def select(self, view: StageView) -> Tensor:
        last = ops.gather_tokens(view.hidden, torch.tensor(view.last)[:, None])
        stays = last.mean((1, 2)) <= self.threshold
        return ops.select_topk(view.image_mask.float(), max(view.images), candidates=view.image_mask & stays[:, None])


@dataclass(frozen=True)
class Depths(DecoderMethod):
    """Mixture of depths: half of the image tokens skip layer 1, and layers 2 and 3; scaled by a router."""

    keep: float = 0.5
    scale: float = 1.0

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(1, until=2), Stage(2, until=4))

    def keep_count(self, stage: int, n_full: int) -> int:
        return int(n_full * self.keep)

    def select(self, view: StageView) -> Tensor:
        return view.topk(view.hidden[..., 0].contiguous())

    def restore(self, stage: int, before: Tensor, after: Tensor, image: Tensor) -> Tensor:
        return torch.where(image[..., None], before + self.scale * (after - before), after)


@dataclass(frozen=True)
class Early(DecoderMethod):
    """Before the first layer: the image tokens most like the last text token, by input embeddings."""

    keep: int = 7
    renumber: bool = True

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(0),)

    def keep_count(self, stage: int, n_full: int) -> int:
        return min(n_full, self.keep)

    def select(self, view: StageView) -> Tensor:
        last = ops.gather_tokens(view.hidden, torch.tensor(view.last)[:, None])
        number, _ = view.patches()
        return view.topk((view.hidden * last).sum(2) + 1e-3 * number)  # placeholders without pixels are all alike


@dataclass(frozen=True)
class Notes(DecoderMethod):
    """Drops nothing; notes the sizes of the residual stream, as a search for sink tokens does."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(1), Stage(3))

    def select(self, view: StageView) -> None:
        view.state[f"stage {view.stage}"] = view.hidden.abs().amax(2)
        view.state["images"] = view.patches()[1]


@dataclass(frozen=True)
class EncoderNotes(EncoderMethod):
    """Drops nothing; notes CLS attention of two layers."""

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        return (0, depth - 2)

    def select(self, view: ImageView) -> None:
        view.state["scores"] = [ops.attention_scores(q, k, key_range=(1, k.shape[2])) for q, k in view.layers]


ENCODER: list[Any] = [Isolated(), Layers(), Layers(every=True, read=(2,)), Budgets(), Merging()]
DECODER: list[Any] = [
    Pivots(),
    PlainGrid(),
    PlainGrid(own=True),
    Received(),
    Received(masking=True),
    Recycling(),
    Recycling(renumber=False),
    Exit(),
    Depths(scale=0.7),
    Early(),
    Early(renumber=False),
]
