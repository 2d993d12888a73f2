"""The vision side of a sieve: what an encoder method reads and keeps, and how patches are packed into the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from ..methods.base import EncoderMethod
from ..methods.positions import to_device, token_mask
from ..methods.views import Attention, ImageView
from ..ops import _debug
from .capture import listen
from .drop import counted
from .layout import Run
from .support import Parts


@dataclass
class Choice:
    """What stays of the image tokens of a call."""

    marks: Tensor  # (B, S) bool
    keep: list[int]  # how many of each sample
    source: Tensor | None = None  # (B, S) int64, column whose token comes to each place; None = its own
    hidden: Tensor | None = None  # (B, S, C) with the tokens that the method made; None = unchanged


class VisionSieve:
    """Follows the vision tower: which patch is which image token, and which of them an encoder method keeps."""

    def __init__(self, parts: Parts, method: Any) -> None:
        self.parts, self.method = parts, method
        self.attention: dict[int, Attention] = {}  # of the encoder layers that are read, in the last vision call
        self.patches: Tensor | None = None  # (crops, N, C)
        self.projected: Tensor | None = None
        self.cls: Tensor | None = None
        self.packed: list[Tensor] = []  # any resolution: of each image, crop * N + patch of each token, -1 = newline
        self.crops: list[int] = []  # any resolution: crops of each image, thumbnail included
        self.sizes: list[tuple[int, int]] = []  # any resolution: (width, height) of each image
        self.images = 0  # of the last vision call
        self._original_pack: Any = None
        self.anyres = parts.anyres
        self.N, self.side = patches(parts), side(parts)  # tokens of a crop, and its (rows, columns); a config takes 3 us to read
        self.state: dict[str, Any] = {}
        self.promised: list[int] | None = None  # `keep_count` of every row of a call
        self.layers: tuple[int, ...] = ()
        self.places = False  # whether places in the prompt matter: the method reads or writes what is there
        if isinstance(method, EncoderMethod):
            depth = parts.multimodal.config.vision_config.num_hidden_layers if parts.multimodal is not None else 0
            _check_encoder(parts, method)
            self.places = method.ordered or method.scope == "stream" or type(method).replace is not EncoderMethod.replace
            self.layers = tuple(method.layers(depth, feature_layer(parts))) if method.scope != "stream" else ()
            beyond = [layer for layer in self.layers if not 0 <= layer < depth]
            if beyond:
                raise ValueError(
                    f"tokensieve.sieve: {type(method).__name__} reads encoder layers {beyond}, the encoder has layers 0..{depth - 1}"
                )

    def hooks(self) -> list[Any]:
        """Hooks on what the method reads."""
        method, handles = self.method, []
        if not isinstance(method, EncoderMethod):
            return []
        for index in self.layers:
            handles += listen(self.parts.vision.encoder.layers[index].self_attn, partial(self._captured, index), lambda: True)
        if "cls" in method.features:
            handles.append(self.parts.vision.encoder.layers[feature_layer(self.parts)].register_forward_hook(self._saw_cls))
        handles.append(self.parts.multimodal.multi_modal_projector.register_forward_hook(self._projected))
        return handles

    def attach(self) -> None:
        """Starts to follow how an any-resolution model packs its crops."""
        if self.anyres:
            self._original_pack = self.parts.multimodal.pack_image_features
            self.parts.multimodal.pack_image_features = self._pack

    def detach(self) -> None:
        """Undoes `attach`."""
        if self._original_pack is not None:
            del self.parts.multimodal.pack_image_features
            self._original_pack = None
        self.attention, self.patches, self.projected, self.cls = {}, None, None, None

    def _captured(self, layer: int, query: Tensor, key: Tensor) -> None:
        rows = query if self.method.rows == "all" else query[:, :, :1]
        self.attention[layer] = Attention(rows.detach(), key.detach())

    def _saw_cls(self, _module: Any, _args: Any, output: Any) -> None:
        self.cls = (output[0] if isinstance(output, tuple) else output)[:, 0]

    def _projected(self, _module: Any, args: Any, output: Tensor) -> None:
        self.images = output.shape[0]
        if "patches" in self.method.features:
            self.patches = args[0]
        if "projected" in self.method.features:
            self.projected = output

    def _pack(self, image_features: Any, image_sizes: Any, vision_feature_select_strategy: Any, image_newline: Any = None) -> Any:
        """The model's own packing, run a second time on patch numbers: no copy of its crop and padding arithmetic is needed here."""
        numbers = [torch.arange(1, f.shape[0] * f.shape[1] + 1).view(*f.shape[:2], 1) for f in image_features]
        newline = None if image_newline is None else torch.zeros(1, dtype=torch.long)
        packed, _ = self._original_pack(numbers, image_sizes, vision_feature_select_strategy, image_newline=newline)
        self.packed, self.crops = [ids.flatten() - 1 for ids in packed], [f.shape[0] for f in image_features]
        self.sizes = [(int(width), int(height)) for height, width in torch.as_tensor(image_sizes).tolist()]
        return self._original_pack(image_features, image_sizes, vision_feature_select_strategy, image_newline=image_newline)

    def image_lengths(self) -> list[int]:
        """Tokens of each image of the last vision call; one number for all where every image has as many."""
        return [len(ids) for ids in self.packed] if self.anyres else [self.N]

    def split_runs(self, runs: list[list[Run]]) -> list[list[Run]]:
        """(start, length) of every image of every sample; neighbours without text between them are told apart by the encoder's lengths."""
        lengths, image, result = self.image_lengths(), 0, []
        for sample in runs:
            split = []
            for start, n in sample:
                while n > 0:
                    length = lengths[image % len(lengths)]
                    split.append((start, length))
                    start, n, image = start + length, n - length, image + 1
            result.append(split)
        return result

    def choose(self, image_mask: Tensor, counts: list[int], hidden: Tensor, state: dict[str, Any]) -> Choice:
        """What the encoder method keeps.

        Args:
            image_mask: (B, S) bool, image tokens; counts: how many each sample has; hidden: (B, S, C) what enters the decoder.
            state: the method's own, in every view of the prompt.
        """
        self.state, self.promised = state, self._row_counts()
        if self.images == 0:
            raise ValueError(f"tokensieve.sieve: {type(self.method).__name__} needs the images: pass pixel_values, got a prompt without")
        lengths = self.image_lengths() if self.anyres else self.image_lengths() * self.images
        repeats, rest = divmod(sum(counts), sum(lengths))
        if rest or repeats == 0:
            raise ValueError(f"tokensieve.sieve: the prompts must hold the images' {sum(lengths)} tokens, got {sum(counts)} placeholders")
        mask = image_mask[::repeats]  # beams and several returned sequences repeat each sample
        place = torch.nonzero_static(mask.flatten(), size=sum(lengths))[:, 0] if self.places else mask  # in the flattened prompt
        stream = self._select_stream if self.method.scope == "stream" else self._select_patches
        flags, order, made = stream(lengths, hidden[::repeats].flatten(0, 1), place)
        kept = self._kept(flags, lengths)
        budget, image = [], 0
        for count in counts[::repeats]:
            total = 0
            while count > 0:
                count, total, image = count - lengths[image], total + kept[image], image + 1
            budget += [total] * repeats
        marks = torch.zeros_like(mask).masked_scatter(mask, flags).repeat_interleave(repeats, 0)
        choice = Choice(marks, budget)
        if order is not None:
            columns = torch.arange(mask.numel(), device=mask.device).index_copy(0, place, place[order]).view(mask.shape)
            choice.source = (columns % mask.shape[1]).repeat_interleave(repeats, 0)
        if made is not None:
            changed = hidden[::repeats].flatten(0, 1).index_copy(0, place, made.to(hidden.dtype)).view(*mask.shape, -1)
            choice.hidden = changed.repeat_interleave(repeats, 0)
        return choice

    def _kept(self, flags: Tensor, lengths: list[int]) -> list[int]:
        """Tokens kept of each image."""
        promised = self.promised
        if promised is not None and self.anyres and self.method.scope != "stream":
            rows, promised, first = promised, [], 0
            for ids, n in zip(self.packed, self.crops):
                newlines = int((ids < 0).sum()) if self.method.keep_newlines else 0
                promised.append(sum(rows[first : first + n]) + newlines)
                first += n
        if promised is not None and flags.device.type != "cpu" and not _debug.enabled:
            return promised
        if len(set(lengths)) == 1:
            marks = flags.view(len(lengths), -1)
        else:
            marks = torch.nn.utils.rnn.pad_sequence(list(flags.split(lengths)), batch_first=True)
        return counted(self.method, marks, promised, "images")

    def _row_counts(self) -> list[int] | None:
        """`keep_count` of every row."""
        if self.method.scope == "stream":
            candidates = self.image_lengths() if self.anyres else self.image_lengths() * self.images
        elif self.anyres:
            candidates = self._present().sum(1).tolist()
        else:
            candidates = [self.N] * self.images
        counts = [self.method.keep_count(n) for n in candidates]
        return None if None in counts else counts

    def _numbers(self) -> Tensor:
        """(T,) on the host, crop * N + patch of every image token of the call, crops counted over all images; -1 = newline."""
        N = self.N
        if not self.anyres:
            return torch.arange(self.images * N)
        order, first = [], 0
        for ids, n in zip(self.packed, self.crops):
            order.append(torch.where(ids >= 0, ids + first * N, -1))
            first += n
        return torch.cat(order)

    def _present(self) -> Tensor:
        """(crops, N) bool on the host, patches that reach the language model."""
        N, ids = self.N, self._numbers()
        present = torch.zeros(self.images * N, dtype=torch.bool)
        present[ids[ids >= 0]] = True
        return present.view(-1, N)

    def _select_patches(self, lengths: list[int], hidden: Tensor, place: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scopes "crop" and "image": (flags, order, made) over the image tokens of the call; see `_select_stream`."""
        N, rows, method = self.N, self.promised, self.method
        candidates = to_device(self._present(), place.device) if self.anyres else None
        by_image = method.scope == "image"
        sizes = (self.crops if self.anyres else [1] * self.images) if by_image else [self.images]
        indices, made, first = [], [], 0
        for image, n in enumerate(sizes):
            view = self._view(slice(first, first + n), candidates, rows, image if by_image and self.anyres else None)
            index, new = _ask(method, view, N)
            if index is None:
                return torch.ones(sum(lengths), dtype=torch.bool, device=place.device), None, None
            indices.append(index)
            made.append(_spread(new, index, N))
            first += n
        chosen = _joined([token_mask(index, N) for index in indices]).flatten()
        if not self.anyres and not self.places:
            return chosen, None, None
        where = to_device(self._numbers(), place.device)  # once a prompt; the packing itself reads image sizes on the host
        safe = where.clamp(min=0)
        chosen = chosen[safe] & (where >= 0)
        order = None
        if method.ordered:
            row = torch.where(where < 0, self.images + torch.arange(len(where), device=where.device), safe // N)
            rank = _joined([_rank(index, N) for index in indices]).flatten()
            order = _order(row, rank[safe].where(chosen, N), N)
        parts = [m for m in made if m is not None]
        values = None
        if parts:
            old = hidden[place]
            values = torch.where(chosen[:, None], _joined(parts).flatten(0, 1)[safe].to(old.dtype), old)
        if method.keep_newlines:
            chosen = chosen | (where < 0)
        return chosen, order, values

    def _select_stream(self, lengths: list[int], hidden: Tensor, place: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scope "stream".

        Returns:
            flags (T,) bool, the image tokens of the call that stay; order (T,) int64, which token comes to each one's place, or None; made
            (T, C), tokens that the method made beside those that it did not, or None.
        """
        tokens, first = hidden[place], 0
        flags, rank, made = [], [], []
        for length, group in groupby(lengths):  # images with equally many tokens in one call
            n = len(list(group))
            part = tokens[first : first + n * length].view(n, length, -1)
            count = self.method.keep_count(length)
            view = ImageView(projected=part, counts=None if count is None else [count] * n, side=self.side, state=self.state)
            index, new = _ask(self.method, view, length)
            if index is None:
                return torch.ones_like(place, dtype=torch.bool), None, None
            flags.append(token_mask(index, length).flatten())
            rank.append(_rank(index, length).flatten())
            spread = _spread(new, index, length)
            made.append(part.flatten(0, 1) if spread is None else spread.flatten(0, 1))
            first += n * length
        chosen = torch.cat(flags)
        order = None
        if self.method.ordered:
            row = to_device(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), place.device)
            order = _order(row, torch.cat(rank).where(chosen, max(lengths)), max(lengths))
        changed = type(self.method).replace is not EncoderMethod.replace
        return chosen, order, torch.where(chosen[:, None], torch.cat(made).to(tokens.dtype), tokens) if changed else None

    def _view(self, rows: slice, candidates: Tensor | None, counts: list[int] | None, image: int | None) -> ImageView:
        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        grid = None
        if image is not None and self.crops[image] > 1:
            config, (width, height) = self.parts.multimodal.config, self.sizes[image]
            high, wide = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)
            grid = (wide, high)
        return ImageView(
            layers=tuple(Attention(self.attention[i].query[rows], self.attention[i].key[rows]) for i in self.layers),
            patches=cut(self.patches),
            projected=cut(self.projected),
            cls=cut(self.cls),
            candidates=cut(candidates),
            counts=None if counts is None else counts[rows],
            grid=grid,
            side=self.side,
            image_size=None if image is None else self.sizes[image],
            project=self.parts.multimodal.multi_modal_projector.forward,
            state=self.state,
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ask(method: EncoderMethod, view: ImageView, N: int) -> tuple[Any, Tensor | None]:
    """The patches that stay, of N a row, None = all, and what they become."""
    with torch.no_grad():
        index = method.select(view)
    if index is not None and (index.device.type == "cpu" or _debug.enabled) and index.numel() and int(index.max()) >= N:
        raise ValueError(f"tokensieve.sieve: {type(method).__name__}'s select must give positions below {N}, got {int(index.max())}")
    return index, None if index is None else method.replace(view, index)


def _rank(index: Tensor, N: int) -> Tensor:
    """(R, N) int64, place of each patch in its row of `index`; N where it is not there."""
    rank = torch.full((index.shape[0], N + 1), N, device=index.device)
    return rank.scatter_(1, torch.where(index < 0, N, index), torch.arange(index.shape[1], device=index.device).expand_as(index))[:, :N]


def _spread(new: Tensor | None, index: Tensor, N: int) -> Tensor | None:
    """(R, T, C) features of the patches in `index` -> (R, N, C), zero where there is none."""
    if new is None:
        return None
    base = new.new_zeros(new.shape[0], N + 1, new.shape[2])
    return base.scatter(1, torch.where(index < 0, N, index)[..., None].expand_as(new), new)[:, :N]


def _order(row: Tensor, rank: Tensor, dropped: int) -> Tensor:
    """(T,) int64: which token comes to the place of each, so that the kept ones of a row (rank < dropped) follow their rank."""
    width = len(row) + 1  # more than any rank
    places = (row * width * 2 + (rank >= dropped) * width).argsort(stable=True)
    return torch.empty_like(places).scatter_(0, places, (row * width * 2 + rank).argsort(stable=True))


def side(parts: Parts) -> tuple[int, int]:
    """(rows, columns) of patches in an image or crop."""
    if parts.multimodal is None:
        return 0, 0
    config = parts.multimodal.config.vision_config
    return (config.image_size // config.patch_size,) * 2


def patches(parts: Parts) -> int:
    """Tokens that one image of a fixed-resolution model, or one crop, becomes."""
    if parts.multimodal is None:
        return 0
    (rows, columns), config = side(parts), parts.multimodal.config
    has_cls = not config.vision_config.model_type.startswith("siglip")
    return rows * columns + has_cls - (config.vision_feature_select_strategy == "default")


def feature_layer(parts: Parts) -> int:
    """Index of the encoder layer whose output becomes the image features."""
    wanted = parts.multimodal.config.vision_feature_layer
    state = wanted if isinstance(wanted, int) else wanted[-1]
    depth = parts.multimodal.config.vision_config.num_hidden_layers
    return (state if state >= 0 else depth + 1 + state) - 1


def _check_encoder(parts: Parts, method: EncoderMethod) -> None:
    name = type(method).__name__
    if parts.multimodal is None:
        raise TypeError(
            f"tokensieve.sieve: {name} works on the vision encoder: model must be a LlavaForConditionalGeneration or a "
            f"LlavaNextForConditionalGeneration, got {type(parts.model).__name__}"
        )
    config = parts.multimodal.config
    if method.scope == "stream" or not (method.features or method.layers(config.vision_config.num_hidden_layers, feature_layer(parts))):
        return  # reads nothing inside the encoder
    kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if kind != "clip_vision_model" or strategy != "default" or feature_layer(parts) < 0:
        raise TypeError(
            f"tokensieve.sieve: {name} needs a CLIP vision tower whose CLS token is cut off (strategy 'default'), got {kind!r} with "
            f"strategy {strategy!r} and feature layer {config.vision_feature_layer}"
        )
