"""knn_density, nearest_center and cluster_tokens against float64 distances of all pairs."""

from __future__ import annotations

import math

import pytest
import tokensieve as ts
import torch
from reference import density as reference
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, seeded
from reference.similarity import random_mask
from same_bits import on_any_threads
from torch import Tensor

# (N, C): one token, panel (16), block (144) edges; 128 channels; a real size.
SHAPES = [(1, 3), (2, 1), (15, 5), (17, 130), (143, 33), (145, 64), (300, 20), (576, 64)]


def check(x: Tensor, k: int, noise: Tensor | None = None, mask: Tensor | None = None, where: str = "") -> tuple[Tensor, Tensor]:
    """Densities near those in float64; distances near those that follow from the densities returned."""
    density, distance = ts.knn_density(x, k, noise=noise, mask=mask)
    assert (density.dtype, distance.dtype, density.shape, distance.shape) == (torch.float32, torch.float32, x.shape[:2], x.shape[:2])
    torch.testing.assert_close(density.cpu().double(), reference.density(x, k, noise, mask), rtol=1e-5, atol=1e-12, msg=lambda m: where + m)
    expected = reference.denser_distance(x, density, mask, noise is None)
    torch.testing.assert_close(distance.cpu().double(), expected, rtol=1e-5, atol=1e-12, msg=lambda m: where + m)
    return density, distance


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_knn_density_equals_float64(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    N, C = shape
    x = normal(seeded(N), 2, N, C, dtype=dtype, device=device)
    noise = torch.rand(2, N, generator=seeded(C)).to(device)
    mask = random_mask(N, 2, N, 0.7).to(device)
    for k in sorted({1, min(5, N), min(40, N), N}):
        check(x, k, None, None, f"{shape} {dtype} k={k} ")
        check(x, k, noise, mask, f"{shape} {dtype} k={k} masked ")


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred", "far from 0"])
def test_knn_density_keeps_its_digits_between_tokens_that_are_nearly_alike(offset: float, device: str) -> None:
    x = offset + normal(seeded(3), 1, 4, 200, device=device).repeat(1, 20, 1) + 1e-2 * normal(seeded(4), 1, 80, 200, device=device)
    density, _ = check(x, 5)
    assert 0 < float(1 - density.min()) < 1e-3


def alike_and_far(seed: int, device: str) -> Tensor:
    """(1, 130, 96): 5 groups of tokens that differ by 0.001 within and by some 20 between; products lose the former."""
    groups = 20 * normal(seeded(seed), 1, 5, 96, device=device)
    return groups.repeat(1, 26, 1) + 1e-3 * normal(seeded(seed + 1), 1, 130, 96, device=device)


def test_knn_density_counts_a_token_among_its_own_nearest(device: str) -> None:
    sizes = torch.logspace(-2, 3, 200, device=device)[:, None]
    for x in (alike_and_far(30, device), normal(seeded(32), 1, 200, 64, device=device) * sizes):
        assert ts.knn_density(x, 1)[0].eq(1).all()
        check(x, 2)


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_knn_density_far_from_the_mean_decides_by_differences(k: int, device: str) -> None:
    x = alike_and_far(33, device)
    density, _ = check(x, k)
    near = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(-1).values[..., :k]
    expected = near.square().mean(-1) / 96
    if k <= 26:  # its own group alone; a density near 1 has 6e-8 steps
        torch.testing.assert_close(1 - density.double(), expected, rtol=0, atol=6.1e-8)


def test_nearest_center_far_from_the_mean_decides_by_differences(device: str) -> None:
    x = alike_and_far(35, device)
    for K in (20, 100):
        centers = torch.randperm(130, generator=seeded(K))[None, :K].to(device)
        assert_equal(ts.nearest_center(x, centers).cpu(), reference.nearest_center(x, centers))


def test_knn_density_of_equal_tokens(device: str) -> None:
    points = normal(seeded(5), 2, 3, 40, device=device)
    x = points[:, torch.tensor([0, 1, 0, 2, 1, 0])]
    density, distance = check(x, 2)
    assert density[:, [0, 1, 2, 4, 5]].eq(1).all()  # an equal token at exactly 0
    assert distance[:, [2, 4, 5]].eq(0).all()  # the first of equals is denser
    loud = check(x, 2, torch.zeros(2, 6, device=device))[1]
    assert torch.equal(loud[:, [1, 2, 4, 5]], loud[:, :1].expand(2, 4))  # with noise equals are not: the largest distance
    assert ts.knn_density(points[:, :1].expand(2, 50, 40), 7)[0].eq(1).all()
    assert ts.knn_density(points[:, :1].expand(2, 50, 40), 7)[1].eq(0).all()


def test_knn_density_of_tokens_that_are_not_finite(device: str) -> None:
    x = normal(seeded(6), 1, 30, 8, device=device)
    clean, _ = check(x[:, 2:], 3)
    x[0, 0, 1], x[0, 1, 7] = math.nan, math.inf
    density, distance = check(x, 3)
    assert density[0, :2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(density[:, 2:], clean, rtol=1e-5, atol=0)
    assert distance.isfinite().all()
    assert ts.knn_density(x, 1)[0].eq(1).all()
    everything = ts.knn_density(torch.full((1, 20, 3), math.nan, device=device), 2)
    assert torch.cat(everything).eq(0).all()


def test_knn_density_padding_is_far_and_has_density_0(device: str) -> None:
    x = normal(seeded(7), 3, 40, 12, device=device)
    x[1] *= 5  # the largest distance of the batch is here
    mask = random_mask(8, 3, 40, 0.5).to(device)
    mask[2] = True
    mask[0, 3:] = False  # fewer tokens than k
    density, distance = check(x, 6, None, mask)
    assert density[~mask].eq(0).all()
    far = float(reference.largest_finite(reference.distances(x)).max()) + 1
    assert abs(float(distance[0].max()) - far) < 1e-4
    assert abs(float(distance[1].max()) - far) < 1e-4
    assert float(distance[2].max()) < far - 1
    nothing = ts.knn_density(x, 6, mask=torch.zeros_like(mask))
    assert nothing[0].eq(0).all()


def test_knn_density_more_images_than_fit_the_workspace() -> None:
    x = normal(seeded(9), 20, 2000, 4)  # 16 MB of distances an image: 16 at a time
    mask = torch.ones(20, 2000, dtype=torch.bool)
    mask[0, :3], x[-1] = False, x[-1] * 3  # what is far is known only after the last image
    density, distance = ts.knn_density(x, 5, mask=mask)
    alone = ts.knn_density(x[1:2], 5)
    assert_equal(density[1:2], alone[0])
    assert_equal(distance[1:2], alone[1])
    far = float(torch.cdist(x[-1].double(), x[-1].double()).max()) / 2 + 1
    assert abs(float(distance[0].max()) - far) < 1e-4


def test_knn_density_without_the_matrix_of_distances() -> None:
    x = normal(seeded(10), 1, 8200, 3)
    density, distance = ts.knn_density(x, 4)
    few = torch.randint(0, 8200, (40,), generator=seeded(11))
    d = torch.cdist(x[0, few].double(), x[0].double(), compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(3)
    expected = (-d.sort(-1).values[:, :4].square().mean(-1)).exp()
    torch.testing.assert_close(density[0, few].double(), expected, rtol=1e-5, atol=0)
    nearest = torch.where(density[0][None] > density[0, few][:, None], d, math.inf).amin(1)  # no two are equal here
    torch.testing.assert_close(distance[0, few].double(), nearest.clamp(max=float(distance.max())), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nearest_center_equals_float64(dtype: torch.dtype, device: str) -> None:
    for N, C, K in ((1, 3, 1), (17, 130, 5), (145, 20, 150), (300, 40, 20)):
        x = normal(seeded(N), 2, N, C, dtype=dtype, device=device)
        centers = torch.randint(-1, N, (2, K), generator=seeded(K)).to(device)
        assert_equal(ts.nearest_center(x, centers).cpu(), reference.nearest_center(x, centers), f"{(N, C, K)} {dtype}")


def test_nearest_center_ties_go_to_the_first_and_centres_have_their_own_label(device: str) -> None:
    x = normal(seeded(12), 1, 3, 20, device=device)[:, torch.tensor([0, 1, 0, 1, 2, 0])]
    labels = ts.nearest_center(x[:, :4], torch.tensor([[2, 0, 3]], device=device))
    assert labels.tolist() == [[1, 2, 0, 2]]  # token 0 is token 2's double
    assert ts.nearest_center(x, torch.tensor([[2, 1]], device=device))[0, [0, 2, 3, 5]].tolist() == [0, 0, 1, 0]
    assert ts.nearest_center(x, torch.tensor([[-1, 4, 4, -1]], device=device)).tolist() == [[1] * 6]
    assert ts.nearest_center(x, torch.tensor([[-1, -1]], device=device)).tolist() == [[-1] * 6]
    assert ts.nearest_center(x, torch.empty(1, 0, dtype=torch.int64, device=device)).tolist() == [[-1] * 6]


def test_cluster_tokens_finds_the_clusters_that_are_there(device: str) -> None:
    generator = seeded(13)
    places = torch.arange(300) % 6
    x = (10 * torch.eye(6, 32)[places] + 0.1 * torch.randn(2, 300, 32, generator=generator)).to(device)
    index, labels, *scores = ts.cluster_tokens(x, 6)
    for b in range(2):
        assert sorted(places[index[b].cpu()].tolist()) == list(range(6))
        assert_equal(places[index[b].cpu()][labels[b].cpu()], places)
    density, distance = ts.knn_density(x, 5)
    assert_equal(torch.stack(scores), torch.stack([density, distance]))
    assert_equal(index, ts.select_topk(density * distance, 6, order="score"))


@pytest.mark.parametrize(("B", "N", "C"), [(0, 5, 3), (0, 0, 3), (2, 0, 3), (2, 5, 0), (1, 1, 1)])
def test_density_empty(B: int, N: int, C: int, device: str) -> None:
    x = torch.zeros(B, N, C, device=device)
    density, distance = ts.knn_density(x, 1)
    assert density.shape == distance.shape == (B, N)
    assert density.eq(1).all()
    assert distance.eq(0).all()
    centers = torch.zeros(B, min(N, 1), dtype=torch.int64, device=device)
    assert_equal(ts.nearest_center(x, centers).cpu(), torch.zeros(B, N, dtype=torch.int64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_density_strided_and_unaligned_views(dtype: torch.dtype, device: str) -> None:
    wide = normal(seeded(14), 4, 90, 70, dtype=dtype, device=device)
    masks = random_mask(15, 4, 200, 0.8).to(device)
    for x in (wide[:, 3:40, 1:], wide[::2, ::3, 5:69], wide[1:2].expand(3, -1, -1), wide.transpose(0, 1)[:50, :, :33]):
        B, N = x.shape[:2]
        mask = masks[:1, 5 : 5 + N].expand(B, -1)
        got, plain = ts.knn_density(x, 3, mask=mask), ts.knn_density(x.contiguous(), 3, mask=mask.contiguous())
        assert_equal(got[0], plain[0])
        assert_equal(got[1], plain[1])
        centers = torch.tensor([[0, 2]], device=device).repeat(B, 1)
        assert_equal(ts.nearest_center(x, centers), ts.nearest_center(x.contiguous(), centers))


def test_density_is_deterministic_on_any_number_of_threads() -> None:
    x, mask = normal(seeded(16), 3, 500, 70), random_mask(17, 3, 500, 0.9)
    on_any_threads(lambda: (*ts.knn_density(x, 9, mask=mask), *ts.cluster_tokens(x, 50)))


def test_density_carries_no_gradient(device: str) -> None:
    x = normal(seeded(18), 1, 20, 4, device=device).requires_grad_()
    outputs = *ts.knn_density(x, 3), *ts.cluster_tokens(x, 4)
    assert not any(t.requires_grad for t in outputs)


BAD = [
    (lambda x: ts.knn_density(x[0], 2), ValueError, r"knn_density: x must be \(B, N, C\), got shape \(10, 6\)"),
    (lambda x: ts.knn_density(x.double(), 2), TypeError, r"knn_density: x must be float32 or float16 or bfloat16, got float64"),
    (lambda x: ts.knn_density(x.transpose(1, 2), 2), ValueError, r"knn_density: x must be contiguous in its last dimension"),
    (lambda x: ts.knn_density(x, 0), ValueError, r"knn_density: k must be in \[1, N=10\], got 0"),
    (lambda x: ts.knn_density(x, 11), ValueError, r"knn_density: k must be in \[1, N=10\], got 11"),
    (lambda x: ts.knn_density(x, 2.0), TypeError, r"knn_density: k must be an int, got float"),
    (lambda x: ts.knn_density(x, True), TypeError, r"knn_density: k must be an int, got bool"),
    (lambda x: ts.knn_density(x, 2, noise=x[..., 0]), ValueError, r"knn_density: noise must be contiguous"),
    (lambda x: ts.knn_density(x, 2, noise=torch.zeros(2, 9)), ValueError, r"knn_density: noise must be \(B, N\)"),
    (lambda x: ts.knn_density(x, 2, mask=torch.ones(2, 10)), TypeError, r"knn_density: mask must be bool, got float32"),
    (lambda x: ts.nearest_center(x, torch.tensor([[0], [10]])), ValueError, r"centers must be in \[-1, N=10\), got 10 at \(1, 0\)"),
    (lambda x: ts.nearest_center(x, torch.tensor([[0], [-2]])), ValueError, r"centers must be in \[-1, N=10\), got -2 at \(1, 0\)"),
    (lambda x: ts.nearest_center(x, torch.tensor([0, 1])), ValueError, r"nearest_center: centers must be \(B, K\)"),
    (lambda x: ts.nearest_center(x, torch.zeros(3, 1, dtype=torch.int64)), ValueError, r"nearest_center: centers must be \(B=2, K\)"),
    (lambda x: ts.nearest_center(x, torch.zeros(2, 1, dtype=torch.int32)), TypeError, r"nearest_center: centers must be int64, got int32"),
    (lambda x: ts.cluster_tokens(x, 0), ValueError, r"cluster_tokens: clusters must be in \[1, N=10\], got 0"),
    (lambda x: ts.cluster_tokens(x, 11), ValueError, r"cluster_tokens: clusters must be in \[1, N=10\], got 11"),
    (lambda x: ts.cluster_tokens(x, 2.5), TypeError, r"cluster_tokens: clusters must be an int, got float"),
    (lambda x: ts.cluster_tokens(x[..., ::2], 2), ValueError, r"cluster_tokens: x must be contiguous .* got stride 2"),
    (lambda x: ts.cluster_tokens(x, 2, k=11), ValueError, r"cluster_tokens: k must be in \[1, N=10\], got 11"),
    (lambda x: ts.nearest_center(x, torch.zeros(2, 4).long()[:, ::2]), ValueError, r"centers must be contiguous, got strides \(4, 2\)"),
    (lambda x: ts.cluster_tokens([1], 2), TypeError, r"cluster_tokens: x must be a torch.Tensor, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_density_bad_input(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.randn(2, 10, 6))
