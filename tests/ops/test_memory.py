"""Memory: no op builds the map, and offsets beyond 2^31 elements reach the right place."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import normal, seeded
from reference.ops import gather_tokens as gather_reference
from reference.ops import select_topk as select_reference
from torch import Tensor

# (H, L, N, D, largest growth in MB). The N x N map of the first is 2.1 GB, the L x N map of the second 268 MB; O(B H N) is 0.5 and 4 MB.
SHAPES = [(32, 1, 4096, 64, 24), (32, 64, 32768, 32, 96)]
SCRIPT = """
import resource, torch, tokensieve as ts
torch.set_num_threads(2)
H, L, N, D = {shape}
query, key = torch.randn(1, H, L, D).half(), torch.randn(1, H, N, D).half()
ts.attention_scores(query[..., :8], key[:, :, :64, :8])  # loads everything that is loaded once
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # peak = now
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
before = peak()
for options in ({{}}, {{"causal": True, "query_reduction": "max", "head_reduction": "max"}}):
    ts.attention_scores(query, key, **options)
ts.prune_tokens(query, key, [torch.zeros(1, N)], N // 2)
print(peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_scores_never_holds_the_map(shape: tuple[int, ...], run_python: Callable[..., Any]) -> None:
    done = run_python(SCRIPT.format(shape=shape[:4]))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= shape[4], f"peak grew by {int(done.stdout)} MB"


ALL_ROWS = """
import torch, tokensieve as ts
torch.set_num_threads(2)
H, N, D = {shape}
query, key = torch.randn(1, H, N, D).half(), torch.randn(1, H, N, D).half()
ts.attention_scores(query[:, :, :64, :8], key[:, :, :64, :8])
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
before = peak()
ts.attention_scores(query, key, causal=True)
ts.attention_pagerank(query, key, causal=True, iterations=2)
print(peak() - before)
"""


# One map of a head is 16 MB, all of them 128 and 512 MB. Packed keys are 2 and 8 MB, a strip 0.2 MB a thread.
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(("shape", "limit"), [((8, 2048, 32), 16), ((32, 2048, 128), 24)], ids=str)
def test_attention_scores_of_all_rows_never_holds_the_map(shape: tuple[int, ...], limit: int, run_python: Callable[..., Any]) -> None:
    done = run_python(ALL_ROWS.format(shape=shape))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= limit, f"peak grew by {int(done.stdout)} MB"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_scores_never_holds_the_map_on_a_gpu(shape: tuple[int, ...], cuda: str) -> None:
    H, L, N, D, limit = shape
    query, key = torch.randn(1, H, L, D, device=cuda).half(), torch.randn(1, H, N, D, device=cuda).half()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ts.attention_scores(query, key)
    assert torch.cuda.max_memory_allocated() - before <= limit << 20


FAR = (1 << 31) + 64  # elements


@pytest.fixture
def far_storage(device: str) -> Tensor:
    """4.3 GB of float16 that nobody touches but through two small views: on Linux only those pages take memory."""
    try:
        return torch.empty(FAR + 100_000, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no room for 4.3 GB of address space: {error}")


def far_view(storage: Tensor, size: tuple[int, ...], stride: tuple[int, ...], seed: int) -> Tensor:
    view = storage.as_strided(size, stride, 7)
    view.copy_(normal(seeded(seed), *size, dtype=torch.float16))
    return view


def test_large_offsets_attention_scores(far_storage: Tensor) -> None:
    device = far_storage.device.type
    query = normal(seeded(1), 2, 2, 2, 16, dtype=torch.float16, device=device)
    key = normal(seeded(2), 2, 2, 40, 16, dtype=torch.float16, device=device)
    strides = {"batch": ((2, 2, 40, 16), (FAR, 1000, 16, 1)), "head": ((2, 2, 40, 16), (1000, FAR, 16, 1))}
    strides["token"] = ((2, 2, 3, 16), (1000, 100, FAR // 2, 1))
    for name, (size, stride) in strides.items():
        far = far_view(far_storage, size, stride, 3)
        assert_close(ts.attention_scores(query, far), ts.attention_scores(query, far.contiguous()), name)
    far = far_view(far_storage, (2, 2, 2, 16), (FAR, 64, 16, 1), 4)
    assert_close(ts.attention_scores(far, key), ts.attention_scores(far.contiguous(), key), "query batch")
    bias = far_view(far_storage, (2, 1, 1, 40), (FAR, 40, 40, 1), 5)
    assert_close(ts.attention_scores(query, key, bias=bias), ts.attention_scores(query, key, bias=bias.contiguous()), "bias batch")


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8, msg=lambda m: f"{what} stride: {m}")


def test_large_offsets_select_and_gather(far_storage: Tensor) -> None:
    scores = far_view(far_storage, (2, 300), (FAR, 1), 8)
    assert_equal(ts.select_topk(scores, 100), select_reference(scores, 100))
    index = torch.tensor([[2, 0, -1], [1, 2, 0]], device=far_storage.device)
    for stride in ((FAR, 64, 1), (100, FAR // 2, 1)):
        x = far_view(far_storage, (2, 3, 33), stride, 9)
        assert_equal(ts.gather_tokens(x, index), gather_reference([x], index)[0], f"{stride}")
    heads = far_view(far_storage, (2, 3, 2, 5), (10, 100, FAR, 1), 10)
    assert_equal(ts.gather_tokens(heads, index), gather_reference([heads], index)[0], "segment stride")


@pytest.mark.slow
def test_large_outputs_gather(device: str) -> None:
    C = (1 << 30) + 17  # two rows are more than 2^31 bytes
    x = torch.zeros(1, 3, C, dtype=torch.uint8, device=device)
    x[0, 1, -5:], x[0, 2, :3] = 9, 8
    out = ts.gather_tokens(x, torch.tensor([[0, 2, 1]], device=device))
    assert int(out[0, 2, -5:].sum()) == 45
    assert int(out[0, 1, :3].sum()) == 24
    assert int(out.count_nonzero()) == 8
