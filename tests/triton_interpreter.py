"""Triton's interpreter at a half of its time, and with a fused multiply-add."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
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


def patch_fma(patch: pytest.MonkeyPatch) -> None:
    """It rounds the product of float32 before it adds; a GPU rounds once. In float64 the product
    is exact, and rounding the sum once more is next to nothing."""
    from triton.runtime import interpreter

    create_fma = interpreter.InterpreterBuilder.create_fma

    def fused(builder, x, y, z):
        if z.data.dtype != np.float32:
            return create_fma(builder, x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
