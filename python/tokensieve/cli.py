"""The commands of `tokensieve`: info, demo, methods, bench. Needs typer and rich (the [cli] extra)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    name="tokensieve",
    help="Fused kernels for visual-token reduction, and the published methods on top of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def fail(message: str, code: int = 2) -> typer.Exit:
    """One line on stderr and an exit code, no traceback."""
    print(f"tokensieve: {message}", file=sys.stderr)
    return typer.Exit(code)


def _console() -> Console:
    """At least 80 columns, also in a narrower terminal: it wraps lines, where a narrower table would cut its numbers."""
    console = Console(highlight=False)
    console.width = max(console.width, 80)
    return console


@app.command()
def info() -> None:
    """Say what loaded, built by what, for which machines, and why a library did not load."""
    from .info import lines

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a long path goes on in the next line
    for name, text in lines():
        table.add_row(f"[bold]{name}[/]", escape(text))
    _console().print(table)


@app.command()
def methods() -> None:
    """List the methods: name, paper, where it hooks, what it does."""
    from .info import method_rows

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 1, 0))
    for heading in ("method", "paper", "tokens leave", "what it does"):
        table.add_column(heading, no_wrap=heading in ("method", "paper"), min_width=12, overflow="fold")
    for row in method_rows():
        table.add_row(*row)
    _console().print(table)


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="The photo. Default: one that scikit-learn ships.")] = None,
    method: Annotated[str, typer.Option(help="A method's name; `tokensieve methods` lists them.")] = "PyramidDrop",
    model: Annotated[Path | None, typer.Option(help="A local checkpoint folder of a LLaVA model. Default: small random weights.")] = None,
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("demo.png"),
    prompt: Annotated[str, typer.Option(help="The question to a checkpoint.")] = "What is shown in this photo?",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random weights and the random question.")] = 0,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers of the random model.")] = 32,
    hidden: Annotated[int, typer.Option(min=64, help="Width of the random model's decoder.")] = 512,
) -> None:
    """Prune a photo end to end: a table of tokens, FLOPs and seconds, and a picture of what was kept."""
    from .demo.errors import DemoError

    try:
        from .demo.run import Options, run

        run(Options(image, method, model, output, prompt, seed, layers, hidden), _console())
    except DemoError as error:
        raise fail(str(error)) from None
    except ImportError as error:
        raise fail(f"the demo needs more packages: pip install 'tokensieve[cli]' ({error})") from None
    except KeyboardInterrupt:
        raise fail(f"stopped; {output} was not written", 130) from None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout; all arguments go to `python -m bench`."""
    from ._load import FOLDER

    root = FOLDER.parent.parent
    if not (root / "bench" / "__main__.py").exists():
        raise fail("the benchmarks are not in the wheel: clone the repository and run `make bench` there", 1)
    try:
        code = subprocess.run([sys.executable, "-m", "bench", *context.args], cwd=root).returncode
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)
