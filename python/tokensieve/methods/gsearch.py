"""G-Search and P-Sigmoid: a share of image tokens for every decoder layer (arXiv 2412.00556, CVPR 2025). No official code was at hand."""

from __future__ import annotations

from dataclasses import dataclass

from .. import schedules
from .base import DecoderMethod, Stage, require, require_ints, require_numbers


class ScheduledDrop(DecoderMethod):
    """A method whose layers each see int(rate * N) image tokens, ranked by the layer before; tokens leave where that count falls."""

    renumber = False
    normalize = "row"

    @property
    def rates(self) -> tuple[float, ...]:
        """Share of the prompt's image tokens that each layer sees."""
        raise NotImplementedError

    @property
    def stages(self) -> tuple[Stage, ...]:
        rates = self.rates
        return tuple(Stage(layer, layer - 1) for layer in range(1, len(rates)) if rates[layer] < rates[layer - 1])

    def keep_count(self, stage: int, n_full: int) -> int:
        return int(self.rates[self.stages[stage].layer] * n_full)


@dataclass(frozen=True)
class GSearch(ScheduledDrop):
    """G-Search (arXiv 2412.00556): a share of image tokens for every layer, found by `tokensieve.schedules.search` for your model.

    Args:
        rates: share of the prompt's image tokens that each layer sees; the first is 1, none is larger than the one before. A layer keeps
            the int(rate * N) tokens to which the last token attends most in the layer before; dropped tokens never return.

    Differs from the official code: none was at hand, so rounding (int), ranking (the last token's row) and original positions are our
    choice. The default is not the paper's, whose tables belong to its models: 32 layers falling to 10 % in steps. Search for your own.

    Example:
        >>> method = GSearch(rates=(1.0, 0.5, 0.5, 0.25))
        >>> [stage.layer for stage in method.stages], [method.keep_count(i, 576) for i in range(2)]
        ([1, 3], [288, 144])
    """

    title = "G-Search"
    paper = "arXiv 2412.00556"

    rates: tuple[float, ...] = schedules.ratio((2, 8, 16, 24), (0.75, 0.5, 0.25, 0.1), 32)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", schedules.check_rates(self.rates, owner=type(self).__name__))
        require(self.rates[0] == 1, self, "rates must begin with 1, because nothing ranks the tokens before layer 0", self.rates[0])


@dataclass(frozen=True)
class PSigmoid(ScheduledDrop):
    """P-Sigmoid (arXiv 2412.00556): a falling logistic share of image tokens over the layers; `schedules.search_sigmoid` finds it.

    Args:
        num_layers: layers of the decoder.
        steepness, centre, floor: of `tokensieve.schedules.sigmoid`.

    Differs from the official code: none was at hand (see GSearch), and the defaults are ours: half of the tokens are gone at layer 8 of 32.

    Example:
        >>> method = PSigmoid(num_layers=4, steepness=2.0, centre=1.0)
        >>> [method.keep_count(i, 576) for i in range(len(method.stages))]
        [302, 94, 38]
    """

    title = "P-Sigmoid"
    paper = "arXiv 2412.00556"

    num_layers: int = 32
    steepness: float = 0.5
    centre: float = 8.0
    floor: float = 0.05

    def __post_init__(self) -> None:
        require_ints(self, num_layers=self.num_layers)
        require_numbers(self, steepness=self.steepness, centre=self.centre, floor=self.floor)
        self.rates  # raises what the curve does not allow  # noqa: B018

    @property
    def rates(self) -> tuple[float, ...]:
        return schedules.sigmoid(self.num_layers, steepness=self.steepness, centre=self.centre, floor=self.floor)
