"""The methods' own functions against slow references, their fields, and the registry."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from tokensieve import methods
from tokensieve.info import HOOKS
from tokensieve.methods import METHODS, BlockMethod, DecoderMethod, EncoderMethod, FasterVLM, FastV, PyramidDrop, TensorMethod, get_method
from tokensieve.methods.fastervlm import cls_scores, crop_grid, keep_patches, mosaic_order
from tokensieve.methods.fastv import rank_and_drop as fastv_step
from tokensieve.methods.pyramiddrop import rank_and_drop as pyramid_step
from tokensieve.methods.step import answer_rows, prune_ragged, prune_span, select_sequence


def reference_scores(query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """(H, L, D), (Hkv, N, D), (L, N) -> (N,): softmax over the visible keys in float64, heads first, then rows."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0).double()
    logits = (query.double() @ key.transpose(1, 2)) * query.shape[-1] ** -0.5
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).mean(0).mean(0)


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_a_frozen_documented_dataclass_with_defaults(name: str) -> None:
    method = METHODS[name]()
    assert isinstance(method, (BlockMethod, DecoderMethod, EncoderMethod, TensorMethod))
    assert method.hook in HOOKS
    assert method.paper in (type(method).__doc__ or "")
    doc = type(method).__doc__ or ""
    assert "Differs from the official code" in doc or "The authors published no code" in doc
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, dataclasses.fields(method)[0].name, None)  # type: ignore[arg-type]
    assert get_method(name.upper()) is METHODS[name]
    assert hash(method) == hash(METHODS[name]())


def test_defaults_are_the_official_configuration() -> None:
    assert (PyramidDrop().layers, PyramidDrop().keep) == ((8, 16, 24), (0.5, 0.25, 0.125))
    assert (FastV().layer, FastV().ratio, FastV().variant) == (2, 0.5, "compact")
    assert FasterVLM().tokens == 144
    assert methods.available() == tuple(METHODS)


@pytest.mark.parametrize(("typed", "near"), [("FastVV", "FastV"), ("Pyramid", "PyramidDrop"), ("FasterVL", "FasterVLM")])
def test_unknown_method_names_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown method '{typed}'; did you mean '{near}'") as error:
        get_method(typed)
    assert "There are: PyramidDrop, FastV, FasterVLM" in str(error.value)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: PyramidDrop(layers=(0, 2), keep=(0.5, 0.2)), "layers must be 1 or more"),
        (lambda: PyramidDrop(layers=(4, 2), keep=(0.5, 0.2)), "layers must increase"),
        (lambda: PyramidDrop(layers=(2,), keep=(0.5, 0.2)), "one share for each of 1 layers"),
        (lambda: PyramidDrop(layers=(2,), keep=(1.5,)), r"shares in \[0, 1\]"),
        (lambda: PyramidDrop(layers=(2, 3), keep=(0.2, 0.5)), "must not increase"),
        (lambda: PyramidDrop(normalize="rows"), "normalize must be 'row' or 'range', got 'rows'"),
        (lambda: PyramidDrop(max_length=0), "max_length must be positive"),
        (lambda: FastV(layer=0), "layer must be 1 or more"),
        (lambda: FastV(ratio=1.5), r"FastV: ratio must be in \[0, 1\], got 1.5"),
        (lambda: FastV(budget="ceil"), "budget must be 'round' or 'floor'"),
        (lambda: FastV(count=-1), "count must be 0 or more"),
        (lambda: FastV(variant="drop"), "variant must be 'compact' or 'mask'"),
        (lambda: FastV(rerank=True), "rerank needs variant='mask'"),
        (lambda: FastV(renumber=True, variant="mask"), "renumber needs variant='compact'"),
        (lambda: FasterVLM(tokens=-1), "tokens must be 0 or more"),
    ],
)
def test_bad_fields_are_errors(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


def test_fastv_budgets() -> None:
    assert [FastV(ratio=0.75).keep_count(0, n) for n in (334, 330)] == [84, 82]  # 83.5 and 82.5: half to even
    assert [FastV(ratio=0.75, budget="floor").keep_count(0, n) for n in (334, 330)] == [83, 82]
    assert FastV(count=72).keep_count(0, 576) == 72
    assert FastV(count=72).keep_count(0, 0) == 0  # text only
    with pytest.raises(ValueError, match="count must be at most the prompt's 50"):
        FastV(count=72).keep_count(0, 50)
    assert [PyramidDrop().keep_count(s, 231) for s in range(3)] == [115, 57, 28]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("normalize", ["row", "range"])
def test_fused_and_ragged_steps_agree_with_the_reference(device: str, kv_heads: int, normalize: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 1, 16, device=device), torch.randn(3, kv_heads, 50, 16, device=device)
    hidden, span, k = torch.randn(3, 50, 8, device=device), (7, 41), 9
    fused = prune_span(query, key, [hidden], k, span, normalize=normalize)
    image = torch.zeros(3, 50, dtype=torch.bool, device=device)
    image[:, 7:41] = True
    ragged = prune_ragged(query, key, [hidden], [50 - 34 + k] * 3, image_mask=image, normalize=normalize)
    assert torch.equal(fused.index, ragged.index)
    assert torch.equal(fused.tensors[0], ragged.tensors[0])
    visible = torch.ones(1, 50, dtype=torch.bool) if normalize == "row" else image[:1].cpu()
    for b in range(3):
        want = reference_scores(query[b].cpu(), key[b].cpu(), visible)[7:41]
        torch.testing.assert_close(fused.scores[b].cpu().double(), want, rtol=1e-5, atol=1e-7)
        kept = sorted((want.topk(k)[1] + 7).tolist())
        assert fused.index[b].tolist() == [*range(7), *kept, *range(41, 50)]


def test_fastv_step_keeps_text_and_positions(device: str) -> None:
    torch.manual_seed(1)
    query, key = torch.randn(2, 4, 1, 8, device=device), torch.randn(2, 2, 30, 8, device=device)
    positions = torch.arange(30, device=device).expand(2, 30)
    out = fastv_step(query, key, [torch.randn(2, 30, 4, device=device), positions], 5, (4, 24))
    assert torch.equal(out.tensors[1], out.index)
    assert out.index.shape == (2, 15)
    assert out.scores.shape == (2, 20)


def test_ragged_step_with_padding_cached_keys_and_left_pads(device: str) -> None:
    """Keys 0..4 are cached; sample 1 starts with 3 pads and its row sees nothing of them."""
    torch.manual_seed(2)
    query, key = torch.randn(2, 2, 1, 8, device=device), torch.randn(2, 2, 25, 8, device=device)
    image = torch.zeros(2, 20, dtype=torch.bool, device=device)
    image[0, 2:12] = image[1, 5:11] = image[1, 13:17] = True  # sample 1 has two images
    valid = torch.ones(2, 25, dtype=torch.bool, device=device)
    valid[1, 5:8] = False
    columns = torch.arange(20, device=device).expand(2, 20)
    options: Any = {"image_mask": image, "valid_mask": valid, "query_positions": torch.full((2, 1), 24, device=device)}
    right = prune_ragged(query, key, [columns], [14, 9], **options)
    left = prune_ragged(query, key, [columns], [14, 9], pad_side="left", **options)
    for b, total in enumerate((14, 9)):
        want = reference_scores(query[b].cpu(), key[b].cpu(), valid[b : b + 1].cpu())[5:]
        torch.testing.assert_close(right.scores[b].cpu().double(), want, rtol=1e-5, atol=1e-7)
        spots = image[b].cpu().nonzero()[:, 0]
        text = (valid[b, 5:] & ~image[b]).cpu().nonzero()[:, 0].tolist()
        best = spots[want[spots].topk(total - len(text))[1]].tolist()
        wanted = sorted(text + best)
        assert right.index[b].tolist() == wanted + [-1] * (14 - total)
        assert left.index[b].tolist() == [-1] * (14 - total) + wanted
    assert left.tensors[0][1, :5].tolist() == [0] * 5


def test_pyramiddrop_step_labels_text_only_and_max_length(device: str) -> None:
    torch.manual_seed(3)
    B, N = 3, 24
    query, key = torch.randn(B, 4, 2, 8, device=device), torch.randn(B, 2, N, 8, device=device)
    features, labels = torch.randn(B, N, 6, device=device), torch.arange(N, device=device).expand(B, N).clone()
    lengths, start, count, keep = [24, 15, 20], [3, -1, 5], [12, 0, 10], [6, 0, 4]
    rows = torch.tensor([[16, 20], [10, -1], [-1, 18]], device=device)
    out = pyramid_step(
        query, key, features, image_start=start, image_count=count, keep=keep, lengths=lengths, query_positions=rows, labels=labels
    )
    assert out.lengths == [18, 15, 14]
    for b in range(B):
        used = [t for t in range(2) if rows[b, t] >= 0]
        seen = torch.arange(N) <= rows[b].cpu()[used][:, None]
        want = reference_scores(query[b].cpu()[:, used], key[b].cpu(), seen & (torch.arange(N) < lengths[b]))
        kept = sorted((want[start[b] : start[b] + count[b]].topk(keep[b])[1] + start[b]).tolist()) if count[b] else []
        text = [t for t in range(lengths[b]) if not (count[b] and start[b] <= t < start[b] + count[b])]
        wanted = sorted(text + kept)
        assert out.index[b].tolist() == wanted + [-1] * (18 - len(wanted))
        n = out.lengths[b]
        assert torch.equal(out.features[b, :n], features[b, wanted])
        assert out.features[b, n:].abs().sum() == 0
        assert out.labels is not None
        assert out.labels[b].tolist() == wanted + [-100] * (18 - n)
        assert out.position_ids[b].tolist() == [*range(n), *[0] * (18 - n)]
        torch.testing.assert_close(
            out.scores[b, : count[b]].cpu().double(), want[start[b] : start[b] + count[b]] if count[b] else want[:0], rtol=1e-5, atol=1e-7
        )
    short = pyramid_step(
        query, key, features, image_start=start, image_count=count, keep=keep, lengths=lengths, query_positions=rows, max_length=16
    )
    assert torch.equal(short.index, out.index[:, :16])
    assert short.lengths == [16, 15, 14]


def test_pyramiddrop_uniform_batch_takes_the_fused_path_with_the_same_answer(device: str) -> None:
    torch.manual_seed(4)
    query, key, features = (
        torch.randn(2, 4, 1, 8, device=device),
        torch.randn(2, 4, 30, 8, device=device),
        torch.randn(2, 30, 6, device=device),
    )
    same: Any = {"image_start": [4, 4], "image_count": [20, 20], "keep": [7, 7]}
    fused = pyramid_step(query, key, features, lengths=[30, 30], **same)
    padded = torch.nn.functional.pad
    ragged = pyramid_step(query, padded(key, (0, 0, 0, 3)), padded(features, (0, 0, 0, 3)), lengths=[30, 30], **same)
    assert torch.equal(fused.index, ragged.index)
    torch.testing.assert_close(fused.scores, ragged.scores, rtol=1e-5, atol=1e-8)


def test_gradients_flow_to_features_and_not_to_scores() -> None:
    torch.manual_seed(5)
    query, key = torch.randn(2, 2, 1, 8, requires_grad=True), torch.randn(2, 2, 20, 8, requires_grad=True)
    features = torch.randn(2, 20, 4, requires_grad=True)
    for counts in ([10, 10], [10, 6]):
        out = pyramid_step(query, key, features, image_start=[3, 3], image_count=counts, keep=[4, 4], lengths=[20, 20])
        (grad,) = torch.autograd.grad(out.features.sum(), features)
        for b in range(2):
            row = out.index[b][out.index[b] >= 0]
            assert grad[b].sum() == 4 * len(row)
            assert bool((grad[b, row] == 1).all())
        assert not out.scores.requires_grad


def test_answer_rows_pads_and_respects_the_mask() -> None:
    labels = torch.tensor([[-100, -100, 4, 5, -100, 6], [-100, 7, -100, -100, -100, -100], [-100] * 6])
    assert answer_rows(labels, 2).tolist() == [[1, 4], [0, -1], [-1, -1]]
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[1, 0] = False  # a pad does not rank
    assert answer_rows(labels, 2, valid).tolist() == [[1, 4], [-1, -1], [-1, -1]]


def test_select_sequence_keeps_nothing_and_everything() -> None:
    scores, image = torch.randn(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    image[:, 2:8] = True
    assert select_sequence(scores, image, None, [4, 4]).tolist() == [[0, 1, 8, 9]] * 2
    assert select_sequence(scores, image, None, [10, 10]).tolist() == [list(range(10))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fastervlm_step_against_the_reference(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    query, key = torch.randn(2, 3, 1, 20, device=device).to(dtype), torch.randn(2, 3, 31, 20, device=device).to(dtype)
    features = torch.randn(2, 30, 8, device=device).to(dtype)
    out, index, scores = keep_patches(query, key, features, 7)
    for b in range(2):
        want = reference_scores(query[b].cpu(), key[b].cpu(), torch.ones(1, 31, dtype=torch.bool))[1:]
        torch.testing.assert_close(scores[b].cpu().double(), want, rtol=1e-4, atol=1e-6)
        assert index[b].tolist() == sorted(want.topk(7)[1].tolist())
        assert torch.equal(out[b], features[b, index[b]])
    assert torch.equal(scores, cls_scores(query, key))
    with pytest.raises(ValueError, match="tokens must be at most N=30 patches, got 31"):
        keep_patches(query, key, features, 31)


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)])
@pytest.mark.parametrize("side", [(4, 4), (3, 5)])
def test_mosaic_order_is_the_raster_of_the_stitched_picture(grid: tuple[int, int], side: tuple[int, int]) -> None:
    wide, high = grid
    rows, columns = side
    index = torch.stack([torch.randperm(rows * columns)[:6].sort()[0] for _ in range(1 + wide * high)])
    stitched = torch.full((high * rows, wide * columns), -1)
    for crop in range(wide * high):
        for t, patch in enumerate(index[1 + crop].tolist()):
            stitched[crop // wide * rows + patch // columns, crop % wide * columns + patch % columns] = (1 + crop) * 6 + t
    wanted = [*range(6), *[t for t in stitched.flatten().tolist() if t >= 0]]
    assert mosaic_order(index, grid, side).tolist() == wanted


def test_crop_grid_agrees_with_transformers() -> None:
    processing = pytest.importorskip("transformers.image_processing_utils")
    points = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    generator = torch.Generator().manual_seed(0)
    for width, height in torch.randint(50, 1500, (200, 2), generator=generator).tolist():
        best = processing.select_best_resolution((height, width), [(h, w) for w, h in points])
        assert crop_grid((width, height), points, 336) == (best[1] // 336, best[0] // 336)


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_copy_and_pickle(name: str) -> None:
    method = METHODS[name]()
    assert copy.deepcopy(method) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert {method: 1}[METHODS[name]()] == 1


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: FastV(layer=1.5), "FastV: layer must be an int, got 1.5"),  # would drop nothing in silence
        (lambda: FastV(count="72"), "FastV: count must be an int, got '72'"),
        (lambda: FastV(ratio="half"), "FastV: ratio must be a number, got 'half'"),
        (lambda: PyramidDrop(layers=(8.5,), keep=(0.5,)), r"PyramidDrop: layers\[0\] must be an int, got 8.5"),
        (lambda: PyramidDrop(layers=8), "PyramidDrop: layers must be a sequence, one value a stage, got 8"),
        (lambda: PyramidDrop(layers=(8,), keep=("a",)), r"PyramidDrop: keep\[0\] must be a number, got 'a'"),
        (lambda: PyramidDrop(max_length=9.5), "PyramidDrop: max_length must be an int, got 9.5"),
        (lambda: FasterVLM(tokens=14.5), "FasterVLM: tokens must be an int, got 14.5"),
        (lambda: get_method(5), "methods: name must be a str, got 5"),
    ],
)
def test_fields_of_the_wrong_type(make: Any, rule: str) -> None:
    with pytest.raises(TypeError, match=f"^tokensieve.{rule}$"):
        make()
