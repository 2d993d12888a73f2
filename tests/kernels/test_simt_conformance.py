"""Every device wrapper and CUDA name in the emulator; the same source, csrc/testing/conformance.cu, is a program for a real GPU."""

from __future__ import annotations

from types import ModuleType


def test_conformance(scheduled: ModuleType) -> None:
    results = scheduled.conformance()
    assert len(results) >= 19
    assert [(name, detail) for name, passed, detail in results if not passed] == []
