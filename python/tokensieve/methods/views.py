"""What a method sees of a model: its images in the vision encoder, or the tokens of one stage between decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .positions import on_device, to_device


class Attention(NamedTuple):
    """What one encoder layer computed."""

    query: Tensor  # (R, H, 1, D), CLS; (R, H, N + 1, D) where the method reads all rows
    key: Tensor  # (R, H, N + 1, D), key 0 = CLS


@dataclass
class ImageView:
    """Images as the vision encoder left them. R rows: see `EncoderMethod.scope`; N patches a row, without CLS.

    What the method does not read is empty or None. Tuples and lists are host values.
    """

    layers: tuple[Attention, ...] = ()  # of `EncoderMethod.layers`
    patches: Tensor | None = None  # (R, N, C) encoder features that enter the projector
    projected: Tensor | None = None  # (R, N, C') what the projector makes of them; scope "stream": image tokens as the decoder gets them
    cls: Tensor | None = None  # (R, C) the CLS row beside `patches`
    candidates: Tensor | None = None  # (R, N) bool, patches that reach the language model; None = all
    counts: list[int] | None = None  # tokens to keep of each row, from `keep_count`
    grid: tuple[int, int] | None = None  # (wide, high) crops beside the thumbnail; None = no crops
    side: tuple[int, int] = (0, 0)  # (rows, columns) of patches in a crop
    image_size: tuple[int, int] | None = None  # (width, height) of the original in pixels; any resolution only
    project: Callable[[Tensor], Tensor] | None = None  # the model's projector, (..., C) -> (..., C')
    state: dict[str, Any] = field(default_factory=dict)  # the method's own, in all views of one prompt; `run.state` gives it

    def topk(self, scores: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The best patches of each row that compete: (R, max(counts)) ascending, -1 padded; counts are `self.counts` where None."""
        return _topk(scores, self.counts if counts is None else counts, self.candidates)


@dataclass
class StageView:
    """The tokens of a forward call at a stage: B samples, N tokens of the call, M >= N keys, those in the cache first.

    What the stage does not read is None. Lists are host values, one a sample.
    """

    stage: int  # which of the method's stages
    hidden: Tensor  # (B, N, C) residual stream that enters the layer
    image_mask: Tensor  # (B, N) bool, the image tokens that are left: those that compete
    visible: Tensor | None  # (B, M) bool, keys that can be seen: no padding, no token that a masking method hid; None = all
    real: Tensor | None  # (B, N) bool, no padding; a token that a masking method hid is real; None = all
    positions: Tensor  # (B, N) int64, RoPE positions
    columns: Tensor  # (B, N) int64, where each token stood in the call's input, -1 on pads
    images: list[int]  # image tokens left
    lengths: list[int]  # real tokens
    full: list[int]  # image tokens in the prompt
    last: list[int]  # column of the last real token
    counts: list[int] | None  # image tokens to keep, from `keep_count`, at most `images`
    query: Tensor | None = None  # (B, H, L, D) ranking rows (L = 1, or the answers' in training), or all N rows
    key: Tensor | None = None  # (B, Hkv, M, D); without RoPE (B, Hkv, N, D), the call's own
    query_positions: Tensor | None = None  # (B, L) int64, last key that each row sees, -1 = unused; None = each sees all
    state: dict[str, Any] = field(default_factory=dict)  # the method's own, from stage to stage of one call; `run.state` gives it
    runs: list[list[tuple[int, int]]] = field(default_factory=list)  # (start, length) of each image in the call's input
    side: tuple[int, int] | None = None  # (rows, columns) of patches in an image, a square in a plain decoder; None where not known
    norm: Callable[[Tensor], Tensor] | None = None  # the decoder's final norm
    embeddings: Tensor | None = None  # (B, S, C) what entered layer 0, where the method asks for it

    def scores(self, normalize: str = "row", **options: Any) -> Tensor:
        """(B, N) float32 attention of the rows to the call's tokens.

        Args:
            normalize: "row", softmax over all keys that a row sees, or "range", over the image tokens alone.
            options: further options of `ops.attention_scores`, such as head_reduction.
        """
        assert self.query is not None, "Stage.source is None: the stage reads no attention"
        assert self.key is not None
        N, M = self.hidden.shape[1], self.key.shape[2]
        bias = torch.nn.functional.pad(self.image_mask, (M - N, 0)) if normalize == "range" else self.keys_visible()
        options = {"bias": None if bias is None else bias[:, None, None, :], "key_range": (M - N, M), **options}
        return ops.attention_scores(
            self.query, self.key, causal=self.query_positions is not None, query_positions=self.query_positions, **options
        )

    def keys_visible(self) -> Tensor | None:
        """(B, key.shape[2]) bool, `visible` of the keys that are here; None = all."""
        assert self.key is not None
        return None if self.visible is None else self.visible[:, -self.key.shape[2] :]

    def topk(self, scores: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The best image tokens of each sample: (B, max(counts)) ascending, -1 padded; counts are `self.counts` where None."""
        return _topk(scores, self.counts if counts is None else counts, self.image_mask)

    def patches(self) -> tuple[Tensor, Tensor]:
        """(B, N) int64 number of each token within its image, counted in the prompt, and its image's number; -1 on text and pads."""
        width = max((start + n for sample in self.runs for start, n in sample), default=0) + 1
        number = torch.full((2, len(self.runs), width), -1)
        for row, sample in enumerate(self.runs):
            for image, (start, n) in enumerate(sample):
                number[0, row, start : start + n] = torch.arange(n)
                number[1, row, start : start + n] = image
        table = to_device(number, self.columns.device)
        place = torch.where((self.columns < 0) | (self.columns >= width), width - 1, self.columns)
        return table[0].gather(1, place), table[1].gather(1, place)


class BlockStep(NamedTuple):
    """What a step inside a block returns: M tokens that go on to the MLP, the model's prefix tokens first and in their order."""

    tokens: Tensor  # (B, M, C)
    index: Tensor  # type: ignore[assignment]  # (B, M) int64, the token of the view that each row stands on; -1 = a made one (EViT's)
    inverse: Tensor | None = None  # (B, N) int64, the row that each token of the view went into, -1 = dropped; None: what `index` says
    size: Tensor | None = None  # (B, M) float32, how many patches each row stands for; None: the method keeps no sizes
    log_size: Tensor | None = None  # (B, M) float32, where an op has it at hand; None: computed
    state: Any = None  # of the method's own: a tensor, or a tuple of tensors; the next step's `view.state`


@dataclass(frozen=True)
class BlockView:
    """One encoder block between its attention and its MLP: B images, N tokens, `prefix` of them before the patches."""

    block: int  # 0-based
    depth: int  # blocks of the encoder
    tokens: Tensor  # (B, N, C) residual stream after the attention was added
    query: Tensor  # (B, H, N, D) as the attention used them, unscaled
    key: Tensor  # (B, H, N, D)
    scale: float  # of the logits
    prefix: int  # tokens that are no patches and come first: CLS, distillation, registers
    cls: bool  # whether token 0 is CLS
    patches: int  # patches that entered block 0
    bias: Tensor | None = None  # (B, 1, 1, N) float32 that was added to the logits, log(size); None = nothing
    size: Tensor | None = None  # (B, N) float32, patches that each token stands for; None = 1 each
    state: Any = None  # what the last step returned; None in the first

    def cls_scores(self, **options: Any) -> Tensor:
        """(B, N) float32 share of CLS's attention that each token gets, mean over heads, CLS and other prefix tokens included.

        Args:
            options: further options of `ops.attention_scores`, such as head_reduction.

        Gradients reach the queries and keys.
        """
        return ops.attention_scores(self.query[:, :, :1], self.key, scale=self.scale, bias=self.bias, **options)


def _topk(scores: Tensor, counts: Sequence[int] | None, candidates: Tensor | None) -> Tensor:
    assert counts is not None, "keep_count gives no counts: pass them"
    width = max(counts, default=0)
    if min(counts, default=0) == width:
        return ops.select_topk(scores, width, candidates=candidates)
    return ops.select_topk(scores, on_device(counts, scores.device), max_k=width, candidates=candidates)
