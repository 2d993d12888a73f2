"""What every method shares: the base classes that the registry lists and that `tokensieve.models` drives."""

from __future__ import annotations

import warnings
from functools import cache
from typing import ClassVar, NamedTuple

from torch import Tensor

from .views import BlockStep, BlockView, ImageView, StageView


class Method:
    """Base of the published methods: frozen dataclasses whose fields are the hyperparameters."""

    title: ClassVar[str]
    paper: ClassVar[str]
    hook: ClassVar[str]  # a key of `tokensieve.info.HOOKS`


class TensorMethod(Method):
    """A method that is called from your own model through the functions of its module; `sieve` does not drive it."""


class Stage(NamedTuple):
    """Tokens leave before layer `layer`, by what `source` says.

    source: the layer whose attention is read, `layer` itself (by its projections, before it runs) or one after the last stage; None = none.
    rows: "last", the rows that rank (the last real token; with `answers_rank` those before the answers), or "all" of the call.
    rope: False reads queries and keys as they are before RoPE; keys of the call alone, because a cache holds rotated ones.
    until: the tokens that left come back before this layer, as they were (mixture of depths); None = never.
    """

    layer: int
    source: int | None = None
    rows: str = "last"
    rope: bool = True
    until: int | None = None


class DecoderMethod(Method):
    """A method that drops image tokens between decoder layers.

    A subclass says `stages`, and either `keep_count` alone (the last token ranks, one fused op) or `select` as well. Padding, several
    images, caches, positions, masks, labels and generation are the driver's business. `select` runs without gradients.
    """

    hook = "dec"
    renumber: bool = False  # True: survivors get contiguous positions; False: they keep theirs
    normalize: str = "row"  # of the default ranking: softmax over the whole row, or "range", over the image tokens alone
    max_length: int | None = None  # of the default ranking: cut every sample after so many tokens
    answers_rank: bool = False  # in training, the token before each answer ranks (and a sample without one passes unchanged)
    masking: bool = False  # hide the dropped tokens instead of removing them; flash attention then gives their own rows no output
    rerank: bool = False  # default ranking and masking only: choose again at every decode step
    ordered: bool = False  # tokens follow each other as `select` lists them, not as they stood
    embeddings: bool = False  # the view holds what entered layer 0

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Where tokens are dropped, in layer order."""
        raise NotImplementedError

    def keep_count(self, stage: int, n_full: int) -> int | None:
        """Image tokens left after a stage, of n_full in the prompt; None: `select` decides, which costs one host read a stage."""
        return None

    def select(self, view: StageView) -> Tensor | None:
        """The image tokens that stay.

        Returns:
            (B, K) int64, positions in 0..N-1, -1 = nothing (anywhere in a row); K is a host value, such as max(view.images). A row holds
            as many of `view.image_mask` as `keep_count` says. None: all stay. By default the best of `view.scores`; the driver does that
            in one fused op, so it never calls this default.
        """
        return view.topk(view.scores(self.normalize))

    def replace(self, view: StageView, index: Tensor) -> Tensor | None:
        """(B, K, C) new hidden states of the tokens in `index` (merged tokens, for example), or None: as they are; with gradients.

        A token that stands for no single one takes the place of a token that would have left: list that one in `index`.
        """
        return None

    def restore(self, stage: int, before: Tensor, after: Tensor, image: Tensor) -> Tensor:
        """With `Stage.until`: (B, K, C) hidden states that tokens return with, of those before and after the layers; with gradients.

        Args:
            image: (B, K) bool, image tokens; the others are text.
        """
        return after


class EncoderMethod(Method):
    """A method that drops image tokens before the decoder, by what the vision encoder saw.

    A subclass says what it reads and `select`. Which patch is which token of the prompt, newlines, padding of any-resolution mosaics,
    several images and generation are the driver's business. `select` runs without gradients.
    """

    hook = "enc"
    scope: ClassVar[str] = "crop"  # rows of a view: "crop", all crops of all images; "image", the crops of one image, thumbnail first;
    #   "stream", one image a row, its tokens as the decoder gets them with newlines: `projected`, and `index` counts them
    rows: ClassVar[str] = "cls"  # "all": the queries of every row
    features: ClassVar[tuple[str, ...]] = ()  # of "patches", "projected", "cls"
    keep_newlines: bool = False  # any resolution: newline tokens stay; scope "stream" decides for itself
    ordered: bool = False  # tokens of a row follow each other as `select` lists them, not in raster order

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        """Encoder layers whose queries and keys are read, of `depth`; `feature` is the one whose output becomes the features."""
        return (feature,)

    def keep_count(self, candidates: int) -> int | None:
        """Tokens kept of one row with so many candidates; None: `select` decides, which costs one host read a prompt."""
        return None

    def select(self, view: ImageView) -> Tensor | None:
        """The patches that stay.

        Returns:
            (R, T) int64, positions in 0..N-1, -1 = nothing (anywhere in a row). A row holds as many of `view.candidates` as `keep_count`
            says; without it, patches that do not reach the language model are lost. None: all stay, as None for every view of a prompt.
        """
        raise NotImplementedError

    def replace(self, view: ImageView, index: Tensor) -> Tensor | None:
        """(R, T, C') new features of the patches in `index`, projected (`view.project`), or None: as they are; with gradients.

        A token that stands for no single patch takes the place of one that would have left: list that one in `index`.
        """
        return None


class BlockMethod(Method):
    """A method that shortens the sequence inside encoder blocks: after the attention residual, before the MLP.

    A subclass says `blocks` and `step`. What goes on from block to block (sizes, the method's own state) is passed by value: a step reads
    its view and returns a `BlockStep`, it stores nothing, so that checkpointing and compilation may run it again. Blocks that `blocks`
    leaves out run the model's own code. Every shape comes from host values: nothing is read from the device.
    """

    hook = "vit"
    needs_cls: ClassVar[bool] = False  # True: the model must have a CLS token at position 0
    proportional: bool = True  # once a step has returned sizes, their log is added to the logits of the keys of all later blocks

    def blocks(self, depth: int) -> tuple[int, ...]:
        """0-based blocks whose `step` runs, ascending, of `depth`."""
        return tuple(range(depth))

    def step(self, view: BlockView) -> BlockStep | None:
        """What follows the attention of one block; None: all tokens go on as they are. With gradients."""
        raise NotImplementedError


def require_ints(owner: object, **fields: object) -> None:
    """Raises TypeError for a hyperparameter that counts something and is no int (or a tuple of them): 1.5 layers would drop nothing."""
    for name, value in fields.items():
        items = {f"{name}[{i}]": item for i, item in enumerate(value)} if isinstance(value, tuple) else {name: value}
        for label, item in items.items():
            if not isinstance(item, int) or isinstance(item, bool):
                raise TypeError(f"tokensieve.{type(owner).__name__}: {label} must be an int, got {item!r}")


def require_numbers(owner: object, **fields: object) -> None:
    """Raises TypeError for a hyperparameter that is a share and is not a number."""
    for name, value in fields.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"tokensieve.{type(owner).__name__}: {name} must be a number, got {value!r}")


@cache
def warn_once(method: Method, text: str) -> None:
    """Warns the first time that a method (one of equal fields) meets what the text says."""
    warnings.warn(f"tokensieve: {method} {text}", stacklevel=3)


def require(condition: bool, owner: object, rule: str, got: object) -> None:
    """Raises ValueError in the package's form unless the condition holds."""
    if not condition:
        raise ValueError(f"tokensieve.{owner if isinstance(owner, str) else type(owner).__name__}: {rule}, got {got!r}")
