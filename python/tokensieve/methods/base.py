"""What every method shares: the base classes that the registry lists and that `tokensieve.models` drives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor


class Method:
    """Base of the published methods: frozen dataclasses whose fields are the hyperparameters."""

    title: ClassVar[str]
    paper: ClassVar[str]
    hook: ClassVar[str]  # a key of `tokensieve.info.HOOKS`


class TensorMethod(Method):
    """A method that is called from your own model through the functions of its module; `sieve` does not drive it."""


class Stage(NamedTuple):
    """Tokens leave before layer `layer`, ranked by the attention of layer `source` (the same: by its projections, before it runs)."""

    layer: int
    source: int


class DecoderMethod(Method):
    """A method that drops image tokens between decoder layers."""

    hook = "dec"
    renumber: bool
    normalize: str
    max_length: int | None = None
    answers_rank: bool = False  # in training, the token before each answer ranks (and a sample without one passes unchanged)
    masking: bool = False  # hide the dropped tokens instead of removing them
    rerank: bool = False  # masking only: choose again at every decode step

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Where tokens are dropped, in layer order."""
        raise NotImplementedError

    def keep_count(self, stage: int, n_full: int) -> int:
        """Image tokens left after a stage, of n_full in the prompt."""
        raise NotImplementedError


class EncoderMethod(Method):
    """A method that drops image tokens by what the vision encoder attends to, before the decoder."""

    hook = "enc"

    def keep_count(self, candidates: int) -> int:
        """Tokens kept of one crop with this many candidates."""
        raise NotImplementedError

    def select(self, query: Tensor, key: Tensor, counts: Sequence[int], candidates: Tensor | None = None) -> Tensor:
        """(B, H, 1, D) CLS query and (B, H, N + 1, D) keys -> (B, max(counts)) kept patches, ascending, -1 padded."""
        raise NotImplementedError


def require_ints(owner: object, **fields: object) -> None:
    """Raises TypeError for a hyperparameter that counts something and is not an int: 1.5 layers would drop nothing in silence."""
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"tokensieve.{type(owner).__name__}: {name} must be an int, got {value!r}")


def require_numbers(owner: object, **fields: object) -> None:
    """Raises TypeError for a hyperparameter that is a share and is not a number."""
    for name, value in fields.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"tokensieve.{type(owner).__name__}: {name} must be a number, got {value!r}")


def require(condition: bool, owner: object, rule: str, got: object) -> None:
    """Raises ValueError in the package's form unless the condition holds."""
    if not condition:
        raise ValueError(f"tokensieve.{owner if isinstance(owner, str) else type(owner).__name__}: {rule}, got {got!r}")
