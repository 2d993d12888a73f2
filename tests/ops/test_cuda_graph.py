"""On a GPU: no op syncs the host, all are graph-capturable, and work goes to the current stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import normal, queries_and_keys, seeded
from torch import Tensor

pytestmark = pytest.mark.gpu


def every_op(query: Tensor, key: Tensor, hidden: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    scores, lse = ts.attention_scores(query, key, causal=True, key_range=(5, key.shape[2]), return_lse=True)
    index = ts.select_topk(scores, counts, max_k=64)
    kept, kept_ids = ts.gather_tokens((hidden, ids), index)
    pruned = ts.prune_tokens(query, key, (hidden, ids), 100, key_range=(5, 500))
    return scores, lse, index, kept, kept_ids, *pruned.tensors, pruned.index, pruned.scores


def arguments(seed: int) -> tuple[Tensor, ...]:
    query, key = queries_and_keys(seeded(seed), 2, 16, 4, 3, 577, 64, torch.bfloat16, "cuda")
    hidden = normal(seeded(seed + 1), 2, 577, 256, dtype=torch.bfloat16, device="cuda")
    ids = torch.randperm(577, generator=seeded(seed)).repeat(2, 1).cuda()
    return query, key, hidden, ids, torch.randint(0, 65, (2,), generator=seeded(seed)).cuda()


@pytest.fixture
def syncs_are_errors(cuda: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


def test_ops_never_sync_the_host(cuda: str, syncs_are_errors: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    given = arguments(1)
    hidden = given[2].clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    every_op(*given)
    ts.prune_tokens(given[0], given[1], [hidden], 50).tensors[0].sum().backward()


def test_cuda_graph_replays_with_changed_inputs(cuda: str) -> None:
    given = arguments(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        every_op(*given)  # first calls set kernel attributes
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_op(*given)
    for seed in (2, 3, 4):
        for buffer, new in zip(given, arguments(seed), strict=True):
            buffer.copy_(new)
        graph.replay()
        graph.replay()  # semaphores are left as they were found
        for i, (g, want) in enumerate(zip(captured, every_op(*given), strict=True)):
            assert_equal(g, want, f"output {i}, seed {seed}")


def test_ops_run_on_the_current_stream(cuda: str) -> None:
    given = arguments(5)
    want = every_op(*given)
    side = torch.cuda.Stream()
    late = [torch.zeros_like(t) for t in given]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms: work on another stream would read the zeros
        for buffer, new in zip(late, given, strict=True):
            buffer.copy_(new)
        got = every_op(*late)
    side.synchronize()
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_equal(g, w, f"output {i}")


def test_cuda_selection_equals_cpu_selection(cuda: str) -> None:
    for seed in range(5):
        scores = normal(seeded(seed), 7, 2880, device=cuda).mul(4).round()
        assert_equal(ts.select_topk(scores, 640).cpu(), ts.select_topk(scores.cpu(), 640))
        assert_equal(ts.select_topk(scores, 640, order="score").cpu(), ts.select_topk(scores.cpu(), 640, order="score"))


def test_cuda_determinism_over_a_hundred_runs(cuda: str) -> None:
    given = arguments(6)
    want = every_op(*given)
    for _ in range(100):
        torch.full((300_000,), torch.nan, device=cuda)  # dirty workspace
        for i, (g, w) in enumerate(zip(every_op(*given), want, strict=True)):
            assert_equal(g, w, f"output {i}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_ops_on_a_device_that_is_not_current(cuda: str) -> None:
    given = arguments(7)
    want = every_op(*given)
    for g, w in zip(every_op(*(t.to("cuda:1") for t in given)), want, strict=True):
        assert_equal(g.to("cuda:0"), w)
