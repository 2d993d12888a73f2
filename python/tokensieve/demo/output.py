"""Writing the picture so that a stopped or failed run leaves the old file, or none, but never half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DemoError

if TYPE_CHECKING:
    from PIL.Image import Image


def _part(output: Path) -> Path:
    """A name of this process beside the output: os.replace is atomic only within one file system."""
    return output.with_name(f".{output.name}.{os.getpid()}.part")


def check_writable(output: Path, photo: Path | None = None) -> None:
    """Tries the folder before the work starts, not after.

    Raises:
        DemoError: not a PNG name, a folder of that name, no such folder, the photo itself, or no permission.
    """
    if output.suffix.lower() != ".png":
        raise DemoError(f"--output {output}: the picture is a PNG, so its name must end in .png")
    try:
        if output.is_dir():
            raise DemoError(f"--output {output}: is a folder")
        if not output.parent.is_dir():
            raise DemoError(f"--output {output}: there is no folder {output.parent}")
        if photo is not None and output.exists() and output.samefile(photo):
            raise DemoError(f"--output {output}: is the photo itself, which would be overwritten")
        with _part(output).open("xb"):
            pass
    except OSError as error:
        raise DemoError(f"--output {output}: can't write to {output.parent} ({error.strerror})") from None
    finally:
        _remove(_part(output))


def save(picture: Image, output: Path) -> None:
    """Writes a PNG in one step: the file is whole or is not there.

    Raises:
        DemoError: the disk is full, or the folder has become read-only.
    """
    part = _part(output)
    try:
        with part.open("xb") as file:
            picture.save(file, format="PNG")
        os.replace(part, output)
    except OSError as error:
        raise DemoError(f"--output {output}: can't write it ({error.strerror or error})") from None
    finally:
        _remove(part)  # nothing to remove once it was moved; also on Ctrl-C


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that can't be written to holds no part either
        path.unlink(missing_ok=True)
