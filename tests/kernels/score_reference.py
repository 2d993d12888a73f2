"""attention_scores in float64 numpy, and cases that run it beside the kernel. Numpy only: these tests also run under sanitizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

NONE, MEAN, SUM, MAX, VISIBLE = range(5)  # VISIBLE: mean over the rows that see the key
ROW, RANGE = range(2)
SOFTMAX, LOGIT, SIGMOID = range(3)


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values as storage of `dtype`; bfloat16 as uint16 bits, rounded to nearest even."""
    if dtype == "float32":
        return x.astype(np.float32)
    if dtype == "float16":
        return x.astype(np.float16)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """Storage of `dtype` as float64."""
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


@dataclass
class Case:
    """One call: sizes, options, and what the plan is forced to. `layout` "bnhd" stores tokens before heads (a transposed view)."""

    B: int = 1
    H: int = 2
    Hkv: int = 2
    L: int = 1
    N: int = 50
    D: int = 32
    dtype: str = "float32"
    seed: int = 0
    causal: bool = False
    bias: str | None = None  # "float" [B, H, L, N], "bool" [B, 1, 1, N], "float16" [1, H, 1, N]
    bias_values: np.ndarray | None = None  # replaces the random bias
    lse: bool = False
    row_weights: bool = False
    positions: list[list[int]] | None = None
    key_range: tuple[int, int] | None = None
    normalize: int = ROW
    query_reduction: int = MEAN
    head_reduction: int = MEAN
    activation: int = SOFTMAX
    head_weights: list[float] | None = None  # of every batch
    accumulate: bool = False
    layout: str = "bhnd"
    offset_bytes: int = 0
    scale: float | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    query: np.ndarray | None = None
    key: np.ndarray | None = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.query_bits = to_bits(self._values(rng, self.query, (self.B, self.H, self.L, self.D)), self.dtype)
        self.key_bits = to_bits(self._values(rng, self.key, (self.B, self.Hkv, self.N, self.D)), self.dtype)
        self.weights = rng.uniform(0.1, 2.0, (self.B, self.L)).astype(np.float32) if self.row_weights else None
        self.given_lse = rng.uniform(1.0, 3.0, (self.B, self.H, self.L)).astype(np.float32) if self.lse else None
        self.heads = None if self.head_weights is None else np.tile(np.float32(self.head_weights), (self.B, 1))
        self.bias_bits, self.bias_dtype = self._bias(rng)
        self.begin, self.end = self.key_range if self.key_range is not None else (0, self.N)
        self.scale = 1.0 / np.sqrt(max(1, self.D)) if self.scale is None else self.scale
        kept = (self.H if self.head_reduction == NONE else 1, self.L if self.query_reduction == NONE else 1, self.end - self.begin)
        self.base = rng.uniform(0.0, 1.0, (self.B, *kept)).astype(np.float32) if self.accumulate else None

    @staticmethod
    def _values(rng: np.random.Generator, given: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape) * 1.5 if given is None else np.broadcast_to(given, shape)

    def _bias(self, rng: np.random.Generator) -> tuple[np.ndarray | None, str]:
        full = (self.B, self.H, self.L, self.N)
        if self.bias_values is not None:
            return self.bias_values, "bool" if self.bias_values.dtype == np.bool_ else "float32"
        if self.bias == "float":
            return rng.standard_normal(full).astype(np.float32), "float32"
        if self.bias == "float16":
            return rng.standard_normal((1, self.H, 1, self.N)).astype(np.float16), "float16"
        if self.bias == "bool":
            return rng.random((self.B, 1, 1, self.N)) < 0.6, "bool"
        return None, "float32"

    def arguments(self) -> dict[str, Any]:
        """What the binding takes: storage and strides."""
        storage = {"query": self.query_bits, "key": self.key_bits}
        strides = {}
        for name, array in storage.items():
            if self.layout == "bnhd":
                storage[name] = np.ascontiguousarray(array.transpose(0, 2, 1, 3))
                array = storage[name].transpose(0, 2, 1, 3)
            strides[f"{name}_strides"] = [s // array.itemsize for s in array.strides[:3]]
        bias_strides = [0, 0, 0, 0]
        if self.bias_bits is not None:
            b = self.bias_bits
            bias_strides = [0 if size == 1 else s // b.itemsize for size, s in zip(b.shape, b.strides)]
        positions = None if self.positions is None else np.array(self.positions, dtype=np.int64).reshape(self.B, self.L)
        return {
            "sizes": [self.B, self.H, self.Hkv, self.L, self.N, self.D],
            **storage,
            **strides,
            "bias": self.bias_bits,
            "bias_strides": bias_strides,
            "bias_dtype": self.bias_dtype,
            "lse": self.given_lse,
            "row_weights": self.weights,
            "query_positions": positions,
            "range_begin": self.begin,
            "range_end": self.end,
            "scale": self.scale,
            "causal": self.causal,
            "normalize": self.normalize,
            "query_reduction": self.query_reduction,
            "head_reduction": self.head_reduction,
            "activation": self.activation,
            "head_weights": self.heads,
            "accumulate": self.base,
            "dtype": self.dtype,
            "offset_bytes": self.offset_bytes,
            **self.plan,
        }

    def logits(self) -> np.ndarray:
        """scale * q.k + bias of every row and key, -inf where not visible."""
        q, k = from_bits(self.query_bits, self.dtype), from_bits(self.key_bits, self.dtype)
        group = self.H // self.Hkv
        s = np.einsum("bhld,bhnd->bhln", q, np.repeat(k, group, axis=1)) * np.float32(self.scale).astype(np.float64)
        visible = np.ones(s.shape, dtype=bool)
        if self.bias_bits is not None and self.bias_dtype == "bool":
            visible &= np.broadcast_to(self.bias_bits, s.shape)
        elif self.bias_bits is not None:
            s = s + self.bias_bits.astype(np.float64)
        n = np.arange(self.N)
        if self.positions is not None:
            last = np.array(self.positions, dtype=np.int64).reshape(self.B, 1, self.L, 1)
            visible &= n <= last
        elif self.causal:
            visible &= n <= (self.N - self.L + np.arange(self.L))[:, None]
        return np.where(visible, s, -np.inf)

    def probabilities(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is reduced, of every row and key of the range, and lse."""
        seen = s[..., self.begin : self.end] if self.normalize == RANGE else s
        if self.given_lse is not None:
            lse = self.given_lse.astype(np.float64)
        else:
            with np.errstate(all="ignore"):
                m = np.max(seen, axis=-1, initial=-np.inf)
                total = np.exp(seen - m[..., None]).sum(axis=-1)
                lse = np.where(m == -np.inf, -np.inf, m + np.log(total))
        with np.errstate(all="ignore"):
            if self.activation == LOGIT:
                p = np.where(s == -np.inf, 0.0, s)
            elif self.activation == SIGMOID:
                p = 1.0 / (1.0 + np.exp(-s))
            else:
                p = np.where((lse == -np.inf)[..., None], 0.0, np.exp(s - lse[..., None]))
        return p[..., self.begin : self.end], lse

    def _reduce_rows(self, p: np.ndarray, visible: np.ndarray) -> np.ndarray:
        used = np.ones((self.B, self.L)) if self.positions is None else (np.array(self.positions).reshape(self.B, self.L) >= 0) * 1.0
        w = used if self.weights is None else self.weights.astype(np.float64)
        if self.query_reduction == NONE:
            return p
        if self.query_reduction == MAX:
            p = np.where(visible, p, -np.inf).max(axis=2, keepdims=True, initial=-np.inf)
            return np.where(p == -np.inf, 0.0, p)
        total = (p * w[:, None, :, None]).sum(axis=2, keepdims=True)
        if self.query_reduction == SUM:
            return total
        if self.query_reduction == VISIBLE:
            divisor = (visible * w[:, None, :, None]).sum(axis=2, keepdims=True)
        else:
            divisor = np.broadcast_to(w.sum(axis=1)[:, None, None, None], total.shape)
        return np.divide(total, divisor, out=np.zeros_like(total), where=divisor != 0)

    def _reduce_heads(self, p: np.ndarray) -> np.ndarray:
        if self.head_reduction == NONE:
            return p
        if self.head_reduction == MAX:
            return p.max(axis=1, keepdims=True)
        w = np.ones((self.B, self.H)) if self.heads is None else self.heads.astype(np.float64)
        p = np.where((w == 0)[:, :, None, None], 0.0, p * w[:, :, None, None]).sum(axis=1, keepdims=True)
        divisor = np.broadcast_to(w.sum(axis=1)[:, None, None, None] if self.head_reduction == MEAN else 1.0, p.shape)
        return np.divide(p, divisor, out=np.zeros_like(p), where=divisor != 0)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores [B, H or 1, L or 1, R] and lse."""
        s = self.logits()
        p, lse = self.probabilities(s)
        scores = self._reduce_heads(self._reduce_rows(p, s[..., self.begin : self.end] != -np.inf))
        return scores if self.base is None else self.base + scores, lse


def check(kernels: Any, case: Case) -> dict[str, Any]:
    """Runs the kernel; scores within 2e-5 relative of float64 (float32 dot products of up to 256 terms, expf of 2 ulp), lse within 1e-5.

    Low-precision inputs are exact in the reference, so the tolerance is the same for all dtypes.
    """
    result = kernels.score_cuda(case.arguments())
    scores, lse = case.expected()
    np.testing.assert_allclose(result["lse"], lse, rtol=1e-5, atol=1e-5, err_msg=f"lse of {case}")
    # Logits of either sign cancel: their error is relative to the largest.
    atol = 1e-9 if case.activation == SOFTMAX or scores.size == 0 else 1e-5 * np.abs(np.nan_to_num(scores, posinf=0, neginf=0)).max()
    np.testing.assert_allclose(result["scores"], scores, rtol=2e-5, atol=atol, err_msg=f"scores of {case}")
    assert not result["semaphores"].any(), "semaphores must be left at zero"
    return result
