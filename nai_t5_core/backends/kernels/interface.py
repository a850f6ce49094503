"""What kernels.h declares, for Python."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from nai_t5_core.backends.kernels.build import library
from nai_t5_core.backends.kernels.sets import InstructionSet


class Beside(ctypes.Structure):
    _fields_ = (
        ("scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("outer", ctypes.c_void_p),
        ("in_row", ctypes.c_int64),
        ("offset", ctypes.c_float),
        ("across_bits", ctypes.c_int),
        ("down_bits", ctypes.c_int),
        ("outer_bits", ctypes.c_int),
    )


class Piece(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("unit", ctypes.c_float),
        ("format", ctypes.c_int),
        ("turned", ctypes.c_int),
        ("beside", Beside),
    )


class Matrix(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        # Keeps the array that it points to.
        ("pieces", ctypes.POINTER(Piece)),
        ("piece_count", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("is_gated", ctypes.c_int),
        ("kind", ctypes.c_int),
    )


class BlockWeights(ctypes.Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("o", Matrix),
        ("inner", Matrix),
        ("wo", Matrix),
        ("heads", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("activation", ctypes.c_int),
    )


class Bias(ctypes.Structure):
    _fields_ = (
        ("documents", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("table_reach", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


_POINTER, _INDEX, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "t5_threads": (_INT, []),
    "t5_has_own_threads": (_INT, []),
    "t5_set_threads": (None, [_INT]),
    "t5_panel_steps": (_INDEX, [_POINTER]),
    "t5_to_panels": (None, [_POINTER, _POINTER]),
    "t5_from_panels": (None, [_POINTER, _POINTER]),
    "t5_normed_product": (_INT, [_POINTER, _INDEX, _POINTER, _FLOAT, _POINTER, _INT, _POINTER]),
    "t5_added_product": (_INT, [_POINTER, _INDEX, _POINTER, _POINTER]),
    "t5_product": (_INT, [_POINTER, _INDEX, _POINTER, _POINTER]),
    "t5_attention": (_INT, [_POINTER, _INDEX, _INDEX, _INDEX, _POINTER, _INT, _POINTER]),
    "t5_block": (_INT, [_POINTER, _POINTER, _INDEX, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER]),
    "t5_multiply_in_registers": (_INDEX, [_INT, _INDEX]),
}


def kernels(instructions: InstructionSet) -> ctypes.CDLL:
    """The compiled kernels of a set as functions, with as many threads as torch has.

    See :func:`nai_t5_core.backends.kernels.build.library`.
    """
    loaded, has_own_threads = _loaded(instructions)
    if has_own_threads:
        loaded.t5_set_threads(torch.get_num_threads())
    return loaded


@lru_cache
def _loaded(instructions: InstructionSet) -> tuple[ctypes.CDLL, bool]:
    loaded = library(instructions)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded, bool(loaded.t5_has_own_threads())
