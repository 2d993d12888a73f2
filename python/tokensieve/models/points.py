"""Where a decoder's sequence changes its length: the stages of a method, checked against the model, and where tokens come back."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..methods.base import DecoderMethod, Stage


class Point(NamedTuple):
    """A new group of layers begins: tokens leave by `stage`, or come back (mixture of depths)."""

    layer: int
    stage: int
    back: bool


def points_of(method: Any, stages: tuple[Stage, ...], depth: int) -> tuple[Point, ...]:
    """The points of a method in a decoder of `depth` layers, in layer order; at one layer tokens come back before others leave.

    Raises:
        ValueError: stages that the model or each other do not allow; the message says which rule.
    """
    name = type(method).__name__
    beyond = [stage.layer for stage in stages if not 0 <= stage.layer < depth]
    if beyond:
        raise ValueError(f"tokensieve.sieve: {name} drops before layers {beyond}, the model has layers 0..{depth - 1}")
    points, free = [], 0  # the next stage may read and begin from this layer on
    for number, stage in enumerate(stages):
        layer, source, rows, _, until = stage
        rules = (
            (layer > stages[number - 1].layer if number else True, "layers of stages must increase"),
            (layer >= free, "a stage must not begin before the tokens of the stage before are back"),
            (source is None or free <= source <= layer, f"source must be None or a layer in [{free}, {layer}]"),
            (rows in ("last", "all"), "rows must be 'last' or 'all'"),
            (until is None or layer < until < depth, f"until must be None or a layer in [{layer + 1}, {depth - 1}]"),
        )
        _require(rules, name, stage)
        points.append(Point(layer, number, False))
        free = layer
        if until is not None:
            points.append(Point(until, number, True))
            free = until
    if isinstance(method, DecoderMethod):
        ranked = type(method).select is DecoderMethod.select
        readable = all(stage.source is not None and stage.rope for stage in stages)
        away = any(stage.until is not None for stage in stages)
        moves = method.renumber or method.ordered or away
        shape = (
            (readable or not ranked, "a method without select ranks by attention after RoPE: source must be a layer"),
            (not method.masking or not moves, "masking leaves every token in its place"),
            (not away or not method.renumber, "tokens that come back need their own positions, renumber = False"),
            (not method.rerank or (ranked and method.masking and len(stages) == 1), "rerank needs masking, one stage and no select"),
        )
        _require(shape, name, stages)
    return tuple(sorted(points, key=lambda point: (point.layer, not point.back)))


def _require(rules: Any, name: str, got: Any) -> None:
    for holds, rule in rules:
        if not holds:
            raise ValueError(f"tokensieve.sieve: {name}: {rule}, got {got}")
