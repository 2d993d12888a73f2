"""The command line: `tokensieve` and `python -m tokensieve`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line, or says in one line how to install what it needs."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tokensieve"):
            raise
        sys.exit(
            f"tokensieve: the command line needs {error.name}: pip install 'tokensieve[cli]' "
            "(without it, `python -m tokensieve.info` says what loaded)"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
