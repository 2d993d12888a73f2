"""score_grad_cuda under the host SIMT runtime, and score_grad_cpu at every level, against float64 in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

NONE, MEAN, SUM, MAX, VISIBLE_MEAN = range(5)
SOFTMAX, LOGIT, SIGMOID = range(3)


def narrow(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(what travels to the kernel, its values as float64)."""
    if dtype == "float32":
        return x.astype(np.float32), x.astype(np.float32).astype(np.float64)
    if dtype == "float16":
        half = x.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float64)
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def widen(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return x.astype(np.float64)
    return (x.view(np.float16) if dtype == "float16" else (x.astype(np.uint32) << 16).view(np.float32)).astype(np.float64)


class Case:
    """Random inputs of a shape, and the gradients by the formulas of score_grad.h."""

    def __init__(self, seed: int = 0, B: int = 1, H: int = 2, Hkv: int = 2, L: int = 1, N: int = 70, D: int = 16, **options: Any) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.o = (B, H, Hkv, L, N, D), options
        self.dtype = options.get("dtype", "float32")
        self.query, self.q = narrow(rng.standard_normal((B, H, L, D)), self.dtype)
        self.key, self.k = narrow(rng.standard_normal((B, Hkv, N, D)), self.dtype)
        self.begin, self.end = options.get("range", (0, N))
        heads, rows = H if self.head_reduction == NONE else 1, L if self.query_reduction == NONE else 1
        self.grad = rng.standard_normal((B, heads, rows, self.end - self.begin)).astype(np.float32)
        self.grad_lse = rng.standard_normal((B, H, L)).astype(np.float32) if options.get("grad_lse") else None
        self.bias = None
        if "bias" in options:
            noise = rng.standard_normal((B, 1, L, N))
            self.bias = noise > -0.5 if options["bias"] == "bool" else noise.astype(np.float32)
        self.row_weights = rng.random((B, L)).astype(np.float32) if options.get("row_weights") else None
        self.head_weights = (rng.integers(0, 3, (B, H)) / 2).astype(np.float32) if options.get("head_weights") else None
        self.positions = rng.integers(-1, N, (B, L)) if options.get("positions") else None
        self.logits()

    query_reduction = property(lambda self: self.o.get("query_reduction", MEAN))
    head_reduction = property(lambda self: self.o.get("head_reduction", MEAN))
    activation = property(lambda self: self.o.get("activation", SOFTMAX))

    def logits(self) -> None:
        B, H, Hkv, L, N, _ = self.shape
        self.scale = 0.3
        s = np.einsum("bhld,bhnd->bhln", self.q, np.repeat(self.k, H // Hkv, 1)) * self.scale
        last = np.full((B, L), N - 1) if not self.o.get("causal") else np.broadcast_to(np.arange(N - L, N), (B, L))
        last = last if self.positions is None else self.positions
        visible = np.broadcast_to(np.arange(N) <= last[:, None, :, None], s.shape)
        if self.bias is not None:
            visible, s = (visible & self.bias, s) if self.bias.dtype == bool else (visible, s + self.bias)
        self.s, self.visible = s, visible
        counted = visible.copy()
        if self.o.get("normalize"):
            counted[..., : self.begin] = counted[..., self.end :] = False
        self.counted = counted
        with np.errstate(divide="ignore"):
            self.lse = np.log((np.exp(s) * counted).sum(-1)).astype(np.float32)

    def weights(self) -> np.ndarray:
        """g: the gradient by every row, head and key."""
        B, H, _, L, N, _ = self.shape
        w = np.ones((B, L)) if self.row_weights is None or self.query_reduction == NONE else self.row_weights.astype(np.float64)
        g = np.zeros((B, H, L, N))
        g[..., self.begin : self.end] = self.grad
        g = g * w[:, None, :, None]
        with np.errstate(all="ignore"):
            if self.query_reduction == MEAN:
                total = w.sum(1) if self.row_weights is not None or self.positions is None else (self.positions >= 0).sum(1)
                g = np.where(total[:, None, None, None] == 0, 0, g / total[:, None, None, None])
            if self.query_reduction == VISIBLE_MEAN:
                share = (self.visible * w[:, None, :, None]).sum(2, keepdims=True)
                g = np.where(share == 0, 0, g / share)
            if self.head_reduction != NONE:
                hw = np.ones((B, H)) if self.head_weights is None else self.head_weights.astype(np.float64)
                if self.head_reduction == MEAN:
                    hw = np.where(hw.sum(1, keepdims=True) == 0, 0, hw / hw.sum(1, keepdims=True))
                g = g * hw[:, :, None, None]
        return np.where(self.visible, g, 0)

    def want(self) -> tuple[np.ndarray, np.ndarray]:
        B, H, Hkv, L, N, D = self.shape
        g = self.weights()
        with np.errstate(all="ignore"):
            p = np.where(self.counted & np.isfinite(self.lse)[..., None], np.exp(self.s - self.lse[..., None]), 0)
        gl = np.zeros((B, H, L, 1)) if self.grad_lse is None else self.grad_lse[..., None].astype(np.float64)
        if self.activation == SOFTMAX:
            u = np.where(self.counted | bool(self.o.get("lse_given")), p * g, 0)
            ds = u if self.o.get("lse_given") else u - (u.sum(-1, keepdims=True) - gl) * p
        else:
            sigmoid = 1 / (1 + np.exp(-self.s))
            ds = (g if self.activation == LOGIT else sigmoid * (1 - sigmoid) * g) + gl * p
        dq = self.scale * np.einsum("bhln,bhnd->bhld", ds, np.repeat(self.k, H // Hkv, 1))
        dk = self.scale * np.einsum("bhln,bhld->bhnd", ds, self.q).reshape(B, Hkv, H // Hkv, N, D).sum(2)
        return dq, dk

    def check(self, kernels: Any, **run: int) -> None:
        L, N = self.shape[3:5]
        strides = [] if self.bias is None else [L * N, 0, N, 1]
        arguments = {
            "sizes": list(self.shape),
            "query": self.query,
            "key": self.key,
            "lse": self.lse,
            "grad": self.grad,
            "grad_lse": self.grad_lse,
            "bias": self.bias,
            "bias_strides": strides or None,
            "bias_dtype": "bool" if self.o.get("bias") == "bool" else "float32",
            "row_weights": self.row_weights,
            "head_weights": self.head_weights,
            "query_positions": self.positions,
            "range_begin": self.begin,
            "range_end": self.end,
            "scale": self.scale,
            "causal": bool(self.o.get("causal")) or self.positions is not None,
            "normalize": int(bool(self.o.get("normalize"))),
            "activation": self.activation,
            "query_reduction": self.query_reduction,
            "head_reduction": self.head_reduction,
            "dtype": self.dtype,
            "lse_given": bool(self.o.get("lse_given")),
        }
        got = kernels.score_grad(arguments | run)
        tolerance = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.5e-2}[self.dtype]
        for name, x, want in (("query", got[0], self.want()[0]), ("key", got[1], self.want()[1])):
            most = np.abs(want).max(initial=0.0)
            error = np.abs(widen(x, self.dtype) - want).max(initial=0.0)
            assert error <= tolerance * most + 1e-7, f"{name}: {error} of {most}, {self.shape} {self.o} {run}"  # NaN fails too


CASES = [
    Case(1, N=150, D=24),
    Case(2, B=2, H=4, Hkv=2, L=3, N=70, causal=True, bias="float", range=(5, 60), grad_lse=True),
    Case(3, H=3, Hkv=1, L=2, N=129, D=40, bias="bool", query_reduction=VISIBLE_MEAN, row_weights=True, activation=SIGMOID),
    Case(4, B=2, L=4, N=65, D=300, positions=True, normalize=True, range=(0, 50), head_reduction=NONE, dtype="float16"),
    Case(5, H=4, L=2, N=64, D=33, head_weights=True, row_weights=True, query_reduction=SUM, lse_given=True, range=(3, 64)),
    Case(6, L=3, N=20, causal=True, activation=LOGIT, query_reduction=NONE, head_reduction=SUM, grad_lse=True, dtype="bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_score_grad_every_schedule(scheduled: Any, case: Case) -> None:
    case.check(scheduled)


@pytest.mark.parametrize("activation", [SOFTMAX, LOGIT, SIGMOID])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_score_grad_shapes_on_both_back_ends(kernels: Any, dtype: str, activation: int) -> None:
    shapes = [
        (1, 1, 1, 1, 1, 1),
        (1, 2, 1, 5, 31, 7),
        (2, 2, 2, 1, 64, 64),
        (1, 4, 2, 3, 257, 20),
        (1, 1, 1, 70, 40, 8),
        (1, 2, 2, 2, 300, 65),
    ]
    for i, (B, H, Hkv, L, N, D) in enumerate(shapes):
        for rows, heads in ((MEAN, SUM), (NONE, NONE), (VISIBLE_MEAN, MEAN)):
            case = Case(i, B, H, Hkv, L, N, D, dtype=dtype, activation=activation, query_reduction=rows, head_reduction=heads, causal=L > 1)
            for run in [{}] + [{"level": level} for level in kernels.cpu_levels()]:
                case.check(kernels, **run)


def test_score_grad_options_on_the_cpu(kernels: Any) -> None:
    for level in kernels.cpu_levels():
        for case in CASES:
            case.check(kernels, level=level)


def test_score_grad_empty(kernels: Any) -> None:
    for run in [{}] + [{"level": level} for level in kernels.cpu_levels()]:
        for shape in ((0, 2, 2, 1, 5, 4), (1, 2, 2, 0, 5, 4), (1, 2, 2, 1, 0, 4), (1, 2, 2, 1, 5, 0), (1, 0, 2, 1, 5, 4)):
            case = Case(0, *shape, head_reduction=SUM, query_reduction=SUM)
            case.check(kernels, **run)
        Case(0, N=9, range=(4, 4)).check(kernels, **run)


def test_score_grad_refuses_max(kernels: Any) -> None:
    for name in ("query_reduction", "head_reduction"):
        for run in ({}, {"level": 0}):
            with pytest.raises(RuntimeError, match="'max' has no gradient"):
                Case(0, **{name: MAX}).check(kernels, **run)
