"""viz: what the pictures show, pixel by pixel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image
from tokensieve import viz


def brightness(image: Image.Image, patch: int, columns: int, size: int) -> float:
    """Mean of the inner pixels of a patch."""
    x, y = patch % columns * size, patch // columns * size
    inner = image.convert("L").crop((x + 2, y + 2, x + size - 2, y + size - 2))
    return sum(inner.tobytes()) / len(inner.tobytes())


def photo(columns: int, rows: int, size: int) -> Image.Image:
    return Image.effect_noise((columns * size, rows * size), 40).convert("RGB")


def test_overlay_lights_kept_patches_and_darkens_the_others() -> None:
    image, kept = photo(6, 4, 20), [0, 7, 8, 23]
    before = image.tobytes()
    out = viz.overlay(image, kept, (4, 6))
    assert out.size == image.size
    assert out.mode == "RGB"
    assert image.tobytes() == before, "the input must not change"
    for patch in range(24):
        dense, got = (brightness(x, patch, 6, 20) for x in (image, out))
        assert got == pytest.approx(dense) if patch in kept else got < 0.5 * dense, patch


def test_overlay_draws_the_border_inside_the_kept_patches() -> None:
    out = viz.overlay(Image.new("RGB", (60, 60), "white"), [4], (3, 3))
    assert out.getpixel((20, 30)) == viz.EDGE
    assert out.getpixel((30, 30)) == (255, 255, 255)
    assert out.getpixel((19, 30)) == out.getpixel((5, 5))


def test_overlay_patches_of_one_pixel_have_no_border() -> None:
    out = viz.overlay(Image.new("RGB", (3, 2), "white"), [5], (2, 3))
    assert out.getpixel((2, 1)) == (255, 255, 255)
    assert max(out.getpixel((0, 0))) < 128


@pytest.mark.parametrize("kept", [[], torch.empty(0, dtype=torch.int64), [-1, -1]], ids=["list", "tensor", "pads"])
def test_overlay_nothing_kept_darkens_everything(kept: Any) -> None:
    out = viz.overlay(Image.new("RGB", (40, 40), "white"), kept, (2, 2))
    assert len(set(out.get_flattened_data() if hasattr(out, "get_flattened_data") else out.getdata())) == 1


def test_overlay_everything_kept_keeps_every_inner_pixel() -> None:
    image = photo(2, 2, 10)
    out = viz.overlay(image, torch.arange(4), (2, 2))
    assert out.crop((1, 1, 19, 19)).tobytes() == image.crop((1, 1, 19, 19)).tobytes()


def test_overlay_skips_pads_and_takes_any_order_and_integer_type() -> None:
    image = photo(3, 3, 12)
    expected = viz.overlay(image, [2, 5], (3, 3)).tobytes()
    assert viz.overlay(image, torch.tensor([5, 2, -1, 2], dtype=torch.int32), (3, 3)).tobytes() == expected
    assert viz.overlay(image, (5, 2), (3, 3)).tobytes() == expected


def test_overlay_takes_grey_and_transparent_images_of_uneven_size() -> None:
    for mode in ("L", "RGBA", "P"):
        assert viz.overlay(Image.new(mode, (101, 67)), [0], (4, 5)).size == (101, 67)


@pytest.mark.parametrize(
    ("kept", "grid", "error", "message"),
    [
        ([9], (3, 3), ValueError, r"kept must be in \[0, 9\) for a grid of 3 x 3, got 9"),
        ([-2], (3, 3), ValueError, "got -2"),
        (torch.zeros(1, 2, dtype=torch.int64), (3, 3), ValueError, r"kept must be \(K,\).* got shape \(1, 2\)"),
        (torch.zeros(2), (3, 3), TypeError, "ints.*float32"),
        (torch.ones(9, dtype=torch.bool), (3, 3), TypeError, "ints.*bool"),
        ([0.5], (3, 3), TypeError, "ints"),
        ([0], (0, 3), ValueError, "at least one row"),
        ([0], (3, 99), ValueError, r"not be finer than the image of 30 x 30 pixels, got \(3, 99\)"),
        ([0], (3.0, 3), TypeError, "pair"),
        ([0], (3,), TypeError, "pair"),
    ],
)
def test_overlay_errors_say_what_is_wrong(kept: Any, grid: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^tokensieve.viz.overlay: .*{message}"):
        viz.overlay(photo(3, 3, 10), kept, grid)


def test_sheet_places_panels_and_keeps_text_inside() -> None:
    panel = viz.Panel(Image.new("RGB", (50, 50), (200, 0, 0)), "a very long title " * 20, "a very long note " * 20)
    page = viz.sheet("heading " * 99, [("row", [panel, panel]), ("row", [panel])], "foot\nfoot", panel=200)
    assert page.width == 3 * 24 + 2 * 200
    assert page.getpixel((24 + 100, 72 + 44 + 100)) == (200, 0, 0)
    margin = page.crop((page.width - 20, 0, page.width, page.height))
    assert len(margin.getcolors()) == 1, "text ran over the edge"
    between = page.crop((24 + 201, 72 + 44, 2 * 24 + 199, page.height - 60))
    assert len(between.getcolors()) == 1, "text ran into the next panel"


def test_sheet_keeps_the_shape_of_a_wide_photo() -> None:
    page = viz.sheet("h", [("r", [viz.Panel(Image.new("RGB", (200, 100), (0, 200, 0)), "t")])], panel=200)
    assert page.getpixel((24 + 100, 72 + 44 + 100)) == (0, 200, 0)
    assert page.getpixel((24 + 100, 72 + 44 + 10)) == viz.PAPER


@pytest.mark.parametrize("image", [None, "x.png", torch.zeros(3, 8, 8)])
def test_overlay_and_groups_of_what_is_no_picture(image: Any) -> None:
    for call, numbers in ((viz.overlay, [0]), (viz.groups, [0, 0])):
        with pytest.raises(TypeError, match=rf"viz.{call.__name__}: image must be a PIL.Image.Image, got {type(image).__name__}"):
            call(image, numbers, (1, 2))


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 1)])
def test_sheet_of_a_line_of_one_pixel(size: tuple[int, int]) -> None:
    page = viz.sheet("", [("", [viz.Panel(Image.new("RGB", size, "white"), "")])], panel=100)
    assert page.getpixel((24 + 49, 72 + 44 + 49)) == (255, 255, 255)


def test_sheet_without_panels_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        viz.sheet("h", [("r", [])])


def test_groups_show_the_mean_colour_of_merged_patches_and_leave_single_ones_alone() -> None:
    image = photo(4, 3, 20)
    before = image.tobytes()
    labels = [0, 0, 1, -1, 0, 2, 2, -1, 3, 4, 5, 2]  # 0: three patches, 2: three, of which one is apart; -1: dropped
    out = viz.groups(image, labels, (3, 4))
    assert out.size == image.size
    assert image.tobytes() == before
    inner = [(patch % 4 * 20 + 2, patch // 4 * 20 + 2, patch % 4 * 20 + 18, patch // 4 * 20 + 18) for patch in range(12)]
    for group in ([0, 1, 4], [5, 6, 11]):
        pixels = torch.cat(
            [
                torch.tensor(list(image.crop((x - 2, y - 2, x + 18, y + 18)).get_flattened_data()))
                for x, y, *_ in map(inner.__getitem__, group)
            ]
        )
        mean = tuple(pixels.double().mean(0).round().int().tolist())
        for patch in group:
            assert set(out.crop(inner[patch]).get_flattened_data()) == {mean}
    for single in (2, 8, 9, 10):
        assert out.crop(inner[single]).tobytes() == image.crop(inner[single]).tobytes()
    for dropped in (3, 7):
        assert brightness(out, dropped, 4, 20) < 0.4 * brightness(image, dropped, 4, 20)
    assert out.getpixel((40, 10)) == viz.EDGE  # between group 0 and patch 2
    assert out.getpixel((20, 10)) != viz.EDGE  # inside group 0
    assert out.getpixel((60, 10)) != viz.EDGE  # between a single and a dropped patch


def test_groups_covers_an_image_that_the_grid_does_not_divide() -> None:
    out = viz.groups(Image.new("L", (37, 23), 200), torch.zeros(15, dtype=torch.int32), (3, 5))
    assert out.size == (37, 23)
    assert set(out.get_flattened_data()) == {(200, 200, 200)}


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0] * 8, ValueError, r"groups: labels must be \(9,\) for a grid of 3 x 3, got 8"),
        ([0.5] * 9, TypeError, "groups: labels must hold patch numbers"),
        (torch.zeros(3, 3, dtype=torch.int64), ValueError, r"groups: labels must be \(K,\)"),
    ],
)
def test_groups_errors_say_what_is_wrong(labels: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        viz.groups(photo(3, 3, 10), labels, (3, 3))
