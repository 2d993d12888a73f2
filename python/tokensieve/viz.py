"""Pictures of what was kept: pure functions from an image and a list of patches to an image. Needs pillow (the [cli] extra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

DIM = 0.22  # share of the brightness that a dropped patch keeps: dark enough to read the choice at 20 pixels a patch
EDGE = (255, 209, 102)  # the line between kept and dropped patches
BACKGROUND, PAPER, INK, FAINT = (18, 20, 24), (30, 33, 39), (236, 238, 242), (150, 156, 166)


def overlay(image: Image, kept: Sequence[int] | Tensor, grid: tuple[int, int]) -> Image:
    """The image with the kept patches lit and all others dark.

    Args:
        image: any size and mode; it is not changed. It must show what the model saw (the crop, not the photo around it).
        kept: patch numbers in raster order (row * columns + column), each in [0, rows * columns); the -1 of padded rows is skipped.
            A 1-D integer tensor or a sequence of ints; order and repeats don't matter.
        grid: (rows, columns) of patches.

    Returns:
        An RGB image of the same size.

    Raises:
        TypeError: image is no picture, or kept or grid hold no integers.
        ValueError: a patch outside the grid, a grid without patches or finer than the pixels.

    Deterministic; reads kept on the host.

    Example:
        >>> from PIL import Image
        >>> picture = overlay(Image.new("RGB", (8, 4), "white"), [1], (1, 2))
        >>> picture.getpixel((1, 1)) < picture.getpixel((6, 1))
        True
    """
    from PIL import Image as Images

    rows, columns = _grid(grid, image, "overlay")
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[_patches(kept, rows, columns)] = True
    lit = Images.frombytes("L", (columns, rows), bytes((mask * 255).to(torch.uint8).tolist()))
    lit = lit.resize(image.size, Images.Resampling.NEAREST)
    photo = image.convert("RGB")
    dark = Images.blend(Images.new("RGB", photo.size, BACKGROUND), photo.convert("L").convert("RGB"), DIM)
    picture = Images.composite(photo, dark, lit)
    if min(image.height // rows, image.width // columns) >= 6:  # on smaller patches a line would hide the patch
        _outline(picture, lit)
    return picture


def groups(image: Image, labels: Sequence[int] | Tensor, grid: tuple[int, int]) -> Image:
    """The image with every group of merged patches in its mean colour and a line around it.

    Args:
        image: any size and mode; it is not changed. It must show what the model saw.
        labels: the group of each patch in raster order, one number for each of rows * columns; -1 = dropped. A (N,) integer tensor or a
            sequence of ints. A patch alone in its group stays as it is, dropped ones go dark.
        grid: (rows, columns) of patches.

    Returns:
        An RGB image of the same size. A group whose patches don't touch shows as several areas of one colour.

    Raises:
        TypeError: image is no picture, or labels or grid hold no integers.
        ValueError: a number of labels that is not the grid's, a grid without patches or finer than the pixels.

    Deterministic; reads labels on the host.

    Example:
        >>> from PIL import Image
        >>> half = Image.new("RGB", (8, 4), "white")
        >>> half.paste("black", (0, 0, 4, 4))
        >>> groups(half, [0, 0], (1, 2)).getpixel((1, 1)), groups(half, [0, 1], (1, 2)).getpixel((1, 1))
        ((128, 128, 128), (0, 0, 0))
    """
    from PIL import Image as Images

    rows, columns = _grid(grid, image, "groups")
    numbers = _integers(labels, "labels", "groups").to("cpu", torch.int64)
    if len(numbers) != rows * columns:
        raise ValueError(f"tokensieve.viz.groups: labels must be ({rows * columns},) for a grid of {rows} x {columns}, got {len(numbers)}")
    photo = image.convert("RGB")
    dark = Images.blend(Images.new("RGB", photo.size, BACKGROUND), photo.convert("L").convert("RGB"), DIM)
    row = (torch.arange(image.height) * rows).div(image.height, rounding_mode="floor")
    column = (torch.arange(image.width) * columns).div(image.width, rounding_mode="floor")
    patch = row[:, None] * columns + column  # of each pixel
    label = numbers[patch]
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).to(torch.float64)
    unique, members = numbers.clamp(min=-1).unique(return_inverse=True)
    group, count = members[patch].flatten(), len(unique)
    total = torch.zeros(count, 3, dtype=torch.float64).index_add_(0, group, pixels.flatten(0, 1))
    mean = total / torch.bincount(group, minlength=count).clamp(min=1)[:, None]
    several = (torch.bincount(members, minlength=count) > 1)[members][patch] & (label >= 0)
    shade = torch.frombuffer(bytearray(dark.tobytes()), dtype=torch.uint8).view_as(pixels).to(torch.float64)
    out = torch.where(several[..., None], mean[group].view_as(pixels), pixels)
    out = torch.where((label < 0)[..., None], shade, out)
    if min(image.height // rows, image.width // columns) >= 6:  # on smaller patches a line would hide the patch
        line = torch.zeros_like(several)
        line[:, 1:] |= (label[:, 1:] != label[:, :-1]) & (several[:, 1:] | several[:, :-1])
        line[1:] |= (label[1:] != label[:-1]) & (several[1:] | several[:-1])
        out = torch.where(line[..., None], torch.tensor(EDGE, dtype=torch.float64), out)
    return Images.frombytes("RGB", photo.size, bytes(out.round().to(torch.uint8).flatten().tolist()))


def _grid(grid: tuple[int, int], image: Image, caller: str) -> tuple[int, int]:
    from PIL import Image as Images

    if not isinstance(image, Images.Image):
        raise TypeError(f"tokensieve.viz.{caller}: image must be a PIL.Image.Image, got {type(image).__name__}")
    if len(grid) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in grid):
        raise TypeError(f"tokensieve.viz.{caller}: grid must be a pair (rows, columns) of ints, got {grid!r}")
    if min(grid) < 1:
        raise ValueError(f"tokensieve.viz.{caller}: grid must have at least one row and one column, got {grid}")
    if grid[0] > image.height or grid[1] > image.width:
        raise ValueError(
            f"tokensieve.viz.{caller}: grid must not be finer than the image of {image.height} x {image.width} pixels, got {grid}"
        )
    return grid


def _patches(kept: Sequence[int] | Tensor, rows: int, columns: int) -> Tensor:
    """kept as a checked (K,) tensor without pads."""
    numbers = _integers(kept, "kept", "overlay").to("cpu", torch.int64)
    wrong = numbers[(numbers < -1) | (numbers >= rows * columns)]
    if len(wrong):
        raise ValueError(
            f"tokensieve.viz.overlay: kept must be in [0, {rows * columns}) for a grid of {rows} x {columns}, got {int(wrong[0])}"
        )
    return numbers[numbers >= 0]


def _integers(values: Sequence[int] | Tensor, name: str, caller: str) -> Tensor:
    """values as a (K,) integer tensor."""
    numbers = values if isinstance(values, Tensor) else torch.tensor(list(values) or [], dtype=None if len(values) else torch.int64)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise TypeError(f"tokensieve.viz.{caller}: {name} must hold patch numbers (ints), got {numbers.dtype}")
    if numbers.dim() != 1:
        raise ValueError(f"tokensieve.viz.{caller}: {name} must be (K,), one image's patches, got shape {tuple(numbers.shape)}")
    return numbers


def _outline(picture: Image, lit: Image) -> None:
    """Draws the border between lit and dark patches, one pixel wide, inside the lit side."""
    from PIL import Image as Images
    from PIL import ImageChops, ImageFilter

    inner = lit.filter(ImageFilter.MinFilter(3))
    picture.paste(Images.new("RGB", picture.size, EDGE), mask=ImageChops.subtract(lit, inner))


class Panel(NamedTuple):
    """One picture of a sheet with a title and a line below it."""

    image: Image
    title: str
    note: str = ""


def sheet(heading: str, rows: Sequence[tuple[str, Sequence[Panel]]], footer: str = "", panel: int = 384) -> Image:
    """Rows of titled panels on one dark page.

    Args:
        heading: first line of the page.
        rows: (row title, panels) from top to bottom; every panel is fitted into a square of `panel` pixels.
        footer: small lines at the bottom, split at newlines.
        panel: side of a panel in pixels.

    Returns:
        An RGB image as wide as the longest row. Text that would not fit is cut with an ellipsis.

    Raises:
        ValueError: no panel at all.

    Example:
        >>> from PIL import Image
        >>> sheet("two greys", [("row", [Panel(Image.new("RGB", (9, 9)), "a"), Panel(Image.new("RGB", (9, 9)), "b")])]).width
        840
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    if not any(panels for _, panels in rows):
        raise ValueError("tokensieve.viz.sheet: rows must hold at least one panel, got none")
    gap, top, caption, title = 24, 72, 60, 44
    width = gap + max(len(panels) for _, panels in rows) * (panel + gap)
    notes = footer.splitlines()
    height = top + len(rows) * (title + panel + caption) + 24 * len(notes) + gap
    page = Images.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(page)
    _text(draw, (gap, 22), heading, 28, INK, width - 2 * gap)
    y = top
    for row_title, panels in rows:
        _text(draw, (gap, y + 10), row_title, 20, EDGE, width - 2 * gap)
        for i, (picture, name, note) in enumerate(panels):
            x = gap + i * (panel + gap)
            scale = panel / max(picture.size)
            wide, high = (max(1, round(side * scale)) for side in picture.size)  # a line of one pixel stays a line
            fitted = picture.convert("RGB").resize((wide, high), Images.Resampling.LANCZOS)
            page.paste(PAPER, (x, y + title, x + panel, y + title + panel))
            page.paste(fitted, (x + (panel - wide) // 2, y + title + (panel - high) // 2))
            _text(draw, (x, y + title + panel + 8), name, 19, INK, panel)
            _text(draw, (x, y + title + panel + 33), note, 15, FAINT, panel)
        y += title + panel + caption
    for i, line in enumerate(notes):
        _text(draw, (gap, y + 8 + 24 * i), line, 15, FAINT, width - 2 * gap)
    return page


def _text(draw: ImageDraw, at: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], room: int) -> None:
    """Writes one line, cut to `room` pixels."""
    from PIL import ImageFont as Fonts

    font: FreeTypeFont | ImageFont = Fonts.load_default(size)
    if draw.textlength(text, font=font) > room:
        while text and draw.textlength(text + "...", font=font) > room:
            text = text[:-1]
        text += "..."
    draw.text(at, text, font=font, fill=colour)
