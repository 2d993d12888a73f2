"""One neighbour of many channels goes through int16 products first (cosine_filter_cpu.h); two neighbours do not: same bits either way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tokensieve as ts
import torch
from reference.inputs import normal, seeded
from same_bits import cpu_levels, processor
from torch import Tensor

M, N = 150, 300


def pair(C: int) -> tuple[Tensor, Tensor]:
    return normal(seeded(C), 1, M, C), normal(seeded(C + 1), 1, N, C)


def near(C: int, copies: int, step: float) -> tuple[Tensor, Tensor]:
    """Every row of a has `copies` columns that differ by less than the int16 products can tell."""
    a, b = pair(C)
    for m in range(M):
        b[0, (m * 7 + torch.arange(copies) * 11) % N] = a[0, m] + step * normal(seeded(m), copies, C)
    return a, b


def replaced(rows: Callable[[Tensor, Tensor], None]) -> tuple[Tensor, Tensor]:
    a, b = pair(384)
    rows(a, b)
    return a, b


def zero_rows(a: Tensor, b: Tensor) -> None:
    a[0, 3] = b[0, 5] = 0


def one_nan(a: Tensor, b: Tensor) -> None:
    a[0, 100, 1] = b[0, 7, 2] = torch.nan


def infinite(a: Tensor, b: Tensor) -> None:
    b[0, 299, 0] = torch.inf


def denormal(a: Tensor, b: Tensor) -> None:
    a[0, 2] *= 1e-38
    b[0, 4] *= 1e-23
    b[0, 9] *= 1e-41


def one_channel(a: Tensor, b: Tensor) -> None:
    a[0, :, 1:] *= 1e-6
    b[0, :, 1:] *= 1e-6


def huge(a: Tensor, b: Tensor) -> None:
    a *= 1e18
    b *= 1e15


CASES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "random": lambda: pair(1152),
    "odd C": lambda: pair(1153),
    "more than 2048 channels": lambda: pair(2500),
    "near ties": lambda: near(1152, 3, 1e-5),
    "copies": lambda: near(512, 4, 0.0),
    "too many copies": lambda: near(512, 40, 0.0),
    "all equal": lambda: (torch.ones(1, M, 400), torch.ones(1, N, 400)),
    "negative": lambda: (torch.ones(1, M, 400), -torch.ones(1, N, 400) + 1e-3 * normal(seeded(1), 1, N, 400)),
    "zero rows": lambda: replaced(zero_rows),
    "NaN": lambda: replaced(one_nan),
    "infinity": lambda: replaced(infinite),
    "denormal": lambda: replaced(denormal),
    "one channel": lambda: replaced(one_channel),
    "huge": lambda: replaced(huge),
}


def assert_first_of_two(a: Tensor, b: Tensor, options: dict[str, object], what: str) -> None:
    value, index = ts.cosine_match(a, b, **options)
    values, indices = ts.cosine_match(a, b, k=2, **options)
    assert torch.equal(index, indices[..., 0]), what
    assert torch.equal(value.view(torch.int32), values[..., 0].contiguous().view(torch.int32)), what


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cosine_match_int16_products_first_change_no_bit(case: str) -> None:
    a, b = CASES[case]()
    mask = torch.rand(1, N, generator=seeded(9)) < 0.7
    for level in cpu_levels():
        with processor(level, torch.get_num_threads()):
            assert_first_of_two(a, b, {}, f"{case}, level {level}")
            assert_first_of_two(a, b, {"candidates": mask}, f"{case} with candidates, level {level}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cosine_match_int16_products_first_in_half_precision(dtype: torch.dtype) -> None:
    a, b = near(640, 3, 1e-3)
    assert_first_of_two(a.to(dtype), b.to(dtype), {}, str(dtype))


def test_cosine_match_int16_products_first_of_the_same_tokens_and_of_a_batch() -> None:
    x = normal(seeded(4), 5, N, 512)
    x[:, 100:104] = x[:, :1]
    assert_first_of_two(x, x, {"exclude_self": True}, "exclude_self")
    assert_first_of_two(x[:, ::2], x[:, 1::2], {}, "strided batch")
    assert torch.equal(ts.cosine_scores(x, x, reduction="max", exclude_self=True), ts.cosine_match(x, x, k=2, exclude_self=True)[0][..., 0])


def test_cosine_match_int16_products_first_find_every_planted_pair() -> None:
    a, b = near(1152, 1, 1e-3)
    value, index = ts.cosine_match(a, b)
    want = (torch.nn.functional.normalize(a.double(), dim=2) @ torch.nn.functional.normalize(b.double(), dim=2).mT).max(2)
    assert torch.equal(index, want.indices)
    torch.testing.assert_close(value.double(), want.values, rtol=0, atol=1e-6)
