"""The picture of the demo: what each stage kept, above a choice of the same size that needs no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import viz
from ..methods import DecoderMethod
from .photo import centre_square, farthest_points, patch_descriptors

if TYPE_CHECKING:
    from PIL.Image import Image

    from .model import Subject

SHOWN = 480  # pixels of the shorter side while drawing: 20 a patch in a grid of 24


def view(photo: Image, subject: Subject) -> Image:
    """What the model saw of the photo, in drawing size: CLIP's centred square, or all of it for any-resolution models."""
    image_processor = getattr(subject.processor, "image_processor", None)
    if subject.processor is None or (getattr(image_processor, "do_center_crop", False) and not _any_resolution(subject)):
        return centre_square(photo, SHOWN)
    scale = SHOWN / min(photo.size)
    return photo.resize((max(SHOWN, round(photo.width * scale)), max(SHOWN, round(photo.height * scale))))


def _any_resolution(subject: Subject) -> bool:
    return getattr(subject.model.config, "image_grid_pinpoints", None) is not None


def draw(photo: Image, origin: str, subject: Subject, method: Any, run: Any) -> Image:
    """The whole page."""
    shown, total = view(photo, subject), subject.image_tokens
    vision = subject.model.config.vision_config
    side = vision.image_size // vision.patch_size
    chosen, plain = [], []
    order = farthest_points(patch_descriptors(shown.resize((14 * side, 14 * side)), (side, side)), side * side)
    for i, kept in enumerate(run.kept):
        count = len(kept[0][0])
        place = f"before layer {method.stages[i].layer}" if isinstance(method, DecoderMethod) else "before the decoder"
        share = f"{count / total:.1%} of the image tokens" + ("; shown: those of the crops" if _any_resolution(subject) else "")
        chosen.append(viz.Panel(run.overlay(shown, stage=i), f"{place}: {count} of {total}", share))
        patches = round(side * side * count / total)
        lit = viz.overlay(shown, order[:patches], (side, side))
        plain.append(viz.Panel(lit, f"{patches} of {side * side}", "the patches least like each other"))
    saw = viz.Panel(shown, "what the model sees", f"{total} image tokens in a prompt of {subject.length}")
    whole = viz.Panel(photo, "the photo", f"{origin}, {photo.width} x {photo.height}")
    weights = "random weights, so a random choice" if subject.random else subject.description
    rows = [
        (f"{method.title}: {weights}", [saw, *chosen]),
        ("Greedy max-min on patch descriptors: no weights, only colours and gradients", [whole, *plain]),
    ]
    footer = subject.description
    if subject.random:
        footer += "\nThe method's timings and mechanics are real; its choice of tokens is not, because the weights are random."
    return viz.sheet("tokensieve demo", rows, footer)
