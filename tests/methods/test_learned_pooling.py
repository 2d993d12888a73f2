"""STViT, TextHawk2, PVC and RED-VILLM against loops in float64 written from the papers; their training, edges and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.inputs import normal, seeded
from reference.layers import Weights, attention, gelu, learns, linear, norm, normed, weights_of
from tokensieve.methods import PVC, REDVILLM, STViT, TextHawk2
from tokensieve.methods.pvc import AdaptiveCompression, TemporalAttention, frame_embedding, frame_indices
from tokensieve.methods.red_villm import VideoAligner, pool_axes
from tokensieve.methods.stvit import key_windows, tile, window_maxima, windows_of
from tokensieve.methods.stvit_layers import Generate, SemanticUnit
from tokensieve.methods.texthawk2 import Compressor, Positions, between, rearrange
from torch import Tensor, nn

# ---- STViT -----------------------------------------------------------------------------------------------------------------


def stvit_layer(w: Weights, name: str, tokens: Tensor, others: Tensor, heads: int, shortcut: bool = True) -> Tensor:
    def at(part: str) -> str:
        return f"{name}.{part}"

    k, v = linear(w, at("kv"), norm(w, at("norm1"), others)).chunk(2, 1)
    out = linear(w, at("proj"), attention(linear(w, at("q"), norm(w, at("norm1"), tokens)), k, v, heads))
    out = w.get(at("gamma1"), 1.0) * out + (tokens if shortcut else 0)
    more = linear(w, at("mlp.2"), gelu(linear(w, at("mlp.0"), norm(w, at("norm2"), out))))
    return out + w.get(at("gamma2"), 1.0) * more


def nearest_start(window: int, size: int, at: int, side: int) -> int:
    """Where the square of `size` whose middle is nearest to the window's starts: the later one of two."""
    return min(range(side - size + 1), key=lambda s: (abs(2 * s + size - 2 * at * window - window), -s))


def stvit_unit(w: Weights, x: Tensor, grid: tuple[int, int], m: STViT, heads: int) -> tuple[Tensor, Tensor]:
    (h, columns), win, sw, C = grid, m.window, m.sample, x.shape[1]
    image = x.view(h, columns, C)
    bins = [(u * win // sw, -(-(u + 1) * win // sw)) for u in range(sw)]
    made: dict[tuple[int, int], Tensor] = {}
    for i in range(h // win):
        for j in range(columns // win):
            inside = image[i * win : (i + 1) * win, j * win : (j + 1) * win]
            pooled = torch.stack([inside[a:b, c:d].flatten(0, 1).amax(0) for a, b in bins for c, d in bins])
            size = (min(m.key_window, h), min(m.key_window, columns))
            top, left = nearest_start(win, size[0], i, h), nearest_start(win, size[1], j, columns)
            around = image[top : top + size[0], left : left + size[1]].reshape(-1, C)
            tokens = stvit_layer(w, "generate", pooled, torch.cat([pooled, around]), heads, m.shortcut)
            for u in range(sw):
                for v in range(sw):
                    made[i * sw + u, j * sw + v] = tokens[u * sw + v]
    places = sorted(made)
    s = torch.stack([made[place] for place in places]) + w.get("centers", 0)
    s = stvit_layer(w, "refine", s, torch.cat([s, x]), heads)
    local = torch.zeros_like(s)
    for i in range(h // win):
        for j in range(columns // win):
            own = [n for n, (a, b) in enumerate(places) if (a // sw, b // sw) == (i, j)]
            local[own] = stvit_layer(w, "local", s[own], s[own], heads)
    s = stvit_layer(w, "mix", local, local, heads)
    return stvit_layer(w, "recover", x, s, heads), s


@pytest.mark.parametrize(
    ("grid", "method"),
    [
        ((14, 14), STViT()),
        ((7, 14), STViT(layer_scale=0.0, shortcut=True)),
        ((7, 7), STViT(layer_scale=1)),  # a whole number
        ((6, 9), STViT(3, 2, 5, centers=24)),
        ((4, 4), STViT(4, 3, 9, mlp_ratio=1.5)),  # the key window is larger than the map
        ((4, 2), STViT(1, 1, 1)),
        ((12, 8), STViT(4, 4, 7)),
    ],
    ids=repr,
)
def test_stvit_like_the_paper(grid: tuple[int, int], method: STViT) -> None:
    unit = SemanticUnit(8, 2, method)
    w = weights_of(unit, 3)
    x = normal(seeded(1), 2, grid[0] * grid[1], 8)
    got, tokens = unit(x, grid)
    assert tokens.shape[1] == method.tokens(grid)
    for b in range(2):
        want, semantic = stvit_unit(w, x[b].double(), grid, method, 2)
        torch.testing.assert_close(tokens[b].double(), semantic, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[b].double(), want, rtol=1e-4, atol=1e-4)


def test_stvit_key_windows_of_the_official_map_are_its_unfolding() -> None:
    places = torch.arange(196.0).view(1, 1, 14, 14)
    want = torch.nn.functional.unfold(places, 10, stride=4)[0].T
    assert torch.equal(key_windows((14, 14)).float(), want)


def test_stvit_maxima_ties_special_values_and_gradient() -> None:
    x = torch.zeros(1, 9, 1, requires_grad=True)
    out = window_maxima(x, (3, 3), 3, 2)  # bins of 2 x 2 that share the middle
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.flatten().tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 0]  # the first of each bin
    special = torch.tensor([torch.nan, 1, 2, 3, -torch.inf, 5, 6, 7, torch.inf]).view(1, 9, 1)
    assert window_maxima(special, (3, 3), 3, 3).flatten().tolist()[1:] == special.flatten().tolist()[1:]
    assert window_maxima(special, (3, 3), 3, 2).flatten().isnan().tolist() == [True, False, False, False]
    assert torch.equal(tile(windows_of(special, (3, 3), 3), (3, 3), 3).nan_to_num(), special.nan_to_num())
    assert window_maxima(torch.zeros(0, 9, 2), (3, 3), 3, 2).shape == (0, 1, 4, 2)


@pytest.mark.parametrize("shortcut", [True, False])
def test_stvit_learns_and_every_part_of_it(shortcut: bool) -> None:
    torch.manual_seed(0)
    unit = SemanticUnit(16, 2, STViT(3, 2, 4, shortcut=shortcut, layer_scale=0.1, centers=16))
    x = normal(seeded(2), 2, 36, 16)
    learns(unit, lambda: unit(x, (6, 6))[0])
    again = SemanticUnit(16, 2, unit.method)
    again.load_state_dict(unit.state_dict())
    assert torch.equal(again(x, (6, 6))[0], unit(x, (6, 6))[0])


def test_stvit_compiles_for_other_batches_and_runs_in_half_precision() -> None:
    torch.compiler.reset()
    unit = SemanticUnit(8, 2, STViT(3, 2, 4, layer_scale=0.5)).eval()
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    x = normal(seeded(4), 5, 36, 8)
    first = x[:3].clone()
    torch._dynamo.mark_dynamic(first, 0)
    with torch.no_grad():
        exact, _ = unit(x, (6, 6))
        compiled(first, (6, 6))
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x, (6, 6))[0], exact)
        torch.testing.assert_close(unit.bfloat16()(x.bfloat16(), (6, 6))[0].float(), exact, rtol=0.1, atol=0.1)


def test_stvit_projects_every_token_once() -> None:
    layer, seen = Generate(8, 2, STViT()), []
    layer.kv.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    layer(normal(seeded(0), 1, 196, 8), (14, 14))
    assert seen == [196 + 36]  # the official code: 4 windows of 109


# ---- TextHawk2 -------------------------------------------------------------------------------------------------------------


def sphere(table: Tensor, length: int) -> Tensor:
    """Row by row: the point at that share of the arc between two neighbours."""
    unit, out = [row / row.norm() for row in table.double()], []
    for i in range(length):
        at = min(max((i + 0.5) * len(table) / length - 0.5, 0.0), len(table) - 1.0)
        a, b = unit[int(at)], unit[min(int(at) + 1, len(table) - 1)]
        across = b - (a @ b) * a
        arc = math.acos(min(1.0, float(a @ b))) * (at - int(at))
        out.append(a if float(across.norm()) < 1e-9 else math.cos(arc) * a + math.sin(arc) * across / across.norm())
    return torch.stack(out)


@pytest.mark.parametrize("length", [1, 3, 5, 8, 16])
def test_texthawk2_positions_lie_on_the_sphere(length: int) -> None:
    table = normal(seeded(length), 5, 6)
    torch.testing.assert_close(between(table, length).double(), sphere(table, length), rtol=1e-4, atol=1e-5)
    for odd in (torch.ones(4, 3), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(3, 2)):  # equal, opposite, none
        odd.requires_grad_()
        out = between(odd, length)
        assert out.isfinite().all()
        assert torch.autograd.grad(out.sum(), odd)[0].isfinite().all()


@pytest.mark.parametrize(("grid", "method"), [((4, 8), TextHawk2()), ((3, 6), TextHawk2(pool=1, group=3)), ((6, 6), TextHawk2(3, 1))])
def test_texthawk2_like_the_paper(grid: tuple[int, int], method: TextHawk2) -> None:
    C, heads, (h, columns), p = 8, 2, grid, method.pool
    compress = Compressor(C, 6, heads, 2, method)
    w = weights_of(compress, 5)
    levels = [normal(seeded(i), 2, h * columns, C) for i in range(2)]
    got = compress(levels, grid)
    assert got.shape == (2, method.tokens(grid), 6)

    def where(rows: int, wide: int) -> Tensor:
        down, across = sphere(w["positions.rows"], rows), sphere(w["positions.columns"], wide)
        scale = w["positions.scale"]
        return torch.stack([scale[0] * down[i] + scale[1] * across[j] for i in range(rows) for j in range(wide)])

    for b in range(2):
        deep = levels[0][b].double().view(h, columns, C)
        squares = [deep[i : i + p, j : j + p].flatten(0, 1).mean(0) for i in range(0, h, p) for j in range(0, columns, p)]
        x = linear(w, "propose.2", gelu(linear(w, "propose.0", torch.stack(squares))))
        for n, level in enumerate(levels):
            q = linear(w, f"q.{n}", norm(w, f"norms.{n}", x) + where(h // p, columns // p))
            k, v = linear(w, f"kv.{n}", norm(w, f"norms_kv.{n}", level[b].double()) + where(h, columns)).chunk(2, 1)
            x = x + linear(w, f"proj.{n}", attention(q, k, v, heads))
        g = method.group
        joined = torch.stack([torch.cat(list(x[at : at + g])) for at in range(0, len(x), g)])
        torch.testing.assert_close(got[b].double(), linear(w, "join", joined), rtol=1e-4, atol=1e-4)


def test_texthawk2_joins_neighbours_of_a_row_without_a_copy_and_learns() -> None:
    x = torch.arange(48.0).view(1, 24, 2)
    joined = rearrange(x, 8, 4)
    assert joined.data_ptr() == x.data_ptr()
    assert joined[0, 3].tolist() == x[0, 12:16].flatten().tolist()
    torch.manual_seed(0)
    compress, levels = Compressor(16, 8, 2, 2), [normal(seeded(i), 2, 64, 16) for i in range(2)]
    learns(compress, lambda: compress(levels, (8, 8)))
    assert Positions(8)((3, 5)).shape == (15, 8)


# ---- PVC -------------------------------------------------------------------------------------------------------------------


def test_pvc_frames_look_at_their_place_in_earlier_ones() -> None:
    layer = TemporalAttention(8, 2)
    w = weights_of(layer, 7)
    x = normal(seeded(6), 2, 5, 3, 8)
    got = layer(x)
    for b in range(2):
        for n in range(3):
            place = x[b, :, n].double()
            known = norm(w, "norm", place)
            out = attention(*(linear(w, part, known) for part in ("q", "k", "v")), 2, last=0)
            want = place + w["gate"].tanh() * linear(w, "proj", out)
            torch.testing.assert_close(got[b, :, n].double(), want, rtol=1e-4, atol=1e-5)
    part = layer(x[:, :2])
    torch.testing.assert_close(part, got[:, :2])  # later frames change nothing


@pytest.mark.parametrize(("grid", "block"), [((4, 6), 2), ((3, 3), 3), ((2, 5), 1)])
def test_pvc_compresses_by_squares_and_the_number_of_the_frame(grid: tuple[int, int], block: int) -> None:
    method = PVC(block=block)
    compress = AdaptiveCompression(4, 6, method, embedding=8)
    w = weights_of(compress, 8)
    h, columns = grid
    frames = normal(seeded(7), 2, 3, h * columns, 4)
    got = compress(frames, grid, first=2)
    assert got.shape[1] * got.shape[2] == method.tokens(grid, frames=3)
    for t in range(3):
        angles = [(t + 2) * 10000 ** (-i / 4) for i in range(4)]
        number = torch.tensor([*(math.cos(a) for a in angles), *(math.sin(a) for a in angles)], dtype=torch.float64)
        hidden = linear(w, "time.0", number)
        scale, shift = linear(w, "time.2", hidden * hidden.sigmoid()).chunk(2)
        for b in range(2):
            image = frames[b, t].double().view(h, columns, 4)
            squares = [image[i : i + block, j : j + block].flatten() for i in range(0, h, block) for j in range(0, columns, block)]
            out = normed(torch.stack(squares)) * (1 + scale) + shift
            want = linear(w, "mlp.2", gelu(linear(w, "mlp.0", out)))
            torch.testing.assert_close(got[b, t].double(), want, rtol=1e-4, atol=1e-4)


def test_pvc_images_are_still_videos_and_parts_of_videos_are_the_video() -> None:
    image = normal(seeded(8), 2, 16, 4)
    video = PVC().video(image)
    assert video.shape == (2, 4, 16, 4)
    assert video.data_ptr() == image.data_ptr()
    compress = AdaptiveCompression(4, 6, embedding=8)
    weights_of(compress, 1)
    whole = compress(video, (4, 4))
    torch.testing.assert_close(torch.cat([compress(video[:, :3], (4, 4)), compress(video[:, 3:], (4, 4), first=3)], 1), whole)
    assert not torch.allclose(whole[:, 0], whole[:, 1])  # what the number of the frame does
    assert frame_indices(10, 10, 3) == [10, 10, 10]
    assert frame_indices(0, 640, 64) == [5 + 10 * i for i in range(64)]
    torch.testing.assert_close(frame_embedding(70, 6).square().sum(1), torch.full((70,), 3.0))


def test_pvc_learns() -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList([TemporalAttention(8, 2), AdaptiveCompression(8, 6, PVC(block=2), embedding=8)])
    nn.init.constant_(parts[0].gate, 0.5)  # at 0 nothing but the gate learns in the first step
    nn.init.normal_(parts[1].time[2].weight, std=0.1)
    x = normal(seeded(2), 2, 3, 16, 8)
    learns(parts, lambda: parts[1](parts[0](x), (4, 4)), idle=("k.bias",))  # the same for all keys: softmax does not see it


# ---- RED-VILLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_red_villm_means_over_time_and_space(dtype: torch.dtype) -> None:
    frames = normal(seeded(3), 2, 5, 7, 3).to(dtype).requires_grad_()
    over_time, over_space = pool_axes(frames)
    exact = frames.detach().double()
    for n in range(7):
        torch.testing.assert_close(over_time[:, n], (sum(exact[:, t, n] for t in range(5)) / 5).to(dtype))
    for t in range(5):
        torch.testing.assert_close(over_space[:, t], (sum(exact[:, t, n] for n in range(7)) / 7).to(dtype))
    (gradient,) = torch.autograd.grad(over_time.sum() + 2 * over_space.sum(), frames)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / 5 + 2 / 7))
    large = torch.full((1, 4, 4, 1), 40000.0, dtype=torch.float16)  # their sum is no float16
    assert all(bool((part == 40000).all()) for part in pool_axes(large))


@pytest.mark.parametrize("first", [False, True])
def test_red_villm_projects_each_part_with_its_own_weights(first: bool) -> None:
    torch.manual_seed(0)
    projector = nn.Linear(3, 6)
    model = VideoAligner(projector, REDVILLM(temporal_first=first))
    frames = normal(seeded(4), 2, 5, 7, 3)
    assert model.spatial is projector
    same = model(frames)
    with torch.no_grad():
        model.temporal.weight.zero_()
    changed = (model(frames) != same).any(2)
    assert changed[0].tolist() == [True] * 5 + [False] * 7 if first else [False] * 7 + [True] * 5
    assert REDVILLM().tokens(5, 7) == same.shape[1]
    learns(model, lambda: model(frames)[:1, ::9])


X = torch.zeros(1, 6, 4)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: STViT(sample=8), r"STViT: sample must be in \[1, window=7\], got 8"),
        (lambda: STViT(key_window=6), "STViT: key_window must be at least window=7, got 6"),
        (lambda: STViT(layer_scale=-1.0), "STViT: layer_scale must be 0 or more"),
        (lambda: STViT(mlp_ratio=0), "STViT: mlp_ratio must be positive"),
        (lambda: STViT(centers=-1), "STViT: centers must be 0 or more"),
        (lambda: STViT().tokens((14, 15)), r"STViT: grid must be multiples of window=7, got \(14, 15\)"),
        (lambda: SemanticUnit(8, 3, STViT()), "STViT: heads must divide channels=8, got 3"),
        (lambda: SemanticUnit(4, 2, STViT(2, 1, 2, centers=2))(X, (2, 3)), r"pool_grid: within must divide grid=\(2, 3\), got \(2, 2\)"),
        (lambda: SemanticUnit(4, 2, STViT(1, 1, 2, centers=2))(X, (2, 3)), r"STViT: centers must be 6 for grid=\(2, 3\), got 2"),
        (lambda: window_maxima(X, (2, 4), 2, 1), r"pool_grid: grid must have the N=6 tokens of x, got \(2, 4\)"),
        (lambda: windows_of(X, (2, 4), 2), r"stvit: grid must have the 6 tokens of x, got \(2, 4\)"),
        (lambda: TextHawk2(pool=0), "TextHawk2: pool must be 1 or more, got 0"),
        (lambda: TextHawk2(group=0), "TextHawk2: group must be 1 or more, got 0"),
        (lambda: TextHawk2().tokens((8, 12)), r"TextHawk2: grid must be multiples of \(2, 8\), got \(8, 12\)"),
        (lambda: rearrange(X, 4), "rearrange: columns must divide the 6 tokens, got 4"),
        (lambda: rearrange(X, 3, 2), "rearrange: group must divide columns=3, got 2"),
        (lambda: Compressor(8, 8, 3, 1), "TextHawk2: heads must divide channels=8, got 3"),
        (lambda: Compressor(8, 8, 2, 2)([X], (2, 3)), "TextHawk2: levels must be 2, got 1"),
        (lambda: PVC(repeats=0), "PVC: repeats must be 1 or more, got 0"),
        (lambda: PVC(block=0), "PVC: block must be 1 or more, got 0"),
        (lambda: PVC().tokens((32, 30)), r"PVC: grid must be multiples of block=4, got \(32, 30\)"),
        (lambda: frame_indices(0, 9, 0), "frame_indices: segments must be 1 or more, got 0"),
        (lambda: frame_indices(9, 0, 2), "frame_indices: end must be at least start=9, got 0"),
        (lambda: frame_embedding(2, 3), "frame_embedding: channels must be even, got 3"),
        (lambda: TemporalAttention(8, 3), "TemporalAttention: heads must divide channels=8, got 3"),
        (lambda: pool_axes(torch.zeros(1, 0, 3, 2)), r"row_column_means: x must have T >= 1 frames of N >= 1 tokens"),
    ],
)
def test_learned_pooling_refuses(make: Callable[[], Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


@pytest.mark.parametrize("make", [lambda: STViT(window=7.0), lambda: TextHawk2(pool="2"), lambda: PVC(block=True), lambda: REDVILLM(1)])
def test_fields_of_the_wrong_type(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"must be an? "):
        make()
