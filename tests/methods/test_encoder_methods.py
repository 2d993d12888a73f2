"""VTC-CLS, HiRED, TS-LLaVA, DAMRO and the any-resolution helpers against slow references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reference import encoder as reference
from tokensieve.methods import DAMRO, VTCCLS, HiRED, TSLLaVA, anyres, damro, hired, tsllava, vtc_cls
from tokensieve.ops import gather_tokens
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(device: str, dtype: torch.dtype, B: int, H: int, N: int, D: int, C: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """CLS query, keys with CLS, features without."""
    query, key, features = torch.randn(B, H, 1, D), 2 * torch.randn(B, H, N + 1, D), torch.randn(B, N, C)
    return query.to(device, dtype), key.to(device, dtype), features.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vtc_cls_against_the_reference(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [tensors(device, dtype, 2, 3, 40, 20) for _ in range(3)]
    queries, keys, features = [x[0] for x in layers], [x[1] for x in layers], layers[0][2]
    out, index, scores = vtc_cls.keep_patches(queries, keys, features, 9)
    for b in range(2):
        want = torch.stack([reference.cls_attention(q[b, :, 0].cpu(), k[b].cpu()) for q, k in zip(queries, keys)]).sum(0)
        torch.testing.assert_close(scores[b].cpu().double(), want, rtol=1e-5, atol=1e-7)
        assert index[b].tolist() == sorted(reference.best(want, 9))
        assert torch.equal(out[b], features[b, index[b]])
    assert vtc_cls.keep_patches(queries, keys, features, 0)[0].shape == (2, 0, 8)
    assert vtc_cls.keep_patches(queries, keys, features, 40)[1].tolist() == [list(range(40))] * 2
    with pytest.raises(ValueError, match="tokens must be at most N=40 patches, got 41"):
        vtc_cls.keep_patches(queries, keys, features, 41)
    with pytest.raises(ValueError, match=r"as many, at least one layer, got \(3, 2\)"):
        vtc_cls.summed_scores(queries, keys[:2])
    with pytest.raises(ValueError, match="at least one layer"):
        vtc_cls.summed_scores([], [])


def test_vtc_cls_layers_are_a_python_slice_without_the_last() -> None:
    for first in (-24, -3, 0, 5, 22):
        assert list(VTCCLS(first_layer=first).layers(24, 22)) == list(range(24))[first:-1]
    for first in (23, 30, -1):
        with pytest.raises(ValueError, match="first_layer must leave a layer before the last of 24"):
            VTCCLS(first_layer=first).layers(24, 22)


@pytest.mark.parametrize(("grid", "side"), [((2, 2), (4, 6)), ((3, 1), (6, 4)), ((1, 4), (4, 4))])
@pytest.mark.parametrize("method", [HiRED(), HiRED(0.35, 0.2), HiRED(0.9, 0.8), HiRED(0.5, 1.0), HiRED(0.5, 0.0), HiRED(0.0), HiRED(1.0)])
def test_hired_against_the_reference(device: str, grid: tuple[int, int], side: tuple[int, int], method: HiRED) -> None:
    torch.manual_seed(1)
    P, N = 1 + grid[0] * grid[1], side[0] * side[1]
    first, late = (hired.cls_scores(*tensors(device, torch.float32, P, 2, N, 12)[:2]) for _ in range(2))
    kept = hired.select(first, late, method)
    full, budgets = reference.hired_counts(first[0].cpu(), P, method.rate, method.alpha)
    assert kept.counts.tolist() == [full, *budgets]
    chosen = [sorted(reference.best(late[p].cpu(), n)) for p, n in enumerate([full, *budgets])]
    assert [[n for n in row if n >= 0] for row in kept.index.tolist()] == chosen
    for image_size in ((100, 90), (40, 200), (301, 60)):
        index, count = hired.pack(kept, image_size, grid, side)
        raster = [cell for row in reference.unpadded(reference.stitched(grid, side), image_size) for cell in row]
        want = chosen[0] + [(1 + crop) * N + patch for crop, patch in raster if patch in chosen[1 + crop]]
        assert int(count) == len(want)
        assert index[0].tolist() == want + [-1] * (index.shape[1] - len(want))


def test_hired_scores_are_head_sums(device: str) -> None:
    torch.manual_seed(2)
    query, key, _ = tensors(device, torch.float32, 3, 4, 20, 8)
    got = hired.cls_scores(query, key)
    for p in range(3):
        torch.testing.assert_close(
            got[p].cpu().double(), reference.cls_attention(query[p, :, 0].cpu(), key[p].cpu(), "sum"), rtol=1e-5, atol=1e-7
        )


def test_hired_budgets_are_float32_and_lose_a_token_where_the_authors_do() -> None:
    counts = torch.tensor([53, 147])
    first = torch.zeros(1, 400)
    first[0, :53] = first[0, 200:347] = 1.0
    kept = hired.select(first, torch.rand(3, 400), HiRED(rate=400 / 1200, alpha=0.5))
    assert kept.marked.view(2, 200).sum(1).tolist() == counts.tolist()
    assert kept.counts.tolist() == [200, 52, 147]  # float32: 53 / 200 * 200 < 53


def test_hired_one_image_and_cells() -> None:
    late = torch.rand(1, 30)
    kept = hired.select(late, late, HiRED(rate=0.25))
    assert kept.index[0].tolist() == sorted(reference.best(late[0], 7))
    first = torch.zeros(1, 16)
    first[0, [0, 1, 4, 5, 2, 3]] = 1.0  # four marks in the upper left quadrant, two in the upper right
    wide = hired.select(first, torch.rand(5, 16), HiRED(rate=0.3, alpha=0.625, regions="cells"), (2, 2), (4, 4))
    assert wide.counts.tolist() == [15, 6, 3, 0, 0]
    bands = hired.select(first, torch.rand(5, 16), HiRED(rate=0.3, alpha=0.625))
    assert bands.counts.tolist() == [15, 6, 3, 0, 0]  # here rows 0 and 1 are the first two bands: as many marks, other patches
    with pytest.raises(ValueError, match="regions='cells' needs grid and side"):
        hired.select(first, torch.rand(5, 16), HiRED(regions="cells"))
    with pytest.raises(ValueError, match="3 crops must divide N patches, got 16"):
        hired.select(first, torch.rand(4, 16), HiRED())
    with pytest.raises(ValueError, match="grid and side must make 4 crops of 16 patches"):
        hired.pack(bands, (10, 10), (2, 1), (4, 4))


@pytest.mark.parametrize(("total", "count"), [(50, 6), (28800, 2880), (28800, 2304), (195, 97), (13, 4), (7, 7), (5, 1), (1, 1), (3, 0)])
def test_tsllava_positions_are_float32_linspace(total: int, count: int) -> None:
    index = tsllava.even_index(total, count).tolist()
    assert index == (reference.even_positions(total, count) if count else [])
    if (total, count) == (28800, 2880):
        assert index[2399] == 23998  # 23997 in exact arithmetic


def test_tsllava_grids() -> None:
    assert [TSLLaVA(frames=n).grid() for n in (1, 4, 6, 8, 5, 12, 16)] == [(1, 1), (2, 2), (3, 2), (4, 2), (5, 1), (4, 3), (4, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 36), (4, 5), (4, 40)])
@pytest.mark.parametrize("pictures", [1, 3, None])
def test_tsllava_pictures_are_resized_cells_in_a_grid(
    device: str, dtype: torch.dtype, shape: tuple[int, int], pictures: int | None
) -> None:
    torch.manual_seed(3)
    frames = torch.rand(15, 3, *shape).to(device, dtype)
    got = tsllava.thumbnails(frames, TSLLaVA(frames=6, size=31, pictures=pictures))
    chosen = list(range(12)) if pictures is None else reference.even_positions(15, 6 * pictures)  # 15 frames fill two pictures
    assert got.shape == (len(chosen) // 6, 3, 30, 30)  # 31 is not divisible: a smaller canvas
    assert got.dtype == dtype
    for place, frame in enumerate(chosen):
        picture, y, x = place // 6, place % 6 // 2 * 10, place % 2 * 15
        mode: dict[str, Any] = {"mode": "area"} if min(10 - shape[0], 15 - shape[1]) < 0 else {"mode": "bilinear", "align_corners": False}
        want = torch.nn.functional.interpolate(frames[frame : frame + 1].float(), size=(10, 15), **mode)[0]
        assert torch.equal(got[picture, :, y : y + 10, x : x + 15], want.to(dtype))


def test_tsllava_sequences(device: str) -> None:
    features, picture = torch.randn(4, 6, 3, device=device), torch.randn(2, 5, 3, device=device)
    shown = picture.flatten(0, 1)
    want = features.flatten(0, 1)[reference.even_positions(24, 7)]
    assert torch.equal(tsllava.aggregate(features, picture, TSLLaVA(tokens=7))[0], torch.cat([want, shown]))
    assert torch.equal(tsllava.aggregate(features, picture, TSLLaVA(tokens=7, thumbnail_first=True))[0], torch.cat([shown, want]))
    assert torch.equal(tsllava.aggregate(features, picture, TSLLaVA(tokens=0))[0], shown)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, T \* N = 24\], got 25"):
        tsllava.sample_tokens(features, 25)
    with pytest.raises(ValueError, match="size must be at least the 3 x 2 grid, got 2"):
        tsllava.thumbnails(torch.rand(2, 3, 4, 4), TSLLaVA(size=2))
    with pytest.raises(ValueError, match="frames must fill a picture of 6, got 5"):
        tsllava.thumbnails(torch.rand(5, 3, 4, 4), TSLLaVA(pictures=None))
    with pytest.raises(ValueError, match="total must be positive"):
        tsllava.even_index(0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_head", [True, False])
def test_damro_against_the_reference(device: str, dtype: torch.dtype, one_head: bool) -> None:
    torch.manual_seed(4)
    query, key, features = tensors(device, dtype, 3, 4, 30, 16)
    out, index, scores = damro.negative_tokens(query, key, features, DAMRO(tokens=5, one_head=one_head))
    for b in range(3):
        q, k = query[b, :, 0].cpu(), key[b].cpu()
        if one_head:
            q, k = q.reshape(1, 64), k.transpose(0, 1).reshape(1, 31, 64)
        want = reference.cls_attention(q, k)
        torch.testing.assert_close(scores[b].cpu().double(), want, rtol=1e-5, atol=1e-7)
        assert index[b].tolist() == reference.best(want, 5)
        assert torch.equal(out[b], features[b, index[b]])
    with pytest.raises(ValueError, match="features must have the N=30 patches without CLS, got 31"):
        damro.negative_tokens(query, key, torch.cat([features, features[:, :1]], 1), DAMRO())


def test_damro_contrastive_logits(device: str) -> None:
    torch.manual_seed(5)
    logits, negative = 4 * torch.randn(3, 50, device=device), torch.randn(3, 50, device=device)
    got = damro.contrastive_logits(logits, negative, alpha=0.5, beta=0.1)
    p = logits.double().softmax(-1)
    for b in range(3):
        for v in range(50):
            if p[b, v] < 0.1 * p[b].max():
                assert got[b, v] == -math.inf
            else:
                assert abs(float(got[b, v]) - (1.5 * float(logits[b, v]) - 0.5 * float(negative[b, v]))) < 1e-5
    assert torch.equal(damro.contrastive_logits(logits, negative, alpha=0.0, beta=1.0).argmax(-1), logits.argmax(-1))
    assert bool((damro.contrastive_logits(logits, negative, beta=1.0).isfinite().sum(-1) == 1).all())


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)])
@pytest.mark.parametrize("side", [(4, 4), (3, 5)])
def test_mosaic_and_padding(grid: tuple[int, int], side: tuple[int, int]) -> None:
    N, picture = side[0] * side[1], reference.stitched(grid, side)
    assert anyres.mosaic(grid, side).tolist() == [[crop * N + patch for crop, patch in row] for row in picture]
    for image_size in ((50, 50), (7, 300), (300, 7), (31, 10), (1, 1)):
        shown = {cell for row in reference.unpadded(picture, image_size) for cell in row}
        got = anyres.shown_patches(image_size, grid, side)
        assert {(c, n) for c in range(grid[0] * grid[1]) for n in range(N) if got[c, n]} == shown
    for n, cell in enumerate(anyres.crop_cells(grid, side).tolist()):
        y, x = min(n // side[1] // (side[0] // grid[1]), grid[1] - 1), min(n % side[1] // (side[1] // grid[0]), grid[0] - 1)
        assert cell == y * grid[0] + x


def test_padding_agrees_with_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    generator = torch.Generator().manual_seed(0)
    for width, height in torch.randint(20, 900, (200, 2), generator=generator).tolist():
        for wide, high in ((24, 48), (48, 24), (48, 48), (72, 24)):
            numbers = torch.arange(high * wide).view(1, high, wide)
            cut = modeling.unpad_image(numbers, (height, width))[0]
            top, bottom, left, right = anyres.padding_cut((width, height), (wide, high))
            assert torch.equal(numbers[0, top:bottom, left:right], cut), (width, height, wide, high)


def test_steps_capture_no_host_value() -> None:
    """The device parts trace with fake tensors, so nothing in them reads a value on the host."""
    late, features = torch.rand(5, 16), torch.rand(1, 80, 4)

    def step(first: Tensor, late: Tensor, features: Tensor) -> Tensor:
        kept = hired.select(first, late, HiRED())
        return gather_tokens(features, hired.pack(kept, (20, 19), (2, 2), (4, 4))[0])

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(late, late, features), step(late, late, features))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: VTCCLS(tokens=-1), "VTCCLS: tokens must be 0 or more, got -1"),
        (lambda: HiRED(rate=1.5), r"HiRED: rate must be in \[0, 1\], got 1.5"),
        (lambda: HiRED(alpha=-0.5), r"HiRED: alpha must be in \[0, 1\], got -0.5"),
        (lambda: HiRED(regions="rows"), "HiRED: regions must be 'bands' or 'cells', got 'rows'"),
        (lambda: TSLLaVA(frames=0), "TSLLaVA: frames must be 1 or more, got 0"),
        (lambda: TSLLaVA(tokens=-1), "TSLLaVA: tokens must be 0 or more, got -1"),
        (lambda: TSLLaVA(pictures=0), "TSLLaVA: pictures must be 1 or more, or None, got 0"),
        (lambda: TSLLaVA(size=0), "TSLLaVA: size must be 1 or more, got 0"),
        (lambda: DAMRO(tokens=-1), "DAMRO: tokens must be 0 or more, got -1"),
        (lambda: DAMRO(beta=0), r"DAMRO: beta must be in \(0, 1\], got 0"),
    ],
)
def test_bad_fields_are_errors(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^tokensieve.{rule}$"):
        make()


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: VTCCLS(tokens=1.5), "VTCCLS: tokens must be an int, got 1.5"),
        (lambda: VTCCLS(first_layer="a"), "VTCCLS: first_layer must be an int, got 'a'"),
        (lambda: HiRED(rate="a"), "HiRED: rate must be a number, got 'a'"),
        (lambda: TSLLaVA(frames=2.0), "TSLLaVA: frames must be an int, got 2.0"),
        (lambda: DAMRO(alpha=None), "DAMRO: alpha must be a number, got None"),
    ],
)
def test_fields_of_the_wrong_type(make: Any, rule: str) -> None:
    with pytest.raises(TypeError, match=f"^tokensieve.{rule}$"):
        make()
