"""Methods that rank patches by the vision encoder's CLS row. "Eager code" takes that row out of whole attention maps, as the authors do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from reference import ops as reference
from tokensieve import methods
from tokensieve.methods import damro, divprune, fastervlm, fopru, globalcom2, hired, vispruner, vtc_cls
from torch import Tensor

from .. import cases, checks, peers
from ..harness import Case, Inputs, Settings

CLIP, N = cases.CLIP, cases.CLIP.R


def row_of(name: str, what: str, parts: int, layers: int, k: int, make: Callable[[int], Inputs], fns: dict[str, Any], check: Any) -> Case:
    """A step on `layers` CLIP layers of `parts` images or crops that keeps k tokens in all."""
    return Case(
        op=name,
        case=f"prune step, {CLIP.label}, {what}",
        dtype="f32",
        inputs=make,
        ours=fns.pop("ours"),
        peers=fns,
        check=check,
        bytes=4 * (layers * parts * CLIP.Hkv * CLIP.N * CLIP.D + 2 * k * CLIP.C),
        flops=2 * layers * parts * CLIP.H * CLIP.N * CLIP.D,
        quick=True,
    )


def inputs_of(device: str, parts: int, layers: int) -> Callable[[int], Inputs]:
    """seed -> all queries and all keys of each layer, features."""

    def make(seed: int) -> Inputs:
        pairs = [cases.queries_keys(seed + 10 * layer, CLIP, parts, CLIP.N, device=device) for layer in range(layers)]
        return [q for q, _ in pairs], [k for _, k in pairs], cases.randn(seed + 2, parts, N, CLIP.C, device=device)

    return make


def true_scores(query: Tensor, key: Tensor) -> Tensor:
    return reference.attention_scores(query[:, :, :1], key, key_range=CLIP.image)[0]


def _smart(query: Tensor, key: Tensor) -> Tensor:
    return peers.few_row_scores(query[:, :, :1], key, CLIP.image)


def map_scores(query: Tensor, key: Tensor) -> Tensor:
    return peers.map_scores(query, key, CLIP.image, 0, causal=False)


def _fastervlm(settings: Settings) -> Case:
    k = methods.FasterVLM().tokens

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        return fastervlm.keep_patches(queries[0][:, :, :1], keys[0], features, k)[:2]

    def smart(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, ...]:
        index = peers.topk_sort(_smart(queries[0], keys[0]), k)
        return peers.rows(features, index), index

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        return peers.map_mask_prune(queries[0], keys[0], features, k)

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        slack = checks.score_tolerance(torch.float32, is_ours)
        want = true_scores(inputs[0][0], inputs[1][0])
        return checks.best(want, output[1], (0, N), k, slack) or checks.copies([inputs[2]], output[1], [output[0]])

    fns = {"ours": ours, "smart eager": smart, "eager code": eager}
    return row_of("FasterVLM", f"5 crops, {N} keep {k}", 5, 1, 5 * k, inputs_of(settings.device, 5, 1), fns, check)


def _vtc_cls(settings: Settings) -> Case:
    method = methods.VTCCLS()
    k, layers = method.tokens, len(method.layers(24, 22))

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        return vtc_cls.keep_patches([q[:, :, :1] for q in queries], keys, features, k)[:2]

    def smart(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, ...]:
        index = peers.topk_sort(sum(map(_smart, queries, keys)), k)  # type: ignore[arg-type]
        return peers.rows(features, index), index

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, ...]:
        index = sum(map(map_scores, queries, keys)).topk(k).indices.sort().values  # type: ignore[union-attr]
        return peers.rows(features, index), index

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        want = torch.stack([true_scores(q, key) for q, key in zip(inputs[0], inputs[1])]).sum(0)
        slack = checks.score_tolerance(torch.float32, is_ours)
        return checks.best(want, output[1], (0, N), k, slack) or checks.copies([inputs[2]], output[1], [output[0]])

    fns = {"ours": ours, "smart eager": smart, "eager code": eager}
    return row_of("VTCCLS", f"{layers} layers, {N} keep {k}", 1, layers, k, inputs_of(settings.device, 1, layers), fns, check)


def _hired(settings: Settings) -> Case:
    method, parts = methods.HiRED(), 5
    full, rest, mark = method.budgets(parts, N)

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        first = hired.cls_scores(queries[0][:1, :, :1], keys[0][:1])
        return first, hired.select(first, hired.cls_scores(queries[1][:, :, :1], keys[1]), method).index

    def by_part(first: Tensor, late: Tensor) -> Tensor:
        """The authors' loop: top-k of every part, with budgets read on the host."""
        found = torch.zeros(N, device=first.device).index_fill_(0, first[0].topk(mark).indices, 1.0).view(parts - 1, -1).sum(1)
        budgets = [full, *(found / found.sum() * rest).to(torch.int32).tolist()]
        index = torch.full((parts, max(full, rest)), -1, device=first.device)
        for p, n in enumerate(budgets):
            index[p, :n] = late[p].topk(n).indices.sort().values
        return index

    def smart(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        first = CLIP.H * _smart(queries[0][:1], keys[0][:1])
        return first, by_part(first, CLIP.H * _smart(queries[1], keys[1]))

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        first = CLIP.H * map_scores(queries[0], keys[0])[:1]
        return first, by_part(first, CLIP.H * map_scores(queries[1], keys[1]))

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        late, slack = true_scores(inputs[0][1], inputs[1][1]), checks.score_tolerance(torch.float32, is_ours)
        if problem := checks.near(output[0] / CLIP.H, true_scores(inputs[0][0][:1], inputs[1][0][:1]), slack):
            return problem
        want = by_part(output[0], late)
        for p in range(parts):
            kept = output[1][p : p + 1, : int((want[p] >= 0).sum())]
            if problem := checks.best(late[p : p + 1], kept, (0, N), kept.shape[1], slack):
                return f"part {p}: {problem}"
        return checks.equal(output[1] >= 0, want >= 0)

    fns = {"ours": ours, "smart eager": smart, "eager code": eager}
    return row_of("HiRED", f"5 crops, keep {full + rest} of {parts * N}", parts, 2, 0, inputs_of(settings.device, parts, 2), fns, check)


def _damro(settings: Settings) -> Case:
    method = methods.DAMRO()

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        return damro.negative_tokens(queries[0][:, :, :1], keys[0], features, method)[:2]

    def joined(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query[:, :, :1].transpose(1, 2).flatten(2)[:, None], key.transpose(1, 2).flatten(2)[:, None]

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, ...]:
        query, key = joined(queries[0], keys[0])
        index = torch.softmax(query @ key.transpose(2, 3) * query.shape[3] ** -0.5, -1)[:, 0, 0, 1:].topk(method.tokens).indices
        return peers.rows(features, index), index

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        want = reference.attention_scores(*joined(inputs[0][0], inputs[1][0]), key_range=CLIP.image)[0]
        slack = checks.score_tolerance(torch.float32, is_ours)
        return checks.best(want, output[1], (0, N), method.tokens, slack) or checks.copies([inputs[2]], output[1], [output[0]])

    case = f"5 crops, {method.tokens} of {N}, one head of {CLIP.C}"
    return row_of("DAMRO", case, 5, 1, 5 * method.tokens, inputs_of(settings.device, 5, 1), {"ours": ours, "eager code": eager}, check)


def _fopru(settings: Settings) -> Case:
    method = methods.FoPru()
    k = method.budget(N)

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        return fopru.keep_patches(queries[0], keys[0], features, method)[:2]

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, ...]:
        weights = torch.softmax(queries[0] @ keys[0].transpose(2, 3) * CLIP.D**-0.5, -1).mean(1)[:, 1:, 1:]
        given, received = weights.mean(2), weights.mean(1)
        chosen = received if received.var() >= given.var() else given
        index = peers.topk_sort(chosen, k)
        return peers.rows(features, index), index

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        want = reference.attention_scores(inputs[0][0][:, :, 1:], inputs[1][0], key_range=CLIP.image)[0]
        slack = checks.score_tolerance(torch.float32, is_ours)
        return checks.best(want, output[1], (0, N), k, slack) or checks.copies([inputs[2]], output[1], [output[0]])

    fns = {"ours": ours, "eager code": eager}
    case = row_of("FoPru", f"all rows, {N} keep {k}", 1, 1, k, inputs_of(settings.device, 1, 1), fns, check)
    return replace(case, flops=2 * CLIP.H * CLIP.N * CLIP.N * CLIP.D)


def _globalcom2(settings: Settings) -> Case:
    method, parts, size, grid, side = methods.GlobalCom2(), 5, (672, 640), (2, 2), (24, 24)

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> Tensor:
        return globalcom2.select(globalcom2.cls_logits(queries[0][:, :, :1], keys[0]), method, size, grid, side).crops

    def by_crop(scores: Tensor) -> Tensor:
        """The authors' loops: a sum over the patches of each cell on the host, then norms and top-k crop by crop."""
        shown, high = torch.zeros(4, N, dtype=torch.bool), 48 - 2 * ((48 - int(640 * (48 / 672))) // 2)
        picture = torch.nn.functional.interpolate(scores[:1].view(1, 1, 24, 24), size=(high, 48), mode="bilinear", align_corners=False)
        full = torch.nn.functional.pad(picture[0, 0], (0, 0, (48 - high) // 2, (48 - high) // 2), value=torch.nan)
        shared = full.view(2, 24, 2, 24).transpose(1, 2).reshape(4, N)
        shown, sums = shared == shared, [0.0] * 4
        for n, value in enumerate(scores[0].tolist()):
            sums[n // 24 // 12 * 2 + n % 24 // 12] += value
        share = torch.tensor(sums, dtype=torch.float64).div(method.temperature).softmax(0)
        index = torch.full((4, N), -1, device=scores.device)
        for c in range(4):
            there = shown[c].nonzero()[:, 0]
            own, above = scores[1 + c][there], shared[c][there]
            count = int(len(there) * min(1.0, method.ratio * (1 + float(share[c] - share.mean()))))
            index[c, :count] = there[(own / own.norm() + above / above.norm()).topk(count).indices].sort().values
        return index

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> Tensor:
        logits = (queries[0] * CLIP.D**-0.5) @ keys[0].transpose(2, 3)
        logits.softmax(-1)  # the patched layer makes both
        return by_crop(logits.mean(1)[:, 0, 1:])

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        query, key = inputs[0][0][:, :, :1].double(), inputs[1][0].double()
        want = by_crop((query @ key.transpose(2, 3)).mean(1)[:, 0, 1:].float() * CLIP.D**-0.5)
        width = min(want.shape[1], output.shape[1])
        differ = int((want[:, :width].cpu() != output[:, :width].cpu()).sum())
        return f"{differ} positions differ" if differ > (0 if is_ours else 8) else None  # a rounded score may swap two neighbours

    fns = {"ours": ours, "eager code": eager}
    return row_of("GlobalCom2", f"5 crops, {N} keep {method.ratio:.0%}", parts, 1, 0, inputs_of(settings.device, parts, 1), fns, check)


def _vispruner(settings: Settings) -> Case:
    method = methods.VisPruner()
    important, diverse = method.split()

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        return vispruner.keep_patches(queries[0][:, :, :1], keys[0], features, method)[:2]

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, ...]:
        order = map_scores(queries[0], keys[0])[0].argsort(descending=True)
        unit, rest = features[0] / features[0].norm(dim=-1, keepdim=True), order[important:]
        while len(rest) > diverse:
            drop = min(8, len(rest) - diverse)
            nearest = (unit[rest[0::2]] @ unit[rest[1::2]].T).amax(1)
            rest = torch.cat([rest[0::2][nearest.argsort(descending=True)[drop:]], rest[1::2]])
        mask = torch.zeros(1, N, dtype=torch.bool, device=features.device)
        mask[0, torch.cat([order[:important], rest])] = True
        return features[mask][None], mask.nonzero()[:, 1][None]

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        """The rounds hang on the last bit of a score, so sets differ: the attention part is compared, and how alike the diverse part is."""
        exact = eager([q.double() for q in inputs[0]], [k.double() for k in inputs[1]], inputs[2].double())[1]
        top = set(true_scores(inputs[0][0], inputs[1][0])[0].topk(important).indices.tolist())
        alike = []
        for index in (exact, output[1]):
            if len(top & set(index[0].tolist())) < important - 1 or len(set(index[0].tolist())) != method.tokens:
                return "the patches that CLS attends to most are not all kept"
            unit = torch.nn.functional.normalize(inputs[2][0, [n for n in index[0].tolist() if n not in top]].double(), dim=-1)
            alike.append(float((unit @ unit.T).fill_diagonal_(-1).amax(1).mean()))
        if abs(alike[0] - alike[1]) > 0.1 * alike[0]:
            return f"the diverse patches resemble each other by {alike[1]:.3f}, in float64 by {alike[0]:.3f}"
        return checks.copies([inputs[2]], output[1], [output[0]])

    fns = {"ours": ours, "eager code": eager}
    return row_of("VisPruner", f"{N} keep {method.tokens}", 1, 1, method.tokens, inputs_of(settings.device, 1, 1), fns, check)


def _divprune(settings: Settings) -> Case:
    k, C = methods.DivPrune().keep_count(N), 4096

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, 1, N, C, device=settings.device),)

    def ours(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return divprune.keep_diverse(tokens, k)

    def pick(tokens: Tensor, incremental: bool) -> Tensor:
        unit = tokens[0] / tokens[0].norm(dim=-1, keepdim=True)
        far = 1 - unit @ unit.T
        picks = [far.topk(2, dim=0, largest=False).values[1].argmax()]
        nearest = far[picks[0]]
        while len(picks) < k:
            nearest = torch.minimum(nearest, far[picks[-1]]) if incremental else far[torch.stack(picks)].amin(0)
            picks.append(nearest.argmax())
        return torch.stack(picks).sort().values[None]

    def smart(tokens: Tensor) -> tuple[Tensor, Tensor]:
        index = pick(tokens, True)
        return peers.rows(tokens, index), index

    def eager(tokens: Tensor) -> tuple[Tensor, Tensor]:
        index = pick(tokens, False)  # every pick reads the rows of all picks before it
        return peers.rows(tokens, index), index

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        wanted, got = set(pick(inputs[0].double(), True)[0].tolist()), set(output[1][0].tolist())
        if len(wanted & got) < k - 2:  # two distances that differ in the last bit may trade places
            return f"{len(wanted & got)} of {k} kept tokens are those of float64"
        return checks.copies([inputs[0]], output[1], [output[0]])

    return Case(
        op="DivPrune",
        case=f"{N} keep {k} x {C}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"smart eager": smart, "eager code": eager},
        check=check,
        bytes=4 * C * (N + 2 * k),
        flops=2 * N * N * C,
        quick=True,
    )


STEPS = {
    "FasterVLM": _fastervlm,
    "VTCCLS": _vtc_cls,
    "HiRED": _hired,
    "DAMRO": _damro,
    "FoPru": _fopru,
    "GlobalCom2": _globalcom2,
    "VisPruner": _vispruner,
    "DivPrune": _divprune,
}
