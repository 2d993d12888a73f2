"""Schedules as plain tuples: rates[l] is the share of the prompt's image tokens that layer l sees; they never grow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def _fail(function: str, rule: str, got: object) -> None:
    raise ValueError(f"tokensieve.schedules.{function}: {rule}, got {got!r}")


def check_rates(rates: Sequence[float], *, owner: str = "schedules.check_rates") -> tuple[float, ...]:
    """The rates as a tuple of floats, after the rules: at least one layer, all in [0, 1], none larger than the one before.

    Raises:
        TypeError: a rate that is not a number.
        ValueError: an empty schedule, a rate outside [0, 1] or NaN, or a schedule that grows: a dropped token cannot come back.

    Example:
        >>> check_rates([1, 0.5, 0.5])
        (1.0, 0.5, 0.5)
        >>> check_rates([0.5, 1.0])
        Traceback (most recent call last):
        ValueError: tokensieve.schedules.check_rates: rates must not grow, got 1.0 after 0.5 at layer 1
    """
    for value in rates:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"tokensieve.{owner}: rates must be numbers, got {value!r}")
    out = tuple(float(value) for value in rates)
    if not out:
        raise ValueError(f"tokensieve.{owner}: rates must hold at least one layer, got none")
    for layer, value in enumerate(out):
        if not 0 <= value <= 1:  # NaN too
            raise ValueError(f"tokensieve.{owner}: rates must be in [0, 1], got {value} at layer {layer}")
        if layer and value > out[layer - 1]:
            raise ValueError(f"tokensieve.{owner}: rates must not grow, got {value} after {out[layer - 1]} at layer {layer}")
    return out


def keep_counts(rates: Sequence[float], n_full: int) -> tuple[int, ...]:
    """Image tokens that every layer sees, of n_full in the prompt: int(rate * n_full), as PyramidDrop rounds.

    Example:
        >>> keep_counts((1.0, 0.5, 0.125), 577)
        (577, 288, 72)
    """
    return tuple(int(rate * n_full) for rate in rates)


def ratio(layers: Sequence[int], keep: Sequence[float], num_layers: int) -> tuple[float, ...]:
    """A staircase: from layer layers[i] on, keep[i] of the image tokens are left.

    Args:
        layers: increasing 0-based layers, 1 or more, at whose entrance the share changes.
        keep: shares of the original count, in [0, 1], never growing.
        num_layers: layers of the decoder.

    Returns:
        num_layers rates, 1.0 before the first stage.

    Source: PyramidDrop (arXiv 2410.17247, section 3.2).

    Example:
        >>> ratio((1, 3), (0.5, 0.25), 5)
        (1.0, 0.5, 0.5, 0.25, 0.25)
    """
    if len(layers) != len(keep):
        _fail("ratio", f"keep must have one share for each of {len(layers)} layers", len(keep))
    if any(not 1 <= layer < num_layers for layer in layers):
        _fail("ratio", f"layers must be in [1, {num_layers - 1}]", tuple(layers))
    if any(after <= before for before, after in itertools.pairwise(layers)):
        _fail("ratio", "layers must increase", tuple(layers))
    rates = [1.0] * num_layers
    for layer, share in zip(layers, keep):
        rates[layer:] = [share] * (num_layers - layer)
    return check_rates(rates, owner="schedules.ratio")


def sigmoid(num_layers: int, *, steepness: float, centre: float, floor: float = 0.0, ceiling: float = 1.0) -> tuple[float, ...]:
    """A falling logistic curve over the layers: floor + (ceiling - floor) / (1 + exp(steepness * (l - centre))), and 1 at layer 0.

    Args:
        num_layers: layers of the decoder.
        steepness: per layer, 0 or more; 0 gives the middle everywhere.
        centre: layer at which half of the way down is done; any float.
        floor, ceiling: limits of the share, 0 <= floor <= ceiling <= 1.

    Layer 0 has nothing before it that could rank the tokens, so its rate is 1.

    Source: P-Sigmoid (arXiv 2412.00556); the parametrisation is ours, because the paper's was not at hand.

    Example:
        >>> [round(rate, 3) for rate in sigmoid(4, steepness=2.0, centre=1.0)]
        [1.0, 0.5, 0.119, 0.018]
    """
    if num_layers < 1:
        _fail("sigmoid", "num_layers must be 1 or more", num_layers)
    if not (steepness >= 0 and math.isfinite(steepness)):
        _fail("sigmoid", "steepness must be finite and 0 or more", steepness)
    if not math.isfinite(centre):
        _fail("sigmoid", "centre must be finite", centre)
    if not 0 <= floor <= ceiling <= 1:
        _fail("sigmoid", "limits must satisfy 0 <= floor <= ceiling <= 1", (floor, ceiling))

    def logistic(x: float) -> float:  # 1 / (1 + exp(x)) without overflow
        return 1 / (1 + math.exp(x)) if x < 0 else math.exp(-x) / (1 + math.exp(-x))

    curve = [floor + (ceiling - floor) * logistic(steepness * (layer - centre)) for layer in range(1, num_layers)]
    return check_rates([1.0, *curve], owner="schedules.sigmoid")
