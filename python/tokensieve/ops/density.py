"""knn_density, nearest_center and cluster_tokens: clusters around density peaks (DPC-KNN)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import explain
from .select import select_topk

_density = torch.ops.tokensieve.knn_density.default
_nearest = torch.ops.tokensieve.nearest_center.default


class Clusters(NamedTuple):
    """index (B, K) int64, the clusters' centres, best first; labels (B, N) int64, rows of index; density, distance (B, N) float32."""

    index: Tensor  # type: ignore[assignment]
    labels: Tensor
    density: Tensor
    distance: Tensor


def knn_density(x: Tensor, k: int, *, noise: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How dense the neighbourhood of every token is, and how far the nearest denser token.

    Args:
        x: (B, N, C), float32, float16 or bfloat16; any strides with a contiguous last dimension.
        k: neighbours of the density, the token itself among them, 1 <= k <= N.
        noise: (B, N) float32 in [0, 1); 1e-6 of it is added to the density. The official code draws it, which breaks ties at random.
        mask: (B, N) bool, False = padding: density 0, and as a neighbour at the largest finite distance of the batch + 1.

    Returns:
        The pair (density, distance), both (B, N) float32: density[i] = exp(-mean of the k smallest d(i, j)^2) + 1e-6 noise[i] with d the
        Euclidean distance over sqrt(C), and distance[i] = min d(i, j) over the denser tokens j. A token without a denser one has the
        largest finite distance of its image (with padding in it: that of padding).

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, k, device or stride that breaks a rule above.

    Denser is a larger density; without noise also an equal one of a lower index, so that of two nearest neighbours the first leads. With
    noise equal densities do not see each other, as in the official code.

    Float32 products tell which tokens may be near, differences decide and are reported: tokens that are nearly alike keep their order,
    and tokens of the same values are at 0 from each other. Ties go to the lowest index. A token with NaN or infinity is at an infinite
    distance from all others. Sums in a fixed order: one device gives the same bits in every run. Memory on the CPU: the inputs in
    float32 and, up to 8192 tokens, the distances of one image at least. No gradient.

    Source: TCFormer (arXiv 2204.08680, section 3.2), Chat-UniVi (arXiv 2311.08046, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[0.0], [1.0], [1.5], [9.0]]])
        >>> density, distance = ts.knn_density(x, 2)
        >>> distance
        tensor([[1.0000, 9.0000, 0.5000, 7.5000]])
    """
    return _measure("knn_density", x, k, noise, mask)


def _measure(op: str, x: Tensor, k: int, noise: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    try:
        _checks.no_bools(k)
        density, distance = _density(x, k, noise, mask)
    except Exception as error:
        explain(error, check_density, op, x, k, noise, mask)
    return density, distance


def nearest_center(x: Tensor, centers: Tensor) -> Tensor:
    """The nearest of the given centres for every token: Euclidean, the first of equals, a centre its own.

    Args:
        x: (B, N, C), float32, float16 or bfloat16; any strides with a contiguous last dimension.
        centers: (B, K) int64, positions of the centres among the N tokens; -1 = no centre.

    Returns:
        (B, N) int64, places in centers; -1 in a row without any centre.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, position (on the CPU, or with debug checks), device or stride that breaks a rule above.

    Where float32 products cannot tell which centre is nearest, differences decide. A token that is listed twice has the first place. A
    token with NaN or infinity goes to the first centre. No gradient; memory is O(B (N + K) C).

    Source: DPC-KNN (arXiv 2204.08680, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[0.0], [1.0], [8.0], [9.0]]])
        >>> ts.nearest_center(x, torch.tensor([[3, 0]]))
        tensor([[1, 1, 0, 0]])
    """
    try:
        labels = _nearest(x, centers)
    except Exception as error:
        explain(error, _explain_centers, x, centers)
    if _debug.enabled and _debug.readable(centers):
        _debug.positions("nearest_center", centers, x.shape[1], "centers")
    return labels


def cluster_tokens(x: Tensor, clusters: int, *, k: int = 5, noise: Tensor | None = None, mask: Tensor | None = None) -> Clusters:
    """Clusters tokens by density peaks: centres are the tokens with the largest density x distance to the nearest denser token.

    Args:
        x: (B, N, C), float32, float16 or bfloat16; any strides with a contiguous last dimension.
        clusters: K, 1 <= K <= N; k, noise, mask: as in `knn_density`.

    Returns:
        `Clusters`: index (B, K) int64, centres by falling score; labels (B, N) int64, the nearest centre's row, for padding too;
        density and distance (B, N) float32 of `knn_density`.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a number of clusters or an argument of `knn_density` that breaks its rule.

    Ties of scores go to the lowest index, of centres to the first. Average the clusters with `merge_by_label(x, labels, K)`.

    Source: TCFormer (arXiv 2204.08680, section 3.2), Chat-UniVi (arXiv 2311.08046), SparseVLM (arXiv 2410.04417).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[0.0], [0.25], [5.0], [5.25], [6.0]]])
        >>> ts.cluster_tokens(x, 2, k=2, noise=torch.tensor([[0.0, 0.5, 0.0, 0.9, 0.0]])).labels
        tensor([[1, 1, 0, 0, 0]])
    """
    op = "cluster_tokens"
    _checks.tensor(op, "x", x, 3, "(B, N, C)", _checks.FLOATS)
    _checks.integer(op, "clusters", clusters)
    if not 1 <= clusters <= x.shape[1]:
        _checks.bad_value(op, f"clusters must be in [1, N={x.shape[1]}], got {clusters}")
    density, distance = _measure(op, x, k, noise, mask)
    index = select_topk(density * distance, clusters, order="score")
    return Clusters(index, nearest_center(x, index), density, distance)


def check_density(op: str, x: Any, k: Any, noise: Any, mask: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    _checks.tensor(op, "x", x, 3, "(B, N, C)", _checks.FLOATS)
    _checks.contiguous_last(op, "x", x)
    B, N, _ = x.shape
    _checks.integer(op, "k", k)
    if not 1 <= k <= max(N, 1):
        _checks.bad_value(op, f"k must be in [1, N={N}], got {k}")
    if noise is not None:
        _checks.tensor(op, "noise", noise, 2, "(B, N)", (torch.float32,))
        _checks.exact_shape(op, "noise", noise, (B, N), "(B, N)")
        _checks.same_device(op, "noise", noise, "x", x)
        if not noise.is_contiguous():
            _checks.bad_value(op, f"noise must be contiguous, got strides {noise.stride()}; call .contiguous()")
    if mask is not None:
        _checks.token_mask(op, "mask", mask, "x", x)


def check_centers(x: Any, centers: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "nearest_center"
    _checks.tensor(op, "x", x, 3, "(B, N, C)", _checks.FLOATS)
    _checks.contiguous_last(op, "x", x)
    _checks.tensor(op, "centers", centers, 2, "(B, K)", (torch.int64,))
    if centers.shape[0] != x.shape[0]:
        _checks.bad_value(op, f"centers must be (B={x.shape[0]}, K), got shape {_checks.shape(centers)}")
    _checks.same_device(op, "centers", centers, "x", x)
    if not centers.is_contiguous():
        _checks.bad_value(op, f"centers must be contiguous, got strides {centers.stride()}; call .contiguous()")


def _explain_centers(x: Any, centers: Any) -> None:
    check_centers(x, centers)
    if centers.device.type == "cpu":
        _debug.positions("nearest_center", centers, x.shape[1], "centers")


@torch.library.register_fake("tokensieve::knn_density")
def _fake_density(x: Tensor, k: int, noise: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    check_density("knn_density", x, k, noise, mask)
    density = x.new_empty(x.shape[:2], dtype=torch.float32)
    return density, torch.empty_like(density)


@torch.library.register_fake("tokensieve::nearest_center")
def _fake_nearest(x: Tensor, centers: Tensor) -> Tensor:
    check_centers(x, centers)
    return x.new_empty(x.shape[:2], dtype=torch.int64)


# Neither carries a gradient: without the fallthrough the values would require one, and a backward pass would warn and be wrong.
_library = torch.library.Library("tokensieve", "FRAGMENT")
_library.impl("knn_density", torch.library.fallthrough_kernel, "Autograd")
_library.impl("nearest_center", torch.library.fallthrough_kernel, "Autograd")
