"""What a batch may be: ids of the vocabulary, and masks of two, three or four dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class OutsideVocabularyError(ValueError):
    """An id has no row in the embedding table."""


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises an OutsideVocabularyError for an id outside the vocabulary."""
    # On another device the check would wait for the device, and a compiled graph cannot contain it: in these cases the
    # embedding's own assertion reports the id.
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise OutsideVocabularyError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size} tokens "
                "(ids start at 0); the tokenizer belongs to another model"
            )


def moved(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device; a copy from the host to a CUDA device is not waited for."""
    is_plain = values.numel() > 0 and not values.requires_grad and not torch.compiler.is_compiling()
    if values.device.type == "cpu" and device.type == "cuda" and is_plain:
        values = values.pin_memory()
    return values.to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def moved_together(values: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of whole numbers, of any shapes, on a device: those that are not there go in one copy."""
    if len(values) < 2 or all(tensor.device == device for tensor in values):
        return [moved(tensor, device) for tensor in values]
    joined = moved(torch.cat([tensor.flatten() for tensor in values]), device)
    parts = joined.split([tensor.numel() for tensor in values])
    return [part.view(tensor.shape) for part, tensor in zip(parts, values, strict=True)]


def for_every_query(mask: Tensor, batch: int, length: int) -> Tensor:
    """A mask [batch, length] of keys, expanded to [batch, 1, length, length]; masks of other shapes as they are.

    With it one compiled graph serves every mask: packing reads the values of a [batch, length] mask to find the
    documents, which ends a graph.
    """
    if mask.shape != (batch, length):  # the caller handles or refuses it
        return mask
    return (mask != 0)[:, None, None].expand(batch, 1, length, length)


def dense_mask(mask: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """A 3- or 4-dim mask as bool [batch, 1 or heads, length, length]."""
    full = (batch, heads, length, length)
    if mask.ndim in (3, 4) and mask.is_floating_point():
        raise ValueError(
            f"the {mask.ndim}-dim mask has dtype {mask.dtype}; masks of 3 and 4 dimensions must be bool or integer, "
            "non-zero where a query may see a key"
        )
    if mask.ndim == 3 and mask.shape == (batch, length, length):
        mask = mask[:, None]
    elif mask.ndim != 4 or any(size not in (1, limit) for size, limit in zip(mask.shape, full, strict=True)):
        raise ValueError(
            f"the mask has shape {list(mask.shape)}; allowed: {[batch, length]}, {[batch, length, length]}, "
            f"or broadcastable to {list(full)}"
        )
    return (mask != 0).expand(batch, mask.shape[1], length, length)
