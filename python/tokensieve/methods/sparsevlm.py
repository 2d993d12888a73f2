"""SparseVLM: only text that looks at the image ranks its tokens, and some of what is dropped is recycled (arXiv 2410.04417, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import DecoderMethod, Stage, require, require_ints
from .positions import on_device, token_mask
from .raters import corrected_scores, distance_decay, rater_scores, rater_weights
from .views import StageView

BUDGETS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}  # by RETAIN_TOKN, of v1.5
BUDGETS_PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


@dataclass(frozen=True)
class SparseVLM(DecoderMethod):
    """SparseVLM (arXiv 2410.04417): after layers 2, 6 and 15 keep 300, 200 and 110 image tokens, ranked by the text that looks at it.

    Args:
        layers: 0-based layers after which tokens leave, ranked by the attention of that very layer.
        budget: image tokens kept at each stage; `BUDGETS` has the authors' lists, `BUDGETS_PLUS` those of SparseVLM+.
        plus: SparseVLM+ (v2): divide by the distance decay of RoPE and rank by 14 heads; nothing is recycled, positions are kept.
        heads: heads that rank, with plus.
        recycle: share of the dropped tokens that is clustered and merged, without plus.
        renumber: positions 0.. after a stage (v1.5); False keeps the original ones (plus).
        theta: base of the decoder's RoPE, with plus.

    Differs from the official code: softmax in float32; recycling is deterministic (there, noise of 1e-6 breaks ties; `merge_dropped` takes
    it as an argument). The rank-adaptive budget of the paper is gone from the released code and is not here either.

    Example:
        >>> SparseVLM().by_score(0, 576), SparseVLM().recycled(276), SparseVLM().keep_count(0, 576)
        (300, (83, 9), 309)
    """

    title = "SparseVLM"
    paper = "arXiv 2410.04417"
    ordered = True  # recycled tokens come after the kept ones
    embeddings = True

    layers: tuple[int, ...] = (2, 6, 15)
    budget: tuple[int, ...] = BUDGETS[192]
    plus: bool = False
    heads: int = 14
    recycle: float = 0.3
    renumber: bool = True
    theta: float = 10000.0

    def __post_init__(self) -> None:
        require_ints(self, heads=self.heads, layers=self.layers, budget=self.budget)
        require(
            len(self.budget) == len(self.layers), self, f"budget must have one count for each of {len(self.layers)} layers", self.budget
        )
        require(len(self.budget) > 0 and min(self.budget) >= 0, self, "budget must hold counts, 0 or more", self.budget)
        require(0 <= self.recycle <= 1, self, "recycle must be in [0, 1]", self.recycle)
        require(self.heads >= 1, self, "heads must be 1 or more", self.heads)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer + 1, layer, rows="all") for layer in self.layers)

    def by_score(self, stage: int, n_present: int) -> int:
        """Image tokens kept at a stage, of those that reach it: always one fewer than there are at most."""
        return min(self.budget[stage], max(n_present - 1, 0))

    def keep_count(self, stage: int, n_full: int) -> int:
        left = n_full
        for earlier in range(stage + 1):
            kept = self.by_score(earlier, left)
            left = kept + self.recycled(left - kept)[1]
        return left

    def recycled(self, dropped: int) -> tuple[int, int]:
        """(tokens that are recycled, tokens that they become) of so many dropped ones."""
        if self.plus or dropped == 0:
            return 0, 0
        taken = min(int(self.recycle * dropped) + 1, dropped)
        return taken, min(taken // 10 + 1, taken)

    def select(self, view: StageView) -> Tensor:
        """The kept tokens, then slots of dropped ones for the merged."""
        assert view.query is not None
        assert view.key is not None
        room = max((length - images for length, images in zip(view.lengths, view.images)), default=0)
        if "raters" not in view.state:
            view.state["raters"] = self._raters(view, room)
        here = view.state["raters"].gather(1, view.columns.clamp(min=0)) & (view.columns >= 0)
        rows = ops.select_threshold(here.float(), 0.5, capacity=room).index
        query = ops.gather_tokens(view.query.transpose(1, 2), rows).transpose(1, 2)
        scores = self._scores(view, query, rows)
        kept_counts = [self.by_score(view.stage, n) for n in view.images]
        kept = view.topk(scores, kept_counts)
        taken = [self.recycled(n - k) for n, k in zip(view.images, kept_counts)]
        width = max((count for count, _ in taken), default=0)
        if width == 0:
            return kept
        dropped = view.image_mask & ~token_mask(kept, scores.shape[1])
        counts = on_device([count for count, _ in taken], scores.device)
        recycled = ops.select_topk(scores, counts, max_k=width, candidates=dropped, order="score")
        view.state["recycled"] = recycled, taken
        slots = on_device([clusters for _, clusters in taken], scores.device)[:, None]
        column = torch.arange(max(clusters for _, clusters in taken), device=scores.device)
        return torch.cat([kept, recycled[:, : len(column)].masked_fill(column >= slots, -1)], 1)

    def replace(self, view: StageView, index: Tensor) -> Tensor | None:
        if "recycled" not in view.state:
            return None
        recycled, taken = view.state.pop("recycled")
        hidden = ops.gather_tokens(view.hidden, index)
        width = max(clusters for _, clusters in taken)
        merged = hidden.new_zeros((hidden.shape[0], width, hidden.shape[2]))
        for b, (count, clusters) in enumerate(taken):  # samples differ in how many they recycle
            if clusters:
                some = ops.gather_tokens(view.hidden[b : b + 1], recycled[b : b + 1, :count].contiguous())
                merged[b : b + 1, :clusters] = merge_dropped(some, clusters)
        return torch.cat([hidden[:, : hidden.shape[1] - width], merged], 1)

    def _raters(self, view: StageView, room: int) -> Tensor:
        """(B, S) bool: the raters, in the columns of the prompt. Nothing has left yet."""
        assert view.embeddings is not None
        text = view.image_mask.flip(1).cumsum(1).flip(1) == 0  # behind the last image token
        text = text if view.real is None else text & view.real
        image_at = ops.select_threshold(view.image_mask.float(), 0.5, capacity=max(view.images, default=0)).index
        text_at = ops.select_threshold(text.float(), 0.5, capacity=room).index
        image, words = ops.gather_tokens(view.embeddings, image_at), ops.gather_tokens(view.embeddings, text_at)
        weights = rater_weights(image, words, text_at >= 0, image_at >= 0)[1]
        return token_mask(torch.where(weights > 0, text_at, -1), text.shape[1])

    def _scores(self, view: StageView, query: Tensor, rows: Tensor) -> Tensor:
        assert view.key is not None
        N, M = view.hidden.shape[1], view.key.shape[2]
        span, weights = (M - N, M), (rows >= 0).float()
        positions = torch.where(rows < 0, -1, rows + M - N)
        visible = view.keys_visible()
        if not self.plus:
            return rater_scores(query, view.key, span, weights, positions, visible)
        ids = view.positions.gather(1, rows.clamp(min=0))
        decay = distance_decay(ids, view.positions, view.key.shape[-1], theta=self.theta)
        return corrected_scores(query, view.key, span, weights, positions, decay, self.heads, visible)[0]


def merge_dropped(hidden: Tensor, clusters: int, *, noise: Tensor | None = None) -> Tensor:
    """Recycled tokens (B, R, C), most attended first, as means of their clusters: (B, clusters, C), by falling score of the centre."""
    labels = ops.cluster_tokens(hidden, clusters, k=clusters, noise=noise).labels
    return ops.merge_by_label(hidden, labels, clusters, epsilon=1e-6)[0]
