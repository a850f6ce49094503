"""Where tensors begin in memory, for C++: it would read past, or misread, what is not as it expects."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor, dtype: torch.dtype, *shape: int, anywhere: bool = False) -> int:
    """Where the numbers of a contiguous tensor on the CPU begin.

    Args:
        anywhere: C++ reads it as bytes: it may begin within a number, as tensors in a file may.

    Raises:
        ValueError: it is of another dtype or shape, not contiguous, somewhere else, or begins within a number.
    """
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"expected a contiguous {dtype} tensor {list(shape)} on the CPU; got "
            f"{'one that is not contiguous, ' if not tensor.is_contiguous() else ''}"
            f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    place = tensor.data_ptr()
    if place % dtype.itemsize and not anywhere:
        raise ValueError(f"a {dtype} tensor begins at an address that does not divide by {dtype.itemsize}; clone it")
    return place


def sizes(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns.

    Raises:
        ValueError: it has another number of dimensions.
    """
    if tensor.ndim != 2:
        raise ValueError(f"expected a tensor of 2 dimensions; got {list(tensor.shape)}")
    rows, columns = tensor.shape
    return rows, columns


def address_if_any(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The same; None where there is no tensor."""
    return None if tensor is None else address(tensor, dtype, *shape)
