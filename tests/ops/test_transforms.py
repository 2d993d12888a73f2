"""Ops inside what else a program does: functorch, fake tensors, subclasses, autocast, inference mode, threads, DataLoader workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tokensieve as ts
import torch
from every_op import GROUPS, Given, given
from reference.compare import assert_equal
from reference.inputs import normal, seeded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

X, I = normal(seeded(1), 2, 10, 6), torch.tensor([[0, 1, 2], [3, 4, 5]])  # noqa: E741
Q, K = normal(seeded(2), 2, 4, 3, 8), normal(seeded(3), 2, 2, 10, 8)
S = torch.rand(2, 10, generator=seeded(4))
PLAN = ts.bipartite_match(X, 2)

# differentiable op: the call
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention_scores": lambda x: ts.attention_scores(Q * x[0, 0, 0], K),
    "fuse_dropped": lambda x: ts.fuse_dropped(x, S, I),
    "gather_tokens": lambda x: ts.gather_tokens(x, I),
    "merge_by_label": lambda x: ts.merge_by_label(x, I[:, [0] * 10], 6)[0],
    "merge_tokens": lambda x: ts.merge_tokens(x, PLAN).tensors,
    "pool_grid": lambda x: ts.pool_grid(x, (2, 5), window=2),
    "pool_runs": lambda x: ts.pool_runs(x, I[:, :1], 3, 2),
    "prune_tokens": lambda x: ts.prune_tokens(Q, K, [x], 2).tensors[0],
    "row_column_means": lambda x: ts.row_column_means(x[:, :, None])[0],
    "scatter_tokens": lambda x: ts.scatter_tokens(x, I, X[:, :3]),
    "unmerge_tokens": lambda x: ts.unmerge_tokens(x[:, :8], PLAN),
}
LISTS = ["gather_tokens", "merge_tokens", "prune_tokens", "scatter_tokens", "unmerge_tokens"]


@pytest.mark.parametrize("op", GRADIENTS)
def test_func_grad_is_refused_with_a_way_out(op: str) -> None:
    rule = rf"^tokensieve\.{op}: tensors must not be those of torch\.func\.grad.*got one; use Tensor\.backward"
    with pytest.raises(ValueError, match=rule):
        torch.func.grad(lambda x: GRADIENTS[op](x).sum())(X)


@pytest.mark.parametrize("op", GRADIENTS)
def test_vmap_runs_sample_by_sample_or_is_refused(op: str) -> None:
    """torch's fallback is a loop; it has none for ops that take a list of tensors."""
    samples = torch.stack([X, X.flip(1), X * 2])
    if op in LISTS:
        with pytest.raises(ValueError, match=rf"^tokensieve\.{op}: tensors must not be those of torch\.func\.vmap, got a batched one"):
            torch.func.vmap(GRADIENTS[op])(samples)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the fallback is slow
        got = torch.func.vmap(GRADIENTS[op])(samples)
    assert_equal(got, torch.stack([GRADIENTS[op](x) for x in samples]))


@pytest.fixture(scope="module")
def case() -> tuple[Given, dict[str, tuple[Tensor, ...]]]:
    x = given(1, "cpu", torch.float32)
    return x, {name: group(x) for name, group in GROUPS.items()}


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True, msg=lambda text, i=i: f"output {i}: {text}")  # type: ignore[misc]


@pytest.mark.parametrize("name", GROUPS)
def test_autocast_inference_mode_and_parameters_change_nothing(name: str, case: Any) -> None:
    x, want = case
    with torch.autocast("cpu", torch.bfloat16):
        equal(GROUPS[name](x), want[name])
    with torch.inference_mode():
        made_here = Given(*(t.clone() for t in x))
        equal(GROUPS[name](made_here), want[name])
    equal(GROUPS[name](made_here), want[name])  # inference tensors, outside
    with torch.no_grad():
        equal(GROUPS[name](Given(*(torch.nn.Parameter(t) if t.is_floating_point() else t for t in x))), want[name])


@pytest.mark.parametrize("name", GROUPS)
def test_fake_tensors_have_the_layout_of_real_ones(name: str, case: Any) -> None:
    x, want = case
    with FakeTensorMode() as mode:
        got = GROUPS[name](Given(*(mode.from_tensor(t) for t in x)))
    for i, (g, w) in enumerate(zip(got, want[name], strict=True)):
        assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride()), f"output {i}"


class Wrapped(Tensor):
    """A tensor subclass that stands in front of another, as DTensor and quantised tensors do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        t: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        t.inner = inner
        return t

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = torch.utils._pytree.tree_map(lambda v: v.inner if isinstance(v, Wrapped) else v, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", GROUPS)
def test_tensor_subclasses_are_asked_first(name: str, case: Any) -> None:
    x, want = case
    equal(GROUPS[name](Given(*(Wrapped(t) for t in x))), want[name])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_the_caller_do_not_disturb_each_other(threads: int, case: Any) -> None:
    x, want = case
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(4) as pool:
            jobs = [(name, pool.submit(group, x)) for _ in range(3) for name, group in GROUPS.items()]
            for name, job in jobs:
                equal(job.result(), want[name])
    finally:
        torch.set_num_threads(before)


class Rows(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        x = normal(seeded(i), 8, 4000, 8)
        return ts.gather_tokens(x, ts.select_topk(x[..., 0].contiguous(), 500))


def test_dataloader_workers_run_the_ops() -> None:
    """Forked after this process has used its threads."""
    want = [Rows()[i][None] for i in range(4)]
    for got, w in zip(torch.utils.data.DataLoader(Rows(), num_workers=2, timeout=60), want, strict=True):
        assert_equal(got, w)


def test_export_keeps_the_ops() -> None:
    class Prune(torch.nn.Module):
        def forward(self, scores: Tensor, x: Tensor) -> Tensor:
            return ts.gather_tokens(x * 2, ts.select_topk(scores, 3))

    program = torch.export.export(Prune(), (S, X), dynamic_shapes=({1: (n := torch.export.Dim("n", min=4)), 0: None}, {1: n, 0: None}))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"tokensieve.select_topk.default", "tokensieve.gather_tokens.default"} <= called
    scores, x = torch.rand(2, 33, generator=seeded(5)), normal(seeded(6), 2, 33, 6)
    assert_equal(program.module()(scores, x), Prune()(scores, x))
