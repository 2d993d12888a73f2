"""On a GPU: no op syncs the host, all are graph-capturable, and work goes to the current stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tokensieve as ts
import torch
from every_op import GROUPS, Given, given
from reference.compare import assert_equal
from reference.inputs import normal, seeded

pytestmark = pytest.mark.gpu


on_every_op = pytest.mark.parametrize("name", GROUPS)


@pytest.fixture
def syncs_are_errors(cuda: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


@on_every_op
def test_ops_never_sync_the_host(name: str, cuda: str, syncs_are_errors: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    x = given(1, cuda)
    hidden = x.hidden.clone().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    GROUPS[name](x)
    ts.prune_tokens(x.query, x.key, [hidden], 50).tensors[0].sum().backward()


@on_every_op
def test_cuda_graph_replays_with_changed_inputs(name: str, cuda: str) -> None:
    run, x = GROUPS[name], given(1, cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(x)  # first calls load kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    for seed in (2, 3, 4):
        for buffer, new in zip(x, given(seed, cuda), strict=True):
            buffer.copy_(new)
        graph.replay()
        graph.replay()  # semaphores are left as they were found
        for i, (g, want) in enumerate(zip(captured, run(x), strict=True)):
            assert_equal(g, want, f"output {i}, seed {seed}")


@on_every_op
def test_cuda_graphs_need_nothing_of_graphs_captured_before(name: str, cuda: str) -> None:
    """What a first capture on a stream set up was never run, and the graphs' memory is dirty."""
    run, x = GROUPS[name], given(1, cuda)
    run(x)
    pool, graphs = torch.cuda.graph_pool_handle(), [torch.cuda.CUDAGraph() for _ in range(3)]
    with torch.cuda.graph(graphs[0], pool=pool):
        torch.full((1 << 20,), -1, dtype=torch.int32, device=cuda)
        torch.full((4096,), -1, dtype=torch.int32, device=cuda)
    graphs[0].replay()
    with torch.cuda.graph(graphs[1], pool=pool):
        run(x)
    with torch.cuda.graph(graphs[2], pool=pool):
        captured = run(x)
    graphs[2].replay()
    for i, (g, want) in enumerate(zip(captured, run(x), strict=True)):
        assert_equal(g, want, f"output {i}")


@on_every_op
def test_ops_run_on_the_current_stream(name: str, cuda: str) -> None:
    run, x = GROUPS[name], given(5, cuda)
    want = run(x)
    side = torch.cuda.Stream()
    late = Given(*(torch.zeros_like(t) for t in x))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms: work on another stream would read the zeros
        for buffer, new in zip(late, x, strict=True):
            buffer.copy_(new)
        got = run(late)
    side.synchronize()
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_equal(g, w, f"output {i}")


def test_cuda_selection_equals_cpu_selection(cuda: str) -> None:
    for seed in range(5):
        scores = normal(seeded(seed), 7, 2880, device=cuda).mul(4).round()
        assert_equal(ts.select_topk(scores, 640).cpu(), ts.select_topk(scores.cpu(), 640))
        assert_equal(ts.select_topk(scores, 640, order="score").cpu(), ts.select_topk(scores.cpu(), 640, order="score"))


@on_every_op
def test_cuda_determinism_over_a_hundred_runs(name: str, cuda: str) -> None:
    run, x = GROUPS[name], given(6, cuda)
    want = run(x)
    for _ in range(100):
        torch.full((300_000,), torch.nan, device=cuda)  # dirty workspace
        for i, (g, w) in enumerate(zip(run(x), want, strict=True)):
            assert_equal(g, w, f"output {i}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@on_every_op
def test_ops_on_a_device_that_is_not_current(name: str, cuda: str) -> None:
    run, x = GROUPS[name], given(7, cuda)
    for g, w in zip(run(Given(*(t.to("cuda:1") for t in x))), run(x), strict=True):
        assert_equal(g.to("cuda:0"), w)
