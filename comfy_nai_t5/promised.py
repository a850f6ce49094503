"""Tensors of a file that ComfyUI sees while it builds a model, and gets later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Promised(Tensor):
    """Shape and dtype of a tensor, without memory. What is copied from it stays as it is.

    So ComfyUI finds the names and shapes by which it knows a model, and never touches the memory of weights that are
    replaced when it has been built: such memory is none on most systems.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Promised:
        made: Promised = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device("meta"))
        return made

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Promised({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if operation is torch.ops.aten.copy_.default:
            return arguments[0]
        given = arguments[0]
        if operation in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default) and isinstance(given, cls):
            return cls(tuple(given.shape), given.dtype)
        raise NotImplementedError(
            f"{operation} of a tensor that is yet to be read: this ComfyUI looks into weights while it builds a model; "
            "choose weights=unpack"
        )
