"""The photo: loading, the square that the model sees, and a choice of patches that needs no weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import DemoError

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_photo(path: Path | None) -> tuple[Image, str]:
    """The photo and where it is from: a file, or the one that scikit-learn ships.

    Raises:
        DemoError: no such file, a folder, or a file that is not a readable image.
    """
    from PIL import Image, UnidentifiedImageError

    if path is None:
        try:
            from sklearn.datasets import load_sample_image
        except ModuleNotFoundError:
            message = "scikit-learn, which holds the default photo, is not installed: give --image PATH, or pip install 'tokensieve[cli]'"
            raise DemoError(message) from None
        return Image.fromarray(load_sample_image("china.jpg")), "china.jpg of scikit-learn"
    try:
        with Image.open(path) as file:
            return _upright_rgb(file), path.name  # reads the pixels: a cut-off file fails here
    except FileNotFoundError:
        raise DemoError(f"--image {path}: no such file") from None
    except IsADirectoryError:
        raise DemoError(f"--image {path}: is a folder, not an image file") from None
    except UnidentifiedImageError:
        raise DemoError(f"--image {path}: not an image that pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DemoError(f"--image {path}: can't be read as an image ({error})") from None


def _upright_rgb(image: Image) -> Image:
    """The photo as a viewer shows it: turned as its EXIF tag says, 16-bit grey scaled to 8 bits (convert would clip it to white)."""
    from PIL import ImageOps

    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return ImageOps.exif_transpose(image).convert("RGB")


def centre_square(photo: Image, side: int) -> Image:
    """The largest centred square at side x side pixels: what CLIP's processor shows to the model."""
    from PIL import Image

    short = min(photo.size)
    left, top = (photo.width - short) // 2, (photo.height - short) // 2
    return photo.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)


def pixels(image: Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def clip_pixels(square: Image) -> Tensor:
    """(1, 3, H, W) float32, normalised as CLIP wants it."""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return ((pixels(square) - mean) / std)[None]


def patch_descriptors(square: Image, grid: tuple[int, int]) -> Tensor:
    """What a patch looks like, without any learned weight.

    Args:
        square: image whose sides are multiples of the grid.
        grid: (rows, columns) of patches.

    Returns:
        (rows * columns, 8) float32: mean colour (3), spread of brightness, mean absolute gradient along x and y, mean absolute gradient
        along both diagonals; every column with zero mean and unit variance.

    Example:
        >>> from PIL import Image
        >>> patch_descriptors(Image.effect_noise((32, 32), 50), (4, 4)).shape
        torch.Size([16, 8])
    """
    rows, columns = grid
    image = pixels(square)
    height, width = image.shape[1] // rows, image.shape[2] // columns
    grey = torch.nn.functional.pad(image.mean(0)[None, None], (0, 1, 0, 1), mode="replicate")[0, 0]
    here, right, below, across = grey[:-1, :-1], grey[:-1, 1:], grey[1:, :-1], grey[1:, 1:]
    maps = [right - here, below - here, across - here, right - below]
    planes = torch.cat([image, here[None], torch.stack(maps).abs()])[:, : rows * height, : columns * width]
    patches = planes.view(8, rows, height, columns, width).permute(1, 3, 0, 2, 4).reshape(rows * columns, 8, -1)
    table = patches.mean(-1)
    table[:, 3] = patches[:, 3].std(-1)
    return (table - table.mean(0)) / table.std(0).clamp(min=1e-6)


def farthest_points(x: Tensor, k: int) -> Tensor:
    """Greedy max-min: start at the row farthest from the mean, then always take the row farthest from all taken ones.

    Args:
        x: (N, C) float descriptors.
        k: rows to take, 0 <= k <= N.

    Returns:
        (k,) int64 in the order taken, so its first j are the answer for j. Ties go to the lowest row.

    Source: farthest-point sampling, Gonzalez 1985; as a token choice DivPrune (arXiv 2503.02175).

    Example:
        >>> farthest_points(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), 3)
        tensor([3, 0, 2])
    """
    if not 0 <= k <= len(x):
        raise ValueError(f"tokensieve.demo.farthest_points: k must be in [0, N={len(x)}], got {k}")
    taken = torch.empty(k, dtype=torch.int64)
    distance = (x - x.mean(0)).square().sum(1)
    for i in range(k):
        taken[i] = distance.argmax()
        to_new = (x - x[taken[i]]).square().sum(1)
        distance = to_new if i == 0 else torch.minimum(distance, to_new)
        distance[taken[: i + 1]] = -1.0  # equal rows exist: a taken one must not come again
    return taken
