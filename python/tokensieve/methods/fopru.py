"""FoPru: rank patches by the attention they receive from all patches (arXiv 2411.14164). No official code was at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_numbers
from .positions import to_device
from .views import ImageView


@dataclass(frozen=True)
class FoPru(EncoderMethod):
    """FoPru (arXiv 2411.14164): keep the patches, or whole rows of patches, that the other patches attend to most.

    The map of the encoder's second to last layer, mean over heads, is averaged along both axes; the average that varies more over the
    patches is their significance (the received attention, in practice). The map itself is never stored.

    Args:
        ratio: share of the patches that is kept, rounded down.
        strategy: "rank", the best patches in raster order; "row", the best whole rows of the grid, so that neighbours stay together.
        keep_newlines: any-resolution models: keep the newline tokens of the mosaic.

    Differs from the official code: none was at hand. Softmax covers CLS and patches, then CLS leaves the map; budgets round down; the
    default ratio is ours.

    Example:
        >>> FoPru().budget(576), FoPru(strategy="row").budget(17 * 23, 17)
        (144, 92)
    """

    title = "FoPru"
    paper = "arXiv 2411.14164"
    rows = "all"

    ratio: float = 0.25
    strategy: str = "rank"
    keep_newlines: bool = False

    def __post_init__(self) -> None:
        require_numbers(self, ratio=self.ratio)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)
        require(self.strategy in ("rank", "row"), self, "strategy must be 'rank' or 'row'", self.strategy)

    def budget(self, patches: int, rows: int | None = None) -> int:
        """Patches kept of an image; the row strategy needs the rows of its grid."""
        if self.strategy == "rank":
            return int(patches * self.ratio)
        require(rows is not None and rows > 0 and patches % rows == 0, self, f"rows must divide {patches} patches", rows)
        assert rows is not None
        return int(rows * self.ratio) * (patches // rows)

    def keep_count(self, candidates: int) -> int | None:
        return int(candidates * self.ratio) if self.strategy == "rank" else None  # whole rows: padding may cut into one

    def select(self, view: ImageView) -> Tensor:
        scores = significance(view.layers[0].query, view.layers[0].key).chosen
        return view.topk(scores) if self.strategy == "rank" else select(scores, self, view.side[0])


class Significance(NamedTuple):
    """(B, N) float32 each: attention a patch receives (mean over patches), gives to the patches (mean), and the one that varies more."""

    received: Tensor
    given: Tensor
    chosen: Tensor


def significance(query: Tensor, key: Tensor, cls: bool = True) -> Significance:
    """How significant every patch is to the others.

    Args:
        query, key: (B, H, N + 1, D), row 0 = CLS; (B, H, N, D) with cls=False, for encoders that have none.

    Example:
        >>> query = key = torch.eye(4).view(1, 1, 4, 4)
        >>> significance(query, key).received
        tensor([[0.2616, 0.2616, 0.2616]])
    """
    first, size = int(cls), key.shape[2]
    rows = query[:, :, first:]
    received, lse = ops.attention_scores(rows, key, key_range=(first, size), return_lse=True)
    if not cls:  # each row of the map sums to 1
        return Significance(received, torch.full_like(received, 1 / max(size, 1)), received)
    to_cls = ops.attention_scores(rows, key, key_range=(0, 1), lse=lse, query_reduction=None)[..., 0]
    given = (1 - to_cls) / (size - 1)
    wider = received.var(1, keepdim=True) >= to_cls.var(1, keepdim=True) / (size - 1) ** 2
    return Significance(received, given, torch.where(wider, received, given))


def select(scores: Tensor, method: FoPru, rows: int | None = None) -> Tensor:
    """Kept patches (B, T) int64 of (B, N) significance, ascending; the row strategy needs the rows of the grid.

    Example:
        >>> scores = torch.tensor([[0.1, 0.9, 0.4, 0.4, 0.3, 0.2]])
        >>> select(scores, FoPru(ratio=0.5)), select(scores, FoPru(ratio=0.5, strategy="row"), rows=2)
        (tensor([[1, 2, 3]]), tensor([[0, 1, 2]]))
    """
    B, N = scores.shape
    k = method.budget(N, rows)
    if method.strategy == "rank":
        return ops.select_topk(scores, k)
    assert rows is not None
    columns = N // rows
    best = ops.select_topk(scores.view(B, rows, columns).sum(2), k // columns)
    return (best[:, :, None] * columns + to_device(torch.arange(columns), scores.device)).view(B, k)


def keep_patches(query: Tensor, key: Tensor, features: Tensor, method: FoPru, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The FoPru step on tensors of your own encoder: (features (B, T, C), index (B, T) ascending, significance (B, N)).

    Args:
        query, key: as in `significance`, with or without CLS; features: (B, N, C) patches without CLS; rows: of the grid, for "row".

    Example:
        >>> query = key = torch.tensor([0.0, 1.0, 3.0, 2.0]).view(1, 1, 4, 1)
        >>> keep_patches(query, key, torch.arange(3.0).view(1, 3, 1), FoPru(ratio=0.7))[1]
        tensor([[1, 2]])
    """
    extra = key.shape[2] - features.shape[1]
    require(extra in (0, 1), "keep_patches", f"features must have the {key.shape[2]} tokens of key, or all but CLS", features.shape[1])
    scores = significance(query, key, cls=extra == 1).chosen
    index = select(scores, method, rows)
    return ops.gather_tokens(features, index), index, scores
