"""Triton's interpreter at a half of its time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """It puts its own in the place of triton.language at each call of each function, and takes it
    away again. Where nothing is compiled in the process it may stay."""
    from triton.runtime import interpreter

    patch_lang, patched = interpreter._patch_lang, set()

    def once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch_lang(function)
        return SimpleNamespace(restore=lambda: None)

    patch.setattr(interpreter, "_patch_lang", once)
