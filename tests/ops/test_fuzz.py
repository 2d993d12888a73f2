"""Random shapes, options and layouts against the reference. A failure names its seed: TOKENSIEVE_FUZZ_SEED=<seed> repeats the run."""

from __future__ import annotations

import os
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference import density, inputs, pool, similarity
from reference.compare import assert_equal, assert_scores
from reference.inputs import FLOATS, integer, log_uniform, normal, seeded
from reference.ops import gather_tokens, prune_tokens, select_topk
from torch import Tensor

SEED = int(os.environ.get("TOKENSIEVE_FUZZ_SEED", "20240611"))
CASES = int(os.environ.get("TOKENSIEVE_FUZZ_CASES", "150"))
REDUCTIONS = ("mean", "sum", "max", None)
ROW_REDUCTIONS = ("mean", "sum", "max", "visible_mean", None)


def pick(generator: torch.Generator, options: Any) -> Any:
    return options[integer(generator, 0, len(options) - 1)]


def chance(generator: torch.Generator, probability: float) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def random_bias(generator: torch.Generator, full: tuple[int, ...], device: str) -> Tensor | None:
    kind = pick(generator, ("none", "bool", *FLOATS))
    shape = [1 if chance(generator, 0.5) else size for size in full[:3]] + [full[3]]
    if kind == "none":
        return None
    bias = normal(generator, *shape, device=device)
    return bias > -0.5 if kind == "bool" else bias.to(kind)


def random_scores_case(generator: torch.Generator, device: str, reduce: bool = False) -> tuple[Tensor, Tensor, dict[str, Any]]:
    Hkv, group = log_uniform(generator, 1, 4), log_uniform(generator, 1, 8)
    B, L, N = log_uniform(generator, 1, 4), log_uniform(generator, 1, 100), log_uniform(generator, 1, 800)
    D = pick(generator, (8, 16, 24, 40, 64, 80, 96, 128, log_uniform(generator, 1, 300)))
    dtype = pick(generator, FLOATS)
    query, key = inputs.queries_and_keys(generator, B, Hkv * group, Hkv, L, N, D, dtype, device, chance(generator, 0.5))
    ends = sorted((integer(generator, 0, N), integer(generator, 0, N)))
    choices = REDUCTIONS[:3] if reduce else REDUCTIONS
    options: dict[str, Any] = {
        "causal": chance(generator, 0.5),
        "scale": pick(generator, (None, 0.1, 1.0)),
        "bias": random_bias(generator, (B, Hkv * group, L, N), device),
        "key_range": None if chance(generator, 0.4) else (ends[0], ends[1]),
        "normalize": pick(generator, ("row", "range")),
        "query_reduction": pick(generator, ROW_REDUCTIONS[:4] if reduce else ROW_REDUCTIONS),
        "head_reduction": pick(generator, choices),
    }
    if chance(generator, 0.3):
        options["query_positions"] = torch.randint(-1, N, (B, L), generator=generator).to(device)
    if options["query_reduction"] in ("mean", "sum", "visible_mean") and chance(generator, 0.3):
        options["row_weights"] = torch.rand(B, L, generator=generator).to(device)
    if chance(generator, 0.2):
        options["lse"] = normal(generator, B, Hkv * group, L, device=device) + 5
    return query, key, options


def random_extras(generator: torch.Generator, query: Tensor, key: Tensor, options: dict[str, Any], device: str) -> dict[str, Any]:
    """The options that prune_tokens does not take."""
    extras: dict[str, Any] = {}
    if "lse" not in options:
        extras["activation"] = pick(generator, ("softmax", "softmax", "logit", "sigmoid"))
    if options["head_reduction"] in ("mean", "sum") and chance(generator, 0.3):
        extras["head_weights"] = torch.rand(query.shape[:2], generator=generator).to(device)
    if chance(generator, 0.2):
        start, end = options["key_range"] or (0, key.shape[2])
        heads = query.shape[1:2] if options["head_reduction"] is None else ()
        rows = query.shape[2:3] if options["query_reduction"] is None else ()
        extras["accumulate"] = torch.rand(query.shape[0], *heads, *rows, end - start, generator=generator).to(device)
    return extras


def describe(seed: int, *tensors: Tensor, **options: Any) -> str:
    shapes = [f"{tuple(t.shape)} strides {t.stride()} {t.dtype}" for t in tensors]
    return f"TOKENSIEVE_FUZZ_SEED={seed}: {shapes} { {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in options.items()} }"


def test_fuzz_attention_scores(device: str) -> None:
    for seed in range(SEED, SEED + CASES):
        generator = seeded(seed)
        query, key, options = random_scores_case(generator, device)
        options |= random_extras(generator, query, key, options, device)
        got, lse = ts.attention_scores(query, key, **options, return_lse=True)
        assert_scores(got, lse, query, key, describe(seed, query, key, **options), **options)


def test_fuzz_select_topk(device: str) -> None:
    for seed in range(SEED, SEED + CASES):
        generator = seeded(seed)
        B, N = log_uniform(generator, 1, 12), log_uniform(generator, 1, 4000)
        k, first = integer(generator, 0, N), integer(generator, 0, 3)
        x = inputs.scores(generator, pick(generator, inputs.SCORE_KINDS), B, N + first, pick(generator, FLOATS), device)[:, first:]
        options: dict[str, Any] = {"order": pick(generator, ("position", "score"))}
        for name in ("candidates", "always_keep"):
            if chance(generator, 0.3):
                options[name] = (torch.rand(B, N, generator=generator) < torch.rand((), generator=generator)).to(device)
        counts: int | Tensor = k
        if chance(generator, 0.3):
            counts = torch.randint(0, k + 1, (B,), generator=generator).to(device)
            options["max_k"] = k
        assert_equal(ts.select_topk(x, counts, **options), select_topk(x, counts, **options), describe(seed, x, k=counts, **options))


def random_tensor(generator: torch.Generator, B: int, N: int, device: str) -> Tensor:
    dtype = pick(generator, (*FLOATS, torch.int64, torch.bool, torch.uint8, torch.float64))
    H, C, skip = log_uniform(generator, 1, 8), log_uniform(generator, 1, 200), integer(generator, 0, 2)
    layout = pick(generator, ("ids", "rows", "view", "heads", "transposed"))
    shape = {"ids": (B, N), "rows": (B, N, C), "view": (B, N, C + skip), "heads": (B, N, H, C), "transposed": (B, H, N, C)}[layout]
    x = torch.randint(0, 100, shape, generator=generator).to(dtype).to(device)
    return x[..., skip:] if layout == "view" else x.transpose(1, 2) if layout == "transposed" else x


def test_fuzz_gather_tokens(device: str) -> None:
    for seed in range(SEED, SEED + CASES):
        generator = seeded(seed)
        B, N = log_uniform(generator, 1, 6), log_uniform(generator, 1, 300)
        tensors = [random_tensor(generator, B, N, device) for _ in range(log_uniform(generator, 1, 12))]
        index = torch.randint(-1, N, (B, integer(generator, 0, N)), generator=generator).to(device)
        what = describe(seed, *tensors, index)
        want = gather_tokens(tensors, index)
        out = [torch.full_like(w, 1) for w in want]
        ts.gather_tokens_out(tensors, index, out)
        for i, (g, w, o) in enumerate(zip(ts.gather_tokens(tensors, index), want, out, strict=True)):
            assert_equal(g, w, f"tensor {i} of {what}")
            assert_equal(o, w, f"out {i} of {what}")


def test_fuzz_prune_tokens(device: str) -> None:
    for seed in range(SEED, SEED + CASES // 2):
        generator = seeded(seed)
        query, key, options = random_scores_case(generator, device, reduce=True)
        B, N = key.shape[0], key.shape[2]
        tensors = [random_tensor(generator, B, N, device) for _ in range(log_uniform(generator, 1, 10))]
        start, end = options["key_range"] or (0, N)
        k, keep = integer(generator, 0, end - start), chance(generator, 0.5)
        got = ts.prune_tokens(query, key, tensors, k, keep_outside=keep, **options)
        what = describe(seed, query, key, k=k, keep_outside=keep, **options)
        assert_equal(got.scores, ts.attention_scores(query, key, **options), f"scores of {what}")
        want, index = prune_tokens(got.scores, tensors, k, N, options["key_range"], keep)
        assert_equal(got.index, index, f"index of {what}")
        for i, (g, w) in enumerate(zip(got.tensors, want, strict=True)):
            assert_equal(g, w, f"tensor {i} of {what}")


def random_rows(generator: torch.Generator, B: int, N: int, device: str) -> tuple[Tensor, str]:
    """(B, N, C) tokens, now and then a view with an odd first channel; signs need a C that is a power of 4."""
    kind, dtype, skip = pick(generator, similarity.KINDS[:4]), pick(generator, FLOATS), integer(generator, 0, 2)
    C = pick(generator, (1, 4, 16, 64, 256)) if kind == "signs" else log_uniform(generator, 1, 300)
    x = similarity.rows(generator, kind, B, N, C, dtype, device)
    return torch.nn.functional.pad(x, (skip, 1))[..., skip : skip + C], kind


def test_fuzz_cosine(device: str) -> None:
    for seed in range(SEED, SEED + CASES):
        generator = seeded(seed)
        B, M, N = integer(generator, 1, 3), log_uniform(generator, 1, 400), log_uniform(generator, 1, 800)
        b, kind = random_rows(generator, B, N, device)
        same = chance(generator, 0.3)
        a = b if same else similarity.rows(generator, kind, B, M, b.shape[2], b.dtype, device)
        options: dict[str, Any] = {"exclude_self": same}
        if chance(generator, 0.4):
            options["candidates"] = similarity.random_mask(seed, B, N, 0.7).to(device)
        what, floor = describe(seed, a, b, **options), similarity.floor_of(b.shape[2])
        k, largest = integer(generator, 1, 32), chance(generator, 0.5)
        value, index = ts.cosine_match(a, b, k=k, largest=largest, **options)
        if kind in ("signs", "one-hot"):
            assert_equal(index.cpu(), similarity.cosine_match(a, b, k=k, largest=largest, **options)[1], what)
        similarity.assert_match(value, index, a, b, floor, f"k={k} {what}", largest=largest, **options)
        for reduction in (None, "mean", "sum", "max"):
            got = ts.cosine_scores(a, b, reduction=reduction, **options).cpu().double()
            want = similarity.cosine_scores(a, b, reduction=reduction, **options)
            assert float((got - want).abs().max()) <= floor * (N if reduction == "sum" else 1), f"{reduction} {what}"


def test_fuzz_select_diverse(device: str) -> None:
    for seed in range(SEED, SEED + CASES):
        generator = seeded(seed)
        B, N = integer(generator, 1, 3), log_uniform(generator, 1, 300)
        x, kind = random_rows(generator, B, N, device)
        k, metric = integer(generator, 0, N), pick(generator, ("cosine", "euclidean"))
        options: dict[str, Any] = {"metric": metric}
        if chance(generator, 0.4):
            options["candidates"] = similarity.random_mask(seed, B, N, 0.7).to(device)
        what = describe(seed, x, k=k, **options)
        picks = ts.select_diverse(x, k, order="pick", **options)
        floor = 1e-6 if metric == "cosine" else 4e-7 * float(x.float().square().sum(-1).max()) * 8
        similarity.assert_diverse(picks, x, metric, floor, what, options.get("candidates"))
        if kind in ("signs", "one-hot"):
            assert_equal(picks, similarity.select_diverse(x, k, order="pick", **options), what)
            first = torch.randint(-1, N, (B,), generator=generator).to(device)
            got = ts.select_diverse(x, min(k, N // 19), first=first, **options)
            assert_equal(got, similarity.select_diverse(x, min(k, N // 19), first=first, **options), f"first {first.tolist()} {what}")


def test_fuzz_knn_density(device: str) -> None:
    for seed in range(SEED, SEED + CASES):
        generator = seeded(seed)
        B, N = integer(generator, 1, 3), log_uniform(generator, 1, 300)
        x, _ = random_rows(generator, B, N, device)
        k = integer(generator, 1, min(N, 9) if chance(generator, 0.7) else N)
        noise = torch.rand(B, N, generator=generator).to(device) if chance(generator, 0.5) else None
        mask = similarity.random_mask(seed, B, N, 0.7).to(device) if chance(generator, 0.4) else None
        what = describe(seed, x, k=k, noise=noise is not None, mask=mask is not None)
        got, distance = ts.knn_density(x, k, noise=noise, mask=mask)
        torch.testing.assert_close(
            got.cpu().double(), density.density(x, k, noise, mask), rtol=1e-4, atol=1e-6, msg=lambda m, what=what: f"{what}: {m}"
        )
        want = density.denser_distance(x, got, mask, noise is None)
        torch.testing.assert_close(distance.cpu().double(), want, rtol=1e-4, atol=1e-5, msg=lambda m, what=what: f"{what}: {m}")
        centers = torch.randint(-1, N, (B, integer(generator, 0, 20)), generator=generator).to(device)
        labels, d = ts.nearest_center(x, centers).cpu(), density.distances(x)
        best = density.nearest_center(x, centers)
        assert_equal(labels < 0, best < 0, what)
        if centers.shape[1]:
            at = centers.cpu().clamp(min=0)
            reached, least = (d.gather(2, at.gather(1, t.clamp(min=0))[..., None]) for t in (labels, best))
            assert bool((reached <= least * (1 + 1e-4) + 1e-3).all()), what


def test_fuzz_pooling(device: str) -> None:
    for seed in range(SEED, SEED + CASES // 3):
        generator = seeded(seed)
        grid = tuple(log_uniform(generator, 1, 12) for _ in range(integer(generator, 1, 3)))
        tokens = torch.Size(grid).numel()
        x, _ = random_rows(generator, integer(generator, 1, 3), tokens, device)
        size = tuple(log_uniform(generator, 1, 9) for _ in grid)
        window, stride = tuple(integer(generator, 1, n) for n in grid), tuple(integer(generator, 1, 4) for _ in grid)
        blocks = tuple(pick(generator, [b for b in range(1, n + 1) if n % b == 0]) for n in grid)
        scores, T = torch.rand(x.shape[:2], generator=generator).to(device), 10 ** integer(generator, -2, 1)
        what = describe(seed, x, grid=grid, size=size, window=window, stride=stride, temperature=T)
        pairs = [(ts.pool_grid(x, grid, size=size, kind=k), pool.pool_grid(x, grid, size, kind=k)) for k in ("mean", "max", "bilinear")]
        for kind in ("mean", "max"):
            windows = ts.pool_grid(x, grid, window=window, stride=stride, kind=kind)
            pairs.append((windows, pool.pool_grid(x, grid, None, window, stride, kind)))
        weighted = ts.pool_windows(x, scores, grid, window, stride=stride, temperature=T)
        pairs.append((weighted, pool.pool_windows(x, scores, grid, window, stride, T)))
        for got, want in pairs:
            pool.near(got, want, x.dtype, what, 2.0)
        assert_equal(ts.space_to_depth(x, grid, blocks), pool.space_to_depth(x, grid, blocks), f"blocks {blocks} {what}")
        length, steps = integer(generator, 1, tokens), integer(generator, 1, 9)
        starts = [[i * length for i in range(tokens // length)] for _ in range(x.shape[0])]
        runs = ts.pool_runs(x, torch.tensor(starts, device=device), length, steps)
        pool.near(runs, pool.pool_runs(x, starts, length, steps), x.dtype, what)
        video = x.unflatten(1, (grid[0], -1))
        for got, axis in zip(ts.row_column_means(video), (2, 1), strict=True):
            pool.near(got, video.double().mean(axis), x.dtype, what)


def test_hypothesis_select_topk_any_floats() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    rows = strategies.lists(strategies.floats(width=32), max_size=70)

    @hypothesis.given(rows, strategies.integers(0, 70), strategies.sampled_from(["position", "score"]))
    def run(values: list[float], k: int, order: str) -> None:
        x = torch.tensor([values], dtype=torch.float32)
        k = min(k, len(values))
        assert_equal(ts.select_topk(x, k, order=order), select_topk(x, k, order=order))

    run()
