"""Methods that merge: matching and merging of one block, or before the language model, beside scatter_reduce on matrices of all pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokensieve import methods, ops
from tokensieve.methods import aim_merge, diffrate, evit, pitome, prumerge, tofu, tome, turbo, visionzip
from torch import Tensor

from .. import cases
from ..harness import Case, Inputs, Settings
from ..peers import unit
from .plain import step as plain_step

B, N, C, H, D = 8, 197, 384, 6, 64  # DeiT-S on 8 images of 224
WIDTH, PATCHES = cases.CLIP.C, cases.CLIP.R


def step(name: str, what: str, inputs: Any, ours: Callable[..., Any], eager: Callable[..., Any], nbytes: int, flops: int = 0) -> Case:
    return plain_step(name, what, inputs, ours, eager, nbytes=nbytes, flops=flops, rows=True)


def _block(device: str) -> Callable[[int], Inputs]:
    """seed -> tokens, queries, keys, sizes of one block that merged before."""

    def make(seed: int) -> Inputs:
        size = 1 + cases.randn(seed + 3, B, N, device=device).abs()
        heads = (cases.randn(seed + i, B, H, N, D, device=device) for i in (1, 2))
        return cases.randn(seed, B, N, C, device=device), *heads, size

    return make


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, like.shape[-1])


def _pairs(metric: Tensor, r: int, penalty: Tensor | float = 0.0, cls: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(sources that stay, sources that merge, where to), in numbers of the even and the odd tokens."""
    u = unit(metric)
    pairs = u[:, ::2] @ u[:, 1::2].transpose(1, 2) - penalty
    if cls:
        pairs[:, 0] = -torch.inf
    best, to = pairs.max(-1)
    order = best.argsort(dim=-1, descending=True)
    stay = order[:, r:]
    return stay.sort(dim=1).values if cls else stay, order[:, :r], to.gather(1, order[:, :r])


def _scatter(x: Tensor, found: tuple[Tensor, Tensor, Tensor], mode: str) -> Tensor:
    stay, go, to = found
    even, odd = x[:, ::2], x[:, 1::2]
    merged = odd.scatter_reduce(1, _wide(to, x), even.gather(1, _wide(go, x)), mode)
    return torch.cat([even.gather(1, _wide(stay, x)), merged], 1)


def _weighted(x: Tensor, size: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    total = _scatter(size[..., None], found, "sum")
    return _scatter(x * size[..., None], found, "sum") / total, total[..., 0]


def _cls_row(query: Tensor, key: Tensor, size: Tensor | None = None) -> Tensor:
    """Out of the map, which the block computes without fused attention for it."""
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if size is not None:
        logits = logits + size.log()[:, None, None, :]
    return logits.softmax(-1).mean(1)[:, 0]


def _ours_row(query: Tensor, key: Tensor, size: Tensor | None = None) -> Tensor:
    return ops.attention_scores(query[:, :, :1], key, bias=None if size is None else size.log()[:, None, None, :])


def _tome(settings: Settings) -> Case:
    r = 13

    def ours(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        merged = tome.merge_weighted(x, tome.match(key, r), size)
        return merged.tensors, merged.size

    def eager(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return _weighted(x, size, _pairs(key.mean(1), r))

    return step("ToMe", f"DeiT-S, {B} images, {N} - {r}", _block(settings.device), ours, eager, 8 * B * N * C + 4 * B * H * N * D)


def _turbo(settings: Settings) -> Case:
    r = methods.Turbo().r
    assert isinstance(r, int)

    def ours(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        merged = tome.merge_weighted(x, turbo.match_informed(key, _ours_row(query, key, size), r, 30.0), size)
        return merged.tensors, merged.size

    def eager(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        penalty = 30.0 * _cls_row(query, key, size)[:, ::2, None]
        return _weighted(x, size, _pairs(key.mean(1), r, penalty))

    return step("Turbo", f"DeiT-S, {B} images, {N} - {r}", _block(settings.device), ours, eager, 8 * B * N * C + 4 * B * H * N * D)


def _tofu(settings: Settings) -> Case:
    r = methods.ToFu().merges(N - 1)

    def ours(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor]:
        return (tofu.merge_keeping_norm(x, tome.match(key, r)),)

    def eager(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor]:
        found = _pairs(key.mean(1), r)
        norm = x.norm(dim=-1, keepdim=True)
        own = torch.cat([norm[:, ::2].gather(1, found[0][..., None]), norm[:, 1::2]], 1)
        return (_scatter(x, found, "mean") * _scatter(norm, found, "amax") / own,)

    return step("ToFu", f"DeiT-S, {B} images, {N} - {r}", _block(settings.device), ours, eager, 8 * B * N * C + 4 * B * H * N * D)


def _evit(settings: Settings) -> Case:
    k = methods.EViT().keep_count(N - 1)

    def ours(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor]:
        return (evit.keep_and_fuse(x, _ours_row(query, key), k)[0],)

    def eager(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor]:
        scores, patches = _cls_row(query, key)[:, 1:], x[:, 1:]
        index = scores.topk(k).indices
        mask = torch.ones_like(scores).scatter_(1, index, 0.0)
        rest = mask.nonzero()[:, 1].view(len(x), -1)
        fused = (patches.gather(1, _wide(rest, x)) * scores.gather(1, rest)[..., None]).sum(1, keepdim=True)
        return (torch.cat([x[:, :1], patches.gather(1, _wide(index, x)), fused], 1),)

    return step("EViT", f"DeiT-S, {B} images, {N - 1} keep {k}", _block(settings.device), ours, eager, 8 * B * N * C + 4 * B * H * N * D)


def _pitome(settings: Settings) -> Case:
    method, block, depth = methods.PiToMe(), 6, 12
    r, margin = method.merges(N - 1), method.margin_of(block, depth)

    def ours(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        metric = key.mean(1)
        plan = pitome.match_by_energy(metric, pitome.energy(metric[:, 1:], margin), r)
        merged = tome.merge_weighted(x, plan, size)
        return merged.tensors, merged.size

    def eager(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        u = unit(key.mean(1)[:, 1:])
        pairs = u @ u.transpose(1, 2)
        order = torch.nn.functional.elu(pairs - margin).mean(-1).argsort(dim=-1, descending=True)
        go, stay, onto = order[:, : 2 * r : 2], order[:, 2 * r :], order[:, 1 : 2 * r : 2]
        between = pairs.gather(1, _wide(go, pairs)).gather(2, onto[:, None].expand(-1, r, -1))
        to = between.argmax(-1)

        def summed(values: Tensor) -> Tensor:
            rest = values[:, 1:]
            merged = rest.gather(1, _wide(onto, values)).scatter_reduce(1, _wide(to, values), rest.gather(1, _wide(go, values)), "sum")
            return torch.cat([values[:, :1], rest.gather(1, _wide(stay, values)), merged], 1)

        total = summed(size[..., None])
        return summed(x * size[..., None]) / total, total[..., 0]

    return step("PiToMe", f"DeiT-S, {B} images, {N} - {r}", _block(settings.device), ours, eager, 8 * B * N * C + 4 * B * H * N * D)


def _diffrate(settings: Settings) -> Case:
    kept, merged = 174, 160

    def ours(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> Sequence[Tensor]:
        return diffrate.prune_and_merge(x, _ours_row(query, key, size), kept, merged, size=size)[:2]

    def eager(x: Tensor, query: Tensor, key: Tensor, size: Tensor) -> Sequence[Tensor]:
        scores = _cls_row(query, key, size)
        order = torch.cat([scores.new_zeros(len(x), 1).long(), scores[:, 1:].argsort(dim=1, descending=True) + 1], 1)
        x, size = x.gather(1, _wide(order, x))[:, :kept], size.gather(1, order)[:, :kept]
        u = unit(x)
        pairs = u[:, merged:] @ u[:, :merged].transpose(1, 2)
        pairs[:, :, 0] = -torch.inf
        cosine, to = pairs.max(-1)
        mean = x[:, :merged].scatter_reduce(1, _wide(to, x), x[:, merged:], "mean")
        return mean, size[:, :merged].scatter_add(1, to, size[:, merged:] * cosine)

    return step("DiffRate", f"DeiT-S, {B} images, {N} to {kept} to {merged}", _block(settings.device), ours, eager, 12 * B * N * C)


def _tomesd(settings: Settings) -> Case:
    side, width = 64, 320
    method, r = methods.ToMeSD(random=False), 2048

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, 2, side * side, width, device=settings.device),)

    def ours(x: Tensor) -> tuple[Tensor]:
        plan = method.plan(x, (side, side))
        assert plan is not None
        return (ops.unmerge_tokens(ops.merge_tokens(x, plan).tensors, plan),)

    def eager(x: Tensor) -> tuple[Tensor]:
        mark = torch.zeros(side, side, device=x.device, dtype=torch.int64)
        mark[::2, ::2] = -1
        order, cells = mark.flatten().argsort(), side * side // 4
        onto, others = order[:cells], order[cells:]
        u = unit(x)
        best, to = (u[:, others] @ u[:, onto].transpose(1, 2)).max(-1)
        ranked = best.argsort(dim=-1, descending=True)
        go, stay, to = ranked[:, :r], ranked[:, r:], to.gather(1, ranked[:, :r])
        sources = x[:, others]
        merged = x[:, onto].scatter_reduce(1, _wide(to, x), sources.gather(1, _wide(go, x)), "mean")
        out = torch.zeros_like(x)
        out[:, onto] = merged
        out.scatter_(1, _wide(others[stay], x), sources.gather(1, _wide(stay, x)))
        return (out.scatter_(1, _wide(others[go], x), merged.gather(1, _wide(to, x))),)

    what, flops = f"latent {side} x {side}, 2 samples, merge and unmerge", 2 * 2 * width * 3 * 1024 * 1024
    return step("ToMeSD", what, inputs, ours, eager, 16 * 2 * side * side * width, flops)


def _clip(device: str) -> Callable[[int], Inputs]:
    """seed -> all queries and keys of a CLIP layer, all its features with CLS."""

    def make(seed: int) -> Inputs:
        query, key = cases.queries_keys(seed, cases.CLIP, 1, cases.CLIP.N, device=device)
        return query, key, cases.randn(seed + 2, 1, PATCHES + 1, WIDTH, device=device)

    return make


def _prumerge_eager(query: Tensor, key: Tensor, hidden: Tensor, plus: bool) -> tuple[Tensor]:
    """The authors' loop over centres, with sizes read on the host."""
    q, k = (x.transpose(1, 2).flatten(2) for x in (query, key))
    scores = (q @ k.transpose(1, 2) * WIDTH**-0.5).softmax(-1)[0, 0, 1:]
    first, third = torch.quantile(scores, 0.25), torch.quantile(scores, 0.75)
    count = int((scores > third + 1.5 * (third - first)).sum())
    centers = scores.topk(count).indices.tolist()
    if plus:
        centers += sorted(set(range(0, PATCHES - 1, max(PATCHES // max(count, 1) // 3, 1))) - set(centers))
    keys, features = unit(k[0, 1:]), hidden[0, 1:]
    rows = []
    for i in centers:
        near = keys @ keys[i]
        near[i] = -torch.inf
        chosen = near.topk(32).indices
        rows.append(features[i] + (features[chosen] * scores[chosen, None]).sum(0))
    rest = [n for n in range(PATCHES) if n not in set(centers)]
    rows.append((features[rest] * scores[rest, None]).sum(0))
    return (torch.stack(rows)[None],)


def _prumerge(settings: Settings, plus: bool = False) -> Case:
    method = methods.PruMergePlus() if plus else methods.PruMerge()

    def ours(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor]:
        done = prumerge.keep_outliers(query[:, :, :1], key, hidden[:, 1:], method)
        real = torch.nn.functional.pad(done.centers[0] >= 0, (0, 1), value=True)  # as theirs, which reads the count on the host
        return (done.tokens[:, real],)

    def eager(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor]:
        return _prumerge_eager(query, key, hidden, plus)

    name = "PruMergePlus" if plus else "PruMerge"
    return step(name, f"{cases.CLIP.label}, 32 neighbours", _clip(settings.device), ours, eager, 12 * PATCHES * WIDTH)


def _visionzip(settings: Settings) -> Case:
    method = methods.VisionZip()
    d, c = method.split(PATCHES)

    def ours(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor]:
        scores = visionzip.cls_scores(query[:, :, :1], key)
        return (visionzip.merge(hidden[:, 0], hidden[:, 1:], visionzip.choose(scores, visionzip.head_mean(key), [(d, c)])),)

    def eager(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor]:
        scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].sum(1)
        mask = torch.ones_like(hidden[..., 0], dtype=torch.bool).scatter_(1, scores.topk(d).indices + 1, False)
        mask[:, 0] = False
        kept, rest = hidden[~mask][None], hidden[mask][None]
        metric = unit(key.mean(1)[mask][None])
        M = rest.shape[1]
        targets = torch.arange(0, M, max(1, M // c), device=rest.device)[:c]
        others = torch.ones(M, dtype=torch.bool, device=rest.device).index_fill_(0, targets, False)
        onto = (metric[:, others] @ metric[:, targets].transpose(1, 2)).argmax(2)
        one = torch.nn.functional.one_hot(onto, c).to(rest.dtype)
        mean = one.transpose(1, 2) @ rest[:, others] / one.sum(1).clamp(min=1)[..., None]
        return (torch.cat([kept, rest[:, targets] + mean], 1),)

    what = f"{cases.CLIP.label}, {PATCHES} keep {1 + d} + {c}"
    return step("VisionZip", what, _clip(settings.device), ours, eager, 12 * PATCHES * WIDTH)


def _aim_merge(settings: Settings) -> Case:
    frames, tokens, width = 32, 196, 3584

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, frames, tokens, width, device=settings.device),)

    def ours(x: Tensor) -> tuple[Tensor]:
        return (aim_merge.merge_rounds(x, (98, 49))[0],)

    def eager(x: Tensor) -> tuple[Tensor]:
        for r in (98, 49):
            x = _scatter(x, _pairs(x, r, cls=False), "mean")
        return (x,)

    flops = frames * 2 * width * (98 * 98 + 49 * 49)
    return step("AIMMerge", f"{frames} frames, {tokens} to 49", inputs, ours, eager, 4 * frames * width * (2 * 196 + 2 * 98 + 49), flops)


STEPS: dict[str, Any] = {
    "ToMe": _tome,
    "ToMeSD": _tomesd,
    "EViT": _evit,
    "Turbo": _turbo,
    "PiToMe": _pitome,
    "DiffRate": _diffrate,
    "ToFu": _tofu,
    "PruMerge": _prumerge,
    "PruMergePlus": lambda settings: _prumerge(settings, plus=True),
    "VisionZip": _visionzip,
    "AIMMerge": _aim_merge,
}
