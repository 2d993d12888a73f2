"""Methods that merge inside encoder blocks against loops in float64, and the input checks of all methods that merge."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from reference import merge_methods as reference
from reference.inputs import randn
from tokensieve import ops
from tokensieve.methods import (
    AIMMerge,
    BlockMethod,
    BlockView,
    DiffRate,
    EViT,
    PiToMe,
    PruMerge,
    PruMergePlus,
    ToFu,
    ToMe,
    ToMeSD,
    Turbo,
    VisionZip,
    aim_merge,
    diffrate,
    evit,
    pitome,
    tome,
    tomesd,
    turbo,
)
from torch import Tensor


def rows(groups: list[list[int]], N: int) -> tuple[list[int], list[int]]:
    """index and inverse of one image."""
    inverse = [-1] * N
    for row, group in enumerate(groups):
        for n in group:
            inverse[n] = row
    return [group[0] for group in groups], inverse


def assert_plan(plan: ops.MergePlan, b: int, groups: list[list[int]]) -> None:
    assert (plan.index[b].tolist(), plan.inverse[b].tolist()) == rows(groups, plan.inverse.shape[1])


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: ToMe(r=-1), "ToMe: r must be 0 or more, got -1"),
        (lambda: ToMe(r=(1, -2)), "ToMe: r must be 0 or more"),
        (lambda: ToMe(inflect=2.0), r"inflect must be in \[-1, 1\]"),
        (lambda: ToMe(r=(3, 4), inflect=0.5), "inflect goes with an int r"),
        (lambda: tome.match_kth(torch.zeros(1, 5, 2), 6), r"match_kth: k must be in \[1, N=5\], got 6"),
        (lambda: Turbo(beta=0.0), "beta must be positive"),
        (lambda: EViT(keep=0.0), r"EViT: keep must be in \(0, 1\], got 0.0"),
        (lambda: evit.keep_and_fuse(torch.zeros(1, 5, 2), torch.zeros(1, 5), 5), r"k must be in \[0, 4\]"),
        (lambda: PiToMe(keep=1.5), r"PiToMe: keep must be in \(0, 1\]"),
        (lambda: pitome.match_by_energy(torch.zeros(1, 5, 2), torch.zeros(1, 4), 3), r"r must be in \[0, 2\], got 3"),
        (lambda: DiffRate(prune=(5,), merge=(6,)), "merge must be at most prune"),
        (lambda: DiffRate(prune=(5, 4), merge=(5,)), "merge must have 2 numbers"),
        (lambda: diffrate.prune_and_merge(torch.zeros(1, 5, 2), torch.zeros(1, 5), 6, 3), "merged <= kept <= N=5 must hold"),
        (lambda: ToFu(prune_blocks=-1), "prune_blocks must be 0 or more"),
        (lambda: ToMeSD(ratio=1.2), r"ToMeSD: ratio must be in \[0, 1\]"),
        (lambda: ToMeSD().plan(torch.zeros(1, 9, 2), (2, 4)), r"grid must hold the N=9 tokens, got \(2, 4\)"),
        (lambda: tomesd.partition((4, 4), (2, 2), torch.zeros(1, 2, dtype=torch.int64)), r"offsets must be \(2, 2\)"),
        (lambda: PruMerge(neighbors=0), "neighbors must be 1 or more, got 0"),
        (lambda: PruMergePlus(ratio=0.0), r"ratio must be in \(0, 1\]"),
        (lambda: PruMergePlus(grid_end=-1), "grid_end must be 0 or more"),
        (lambda: VisionZip(dominant=0), "dominant must be 1 or more"),
        (lambda: AIMMerge(r=(4, -1)), "r must be 0 or more"),
    ],
)
def test_bad_input(make: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


@pytest.mark.parametrize("make", [lambda: ToMe(r=1.5), lambda: EViT(layers=("3",)), lambda: ToFu(keep="x"), lambda: VisionZip(1.0)])
def test_fields_of_the_wrong_type(make: Any) -> None:
    with pytest.raises(TypeError, match=r"must be an? "):
        make()


# ---- ToMe, Turbo, ToFu -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "prefix"), [(2, 0), (3, 1), (9, 0), (16, 1), (17, 1), (18, 2), (23, 5)])
def test_tome_matches_and_merges_like_the_paper(N: int, prefix: int) -> None:
    metric, tokens, size = randn(N, 2, N, 6), randn(N + 1, 2, N, 5), torch.rand(2, N) * 3 + 0.5
    for r in {0, 1, (N - prefix) // 4, (N - prefix) // 2}:
        plan = tome.match(metric, r, prefix)
        merged = tome.merge_weighted(tokens, plan, size)
        for b in range(2):
            groups = reference.tome(metric[b].double(), r, prefix)
            assert_plan(plan, b, groups)
            want = reference.means(tokens[b].double(), groups, size[b].double())
            torch.testing.assert_close(merged.tensors[b].double(), want, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(merged.size[b], torch.stack([size[b, g].sum() for g in groups]))
        torch.testing.assert_close(merged.log_size, merged.size.log())


def test_tome_compares_the_mean_of_the_heads() -> None:
    key = randn(0, 2, 3, 12, 4)
    for got, want in zip(tome.match(key, 3), tome.match(key.mean(1), 3), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("r", "inflect", "depth", "want"),
    [
        (8, 0.0, 3, (8, 8, 8)),
        (8, 1.0, 3, (0, 8, 16)),
        (8, -1.0, 3, (16, 8, 0)),
        (7, 0.3, 1, (4,)),
        ((5, 3), 0.0, 4, (5, 3, 0, 0)),
        (9, 0.0, 0, ()),
    ],
)
def test_schedules(r: Any, inflect: float, depth: int, want: tuple[int, ...]) -> None:
    assert ToMe(r=r, inflect=inflect).schedule(depth) == want
    assert ToMe(r=r, inflect=inflect).blocks(depth) == tuple(block for block, n in enumerate(want) if n)


def view_of(tokens: Tensor, key: Tensor, prefix: int = 1, **options: Any) -> BlockView:
    return BlockView(
        **{"block": 0, "depth": 4, "tokens": tokens, "query": key, "key": key, "scale": 0.5, "prefix": prefix, "cls": prefix > 0,
           "patches": tokens.shape[1] - prefix, **options}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "left"),  # fields that nobody else has: the warning is remembered
    [
        (ToMe(r=(70, 71)), 6),
        (Turbo(r=(70, 72), threshold=3), 6),
        (PiToMe(keep=0.31), 6),
        (ToFu(keep=0.31), 6),
        (AIMMerge(r=(70, 1)), 4),
        (ToMeSD(ratio=0.91), 2),
    ],
    ids=repr,
)
def test_more_than_half_merges_half_and_warns_once(method: Any, left: int) -> None:
    tokens, key = randn(0, 1, 10, 4), randn(1, 1, 2, 10, 4)

    def run() -> int:
        if isinstance(method, AIMMerge):
            assert method.keep_count(10) == left
            return aim_merge.merge_rounds(tokens, method.rounds(10))[0].shape[1]
        if isinstance(method, ToMeSD):
            plan = method.plan(tokens, (2, 5))
            assert plan is not None
            return plan.index.shape[1]
        step = method.step(view_of(tokens, key))
        assert step is not None
        return step.tokens.shape[1]

    rule = " asks to merge more than (half of its patches|all tokens but one)"
    with pytest.warns(UserWarning, match=re.escape(repr(method)) + rule) as seen:
        assert run() == left
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == left
        if isinstance(method, BlockMethod):  # CLS and one patch: nothing to merge
            assert method.step(view_of(tokens[:, :2], key[:, :, :2])) is None


def test_no_warning_where_exactly_half_merges() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (ToMe(r=4), Turbo(r=4, threshold=3), PiToMe(keep=0.5), ToFu(keep=0.5)):
            step = method.step(view_of(randn(0, 1, 10, 4), randn(1, 1, 2, 10, 4)))
            assert step is not None
            assert step.tokens.shape[1] == 6
        assert AIMMerge(r=(5, 2)).rounds(10) == (5, 2)
        assert ToMeSD(ratio=0.75).plan(randn(0, 1, 16, 4), (4, 4)) is not None


def test_equal_and_zero_tokens_stay_finite_and_in_order() -> None:
    same = torch.ones(1, 8, 4)
    assert tome.match(same, 2).source.tolist() == [[2, 4]]
    assert tome.match(same, 2).destination.tolist() == [[1, 1]]
    plan = tome.match(torch.cat([same, torch.zeros(1, 1, 4)], 1), 4)
    assert plan.source.tolist() == [[2, 4, 6, 8]]  # the zero one is like nothing: last
    assert tome.merge_weighted(same, tome.match(same, 3)).tensors.isfinite().all()


def test_kth_and_random_matching() -> None:
    metric = randn(3, 2, 14, 5)
    plan = tome.match_kth(metric, 4)
    for b in range(2):
        targets = [3, 7, 11]
        into, _ = reference.matched(metric[b].double(), [n for n in range(12) if n not in targets], targets, 9)
        assert_plan(plan, b, reference.grouped(targets, into))
    assert (tome.match_kth(metric, 1).inverse == torch.arange(14)).all()
    assert tome.match_kth(metric, 2).inverse[:, 1::2].tolist() == [list(range(7))] * 2
    assert tome.match_kth(metric[:, :3], 2).inverse.tolist() == [[0, 0, -1]] * 2
    plan = tome.match_random(metric, 5, torch.Generator().manual_seed(0))
    for b in range(2):
        targets = plan.index[b].tolist()
        into, _ = reference.matched(metric[b].double(), [n for n in range(14) if n not in targets], targets, 5)
        assert_plan(plan, b, reference.grouped(targets, into))


def test_unmerging_gives_every_token_its_groups_value_with_a_distillation_token_too() -> None:
    tokens = randn(0, 2, 12, 3)
    plan = tome.match(tokens, 4, prefix=2)
    merged = tome.merge_weighted(tokens, plan).tensors
    undone = ops.unmerge_tokens(merged, plan)
    for b in range(2):
        for row, group in enumerate(reference.tome(tokens[b].double(), 4, 2)):
            for n in group:
                assert torch.equal(undone[b, n], merged[b, row])


@pytest.mark.parametrize("prefix", [1, 2])
def test_turbo_ranks_by_redundancy_minus_attention(prefix: int) -> None:
    metric, scores = randn(5, 2, 21, 6), randn(6, 2, 21).softmax(1)
    plan = turbo.match_informed(metric, scores, 6, 30.0, prefix)
    for b in range(2):
        assert_plan(plan, b, reference.tome(metric[b].double(), 6, prefix, 30.0 * scores[b].double()))
    free = turbo.match_informed(metric, scores, 6, 0.0, prefix)
    assert torch.equal(free.index, tome.match(metric, 6, prefix).index)


def test_turbo_counts_blocks_that_merge_and_leaves_short_sequences_alone() -> None:
    method = Turbo(r=(3, 0, 3), beta=0.5, gamma=1, threshold=9)
    assert method.blocks(4) == (0, 2)
    assert [method.weight(turn) for turn in (0, 1, 2)] == [15.0, 30.0, 15.0]
    key = randn(0, 1, 2, 10, 4)
    view = view_of(randn(1, 1, 10, 4), key, block=2)
    want = turbo.match_informed(key, view.cls_scores(), 3, 30.0)
    step = method.step(view)
    assert step is not None
    assert torch.equal(step.index, want.index)
    assert method.step(view_of(randn(1, 1, 8, 4), randn(0, 1, 2, 8, 4))) is None


def test_tofu_keeps_norms_or_drops() -> None:
    key, tokens = randn(0, 2, 3, 13, 4), randn(1, 2, 13, 5)
    tokens[:, 3] = 0  # a receiver of norm 0
    early, late = (ToFu(keep=0.7).step(view_of(tokens, key, block=block)) for block in (1, 2))
    assert early is not None
    assert late is not None
    for b in range(2):
        groups = reference.tome(key[b].double().mean(0), 3, 1)
        assert early.index[b].tolist() == [group[0] for group in groups]
        assert torch.equal(early.tokens[b], tokens[b, early.index[b]])
        torch.testing.assert_close(late.tokens[b].double(), reference.norm_kept(tokens[b].double(), groups), atol=1e-6, rtol=1e-5)
    assert early.inverse is None


# ---- PiToMe, DiffRate, EViT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize(("N", "prefix", "r"), [(4, 0, 1), (4, 0, 2), (21, 1, 6), (22, 2, 10), (12, 1, 0)])
def test_pitome_like_the_paper(N: int, prefix: int, r: int, protect: bool) -> None:
    metric = randn(N, 2, N, 6) + randn(N + 1, 2, 1, 6)
    plan = pitome.match_by_energy(metric, pitome.energy(metric[:, prefix:], 0.4), r, prefix, protect=protect)
    for b in range(2):
        assert_plan(plan, b, reference.pitome(metric[b].double(), r, prefix, 0.4, protect))


def test_pitome_steps_change_their_matching_in_the_middle() -> None:
    method, key, tokens = PiToMe(keep=0.8), randn(0, 1, 3, 17, 4), randn(1, 1, 17, 5)
    for block, protect in ((1, False), (2, True)):
        step = method.step(view_of(tokens, key, block=block))
        assert step is not None
        groups = reference.pitome(key[0].double().mean(0), 3, 1, 0.75 * (1 - block / 4), protect)
        assert step.index[0].tolist() == [group[0] for group in groups]


@pytest.mark.parametrize(("kept", "merged"), [(17, 12), (14, 9), (12, 12), (3, 2)])
def test_diffrate_like_the_paper(kept: int, merged: int) -> None:
    tokens, scores, size = randn(0, 2, 17, 6) + 0.5, randn(1, 2, 17).softmax(1), torch.rand(2, 17) + 0.5
    done = diffrate.prune_and_merge(tokens, scores, kept, merged, size=size)
    for b in range(2):
        groups, total = reference.diffrate(tokens[b].double(), scores[b], kept, merged, 1, size[b].double())
        assert_plan(done.plan, b, groups)
        ones = torch.ones(17, dtype=torch.float64)
        torch.testing.assert_close(done.tokens[b].double(), reference.means(tokens[b].double(), groups, ones), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(done.size[b].double(), total, atol=1e-6, rtol=1e-5)


def test_diffrate_sizes_stay_positive_where_a_cosine_is_negative() -> None:
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]]])
    done = diffrate.prune_and_merge(tokens, torch.tensor([[0.4, 0.3, 0.2, 0.1]]), 4, 2)
    assert done.size[0, 1] > 0
    assert done.size.log().isfinite().all()


def test_diffrate_steps_do_nothing_where_nothing_is_asked() -> None:
    view = view_of(randn(0, 1, 9, 4), randn(1, 1, 2, 9, 4))
    assert DiffRate(prune=(20,), merge=(9,)).step(view) is None
    step = DiffRate(prune=(20,), merge=(8,)).step(view)
    assert step is not None
    assert step.tokens.shape[1] == 8


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("k", [0, 5, 15])
@pytest.mark.parametrize("prefix", [1, 2])
def test_evit_like_the_paper(k: int, prefix: int, fuse: bool) -> None:
    tokens, scores = randn(0, 2, 17, 4), randn(1, 2, 17).softmax(1)
    out, index = evit.keep_and_fuse(tokens, scores, k, prefix, fuse=fuse)
    for b in range(2):
        kept, want = reference.evit(tokens[b].double(), scores[b].double(), k, prefix, fuse)
        assert index[b].tolist() == kept + [-1] * fuse
        torch.testing.assert_close(out[b].double(), want, atol=1e-6, rtol=1e-5)


def test_evit_normalised_and_its_gradients() -> None:
    tokens, scores = randn(0, 1, 6, 3).requires_grad_(), randn(1, 1, 6).softmax(1).requires_grad_()
    out, index = evit.keep_and_fuse(tokens, scores, 2, normalize=True)
    rest = [n for n in range(6) if n not in index[0].tolist()]
    share = scores[0, rest] / scores[0, rest].sum()
    want = torch.cat([tokens[0, index[0, :3]], (share[:, None] * tokens[0, rest]).sum(0, keepdim=True)])
    torch.testing.assert_close(out[0], want, atol=1e-6, rtol=1e-5)
    weight = randn(2, 4, 3)
    grads = [torch.autograd.grad((x * weight).sum(), (tokens, scores), retain_graph=True) for x in (out[0], want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_evit_reference_schedule_of_deit() -> None:
    for keep, wanted in ((0.9, (179, 163, 148)), (0.7, (140, 100, 72)), (0.5, (100, 52, 28))):
        left, counts = 197, []
        for _ in range(3):
            left = EViT(keep=keep).keep_count(left - 1) + 2
            counts.append(left)
        assert tuple(counts) == wanted
    assert EViT(tokens=30).keep_count(196) == 30


# ---- ToMeSD ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "cell"), [((4, 6), (2, 2)), ((5, 7), (2, 3)), ((3, 3), (1, 1)), ((2, 2), (3, 2))])
def test_tomesd_has_one_receiver_in_every_cell(grid: tuple[int, int], cell: tuple[int, int]) -> None:
    cells = (grid[0] // cell[0], grid[1] // cell[1])
    offsets = torch.randint(cell[0] * cell[1], cells, generator=torch.Generator().manual_seed(0))
    sources, targets = tomesd.partition(grid, cell, offsets)
    want = sorted(
        (y * cell[0] + int(o) // cell[1]) * grid[1] + x * cell[1] + int(o) % cell[1]
        for y, line in enumerate(offsets.tolist())
        for x, o in enumerate(line)
    )
    assert targets.tolist() == want
    assert sources.tolist() == [n for n in range(grid[0] * grid[1]) if n not in want]


def test_tomesd_odd_batches_draw_nothing_and_small_grids_merge_nothing() -> None:
    x = randn(0, 3, 16, 4)
    plan = ToMeSD().plan(x, (4, 4))
    assert plan is not None
    assert plan.index[0, -4:].tolist() == [0, 2, 8, 10]
    assert ToMeSD().plan(x[:2, :1], (1, 1)) is None
    assert ToMeSD(ratio=0.0).plan(x, (4, 4)) is None
    drawn = {tuple(plan.index[0, -4:].tolist()) for _ in range(8) if (plan := ToMeSD().plan(x[:2], (4, 4))) is not None}
    assert len(drawn) > 1


def test_tomesd_around_a_module_reaches_every_token_with_gradients() -> None:
    x = randn(0, 2, 16, 4).requires_grad_()
    plan = ToMeSD().plan(x, (4, 4))
    assert plan is not None
    out = x + ops.unmerge_tokens(ops.merge_tokens(x, plan).tensors * 2, plan)
    assert out.shape == x.shape
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient.sum(), torch.tensor(3.0 * x.numel()))  # every group's mean weighs as much as its members


def test_gradients_reach_tokens_and_not_the_metric() -> None:
    tokens, key = randn(0, 1, 11, 4).requires_grad_(), randn(1, 1, 2, 11, 4).requires_grad_()
    for method in (ToMe(r=3), Turbo(r=3, threshold=0), PiToMe(keep=0.7), ToFu(keep=0.7, prune_blocks=0), DiffRate((9,), (7,))):
        step = method.step(view_of(tokens, key))
        assert step is not None
        (gradient,) = torch.autograd.grad(step.tokens.sum(), tokens, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient[0, 0] == 1).all()  # CLS
        assert torch.autograd.grad(step.tokens.sum(), key, allow_unused=True)[0] is None
