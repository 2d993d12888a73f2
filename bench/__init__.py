"""Benchmarks of tokensieve: `python -m bench --help`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# This checkout's build is what is measured, and tests/reference is what outputs are compared with; neither has to be installed.
for folder in ("python", "tests"):
    if str(ROOT / folder) not in sys.path:
        sys.path.insert(0, str(ROOT / folder))
