"""The demo from end to end: photo, model, dense and pruned prefill, tables, picture."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .errors import DemoError
from .output import check_writable, save
from .photo import load_photo

if TYPE_CHECKING:
    from .model import Subject


@dataclass(frozen=True)
class Options:
    """What the command line gives."""

    image: Path | None
    method: str
    model: Path | None
    output: Path
    prompt: str
    seed: int
    layers: int
    hidden: int


@dataclass(frozen=True)
class Result:
    """What was measured: seconds of each prefill, the run's report and kept tokens, step times, answers of a checkpoint."""

    dense: list[float]
    pruned: list[float]
    run: Any
    steps: list[Any]
    answers: tuple[str, str] | None


def run(options: Options, console: Console) -> None:
    """Runs the demo, prints its tables and writes its picture.

    Raises:
        DemoError: an option that can't work; nothing was written.
    """
    method = make_method(options.method)
    photo, origin = load_photo(options.image)
    check_writable(options.output, options.image)
    with progress(total=11) as stage:
        stage("loading transformers")
        from . import model as models
        from . import picture, tables

        stage("building the model" if options.model is None else "loading the checkpoint")
        if options.model is None:
            subject = models.random_llava(photo, options.seed, options.layers, options.hidden)
        else:
            subject = models.checkpoint(options.model, photo, options.prompt)
        result = measure(subject, method, stage)
        stage("drawing")
        page = picture.draw(photo, origin, subject, method, result.run)
        save(page, options.output)
    tables.show(console, subject, method, result, origin)
    console.print(f"\nwrote {options.output} ({page.width} x {page.height})", markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr that names what goes on; plain lines where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: print(f"... {text}", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text, refresh=True)  # a stage may last less than a frame


def make_method(name: str) -> Any:
    """The method of that name with the paper's settings."""
    from ..methods import get_method

    try:
        return get_method(name)()
    except ValueError as error:
        raise DemoError(str(error).removeprefix("tokensieve.methods: ")) from None


def measure(subject: Subject, method: Any, stage: Callable[[str], None]) -> Result:
    """Prefills the prompt dense and pruned in turns, then times the prune steps alone."""
    from ..models import sieve
    from .eager import step_times

    dense: list[float] = []
    pruned: list[float] = []
    try:
        with torch.inference_mode():
            state: Any
            sieve(subject.model, method)  # raises at once where the method does not fit the model
            stage("warming up")
            first = prefill(subject)
            repeats = 3 if first < 4 else 2 if first < 10 else 1  # a slow machine or a large checkpoint: stay near half a minute
            for i in range(repeats):
                stage(f"dense prefill {i + 1} of {repeats}")
                dense.append(prefill(subject))
                stage(f"pruned prefill {i + 1} of {repeats}")
                with sieve(subject.model, method) as state:
                    pruned.append(prefill(subject))
    except (TypeError, ValueError) as error:
        if not str(error).startswith("tokensieve."):  # a bug, not a setting: its traceback is wanted
            raise
        raise DemoError(str(error).removeprefix("tokensieve.").removeprefix("sieve: ")) from None
    with torch.inference_mode():
        stage("the method's eager code")
        start = int((subject.inputs["input_ids"][0] == subject.model.config.image_token_id).int().argmax())
        steps = step_times(subject.model, method, start, subject.image_tokens, subject.length)
        answers = None
        if subject.processor is not None:
            stage("generating twice")
            dense_answer = answer(subject)
            with sieve(subject.model, method):
                answers = (dense_answer, answer(subject))
    return Result(dense, pruned, state, steps, answers)


def prefill(subject: Subject) -> float:
    """Seconds of one prefill, vision tower included, with a fresh cache and the logits of the last token."""
    device = subject.model.device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    subject.model(**subject.inputs, use_cache=True, logits_to_keep=1)
    wait()
    return time.perf_counter() - begin


def answer(subject: Subject, tokens: int = 32) -> str:
    """What a checkpoint says, greedily."""
    out = subject.model.generate(**subject.inputs, max_new_tokens=tokens, do_sample=False)
    return str(subject.processor.decode(out[0, subject.length :], skip_special_tokens=True)).strip()
