"""Where tensors begin in memory, for C++: it would read past, or misread, what is not as it expects."""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """Where the numbers of a contiguous tensor on the CPU begin.

    Raises:
        ValueError: it is of another dtype or shape, not contiguous, or somewhere else.
    """
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"expected a contiguous {dtype} tensor {list(shape)} on the CPU; got "
            f"{'one that is not contiguous, ' if not tensor.is_contiguous() else ''}"
            f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor.data_ptr()


def address_if_any(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The same; None where there is no tensor."""
    return None if tensor is None else address(tensor, dtype, *shape)
