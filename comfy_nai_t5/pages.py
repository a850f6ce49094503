"""Weights that newer ComfyUI's dynamic memory holds, side by side, so that several are one matrix.

Dynamic memory gives every weight an address in one reserved range, puts pages of the card's memory there when the
weight is used, and may take them back at any time. Here the weights of a group, such as q, k and v, get addresses one
behind the other. They stay weights of ComfyUI's own modules: it reads each from its file, patches it, counts its pages
and frees them. While all of a group are there, they are one matrix: one look at their pages, and one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A weight's place in dynamic memory: the reserved range, an address in it, and bytes.
Place = tuple[Any, int, int]

# ComfyUI gives weights whole multiples of this many bytes, and what takes less than this is not streamed.
_UNIT = 1024
_LEAST = 16 * 1024


def can_lie_side_by_side(linears: Sequence[Any]) -> bool:
    """Whether nothing would lie between the weights of these modules, so that they can be one matrix."""
    if any(linear.weight is None or linear.weight.nbytes <= _LEAST for linear in linears):
        return False
    return not any(_bytes(linear) % _UNIT for linear in linears) and len({_dtype(linear) for linear in linears}) == 1


def lie_side_by_side(linears: Sequence[Any]) -> bool:
    """Whether the weights of these modules lie so in dynamic memory."""
    first = _place(linears[0])
    if first is None or not can_lie_side_by_side(linears):
        return False
    memory, address, _ = first
    for linear in linears:
        if _place(linear) != (memory, address, _bytes(linear)):
            return False
        address += _bytes(linear)
    return True


def lay_side_by_side(patcher: Any, groups: Iterable[Sequence[Any]]) -> None:
    """Gives the weights of each group of modules addresses one behind the other, before a model is loaded.

    Where other weights of the model have addresses, from an encode by ComfyUI's own modules, all are given anew, since
    the range is as large as the card's memory and no larger. What was loaded is then loaded once more.

    Args:
        patcher: ComfyUI's, of a model in its dynamic memory.
        groups: those of which some :func:`can_lie_side_by_side` are seen to.
    """
    groups = [group for group in groups if _is_to_be_moved(group) and can_lie_side_by_side(group)]
    model = patcher.model
    if not groups or len(model.dynamic_vbars) > 1:
        return  # nothing to do, or addresses on a second card, which only ComfyUI knows
    memory = patcher._vbar_get(create=True)
    if memory is None:
        return
    for module in model.modules():
        if _place(module) is not None:
            del module._v
            module._v_signature = None
    memory.offset = 0
    for group in groups:
        _, address, _ = memory.alloc(sum(map(_bytes, group)))
        for linear in group:
            linear._v, linear._v_signature = (memory, address, _bytes(linear)), None
            address += _bytes(linear)


def _is_to_be_moved(linears: Sequence[Any]) -> bool:
    """Where only some have an address, ComfyUI keeps the others elsewhere, for a LoRA that changes their size."""
    have_one = {_place(linear) is not None for linear in linears}
    return len(have_one) == 1 and not lie_side_by_side(linears)


class JointPages:
    """The products with a group of weights that lie side by side.

    Args:
        linears: modules of which :func:`lie_side_by_side` holds.
        device: the card.
    """

    def __init__(self, linears: Sequence[Any], device: torch.device) -> None:
        self.linears, self.device = tuple(linears), device
        self._places = [linear._v for linear in linears]
        memory, address, _ = self._places[0]
        self._place: Place = (memory, address, sum(size for *_, size in self._places))
        # The joined weights, and as what ComfyUI and its memory knew them when they were last found to be there.
        self._matrix: Tensor | None = None
        self._known: list[Any] = []
        self._signature: Any = None

    def is_of(self, linears: Sequence[Any], device: torch.device) -> bool:
        """Whether these are the modules, and lie where they lay."""
        return (
            len(linears) == len(self.linears)
            and all(map(_is, linears, self.linears))
            and all(map(_is, (_place(linear) for linear in linears), self._places))
            and device == self.device
        )

    def __call__(self, *inputs: Tensor) -> Tensor:
        """[tokens, in] to [tokens, out]: the results side by side.

        Args:
            inputs: the one of all weights, or one for each.
        """
        from comfy_aimdo import model_vbar

        pins: list[Place] = []
        try:
            matrix = self._pinned(pins)
            if matrix is not None:
                return _product(matrix.to(inputs[0].dtype), inputs)
        finally:
            for place in pins:
                model_vbar.vbar_unpin(place)
        # ComfyUI brings each weight in by itself, to its place if there is room.
        return one_after_the_other(self.linears, inputs)

    def _pinned(self, pins: list[Place]) -> Tensor | None:
        """The joined weights, on the card until ``pins`` are unpinned; None where not all are there as they should."""
        from comfy_aimdo import model_vbar

        loaded = [getattr(linear, "_v_signature", None) for linear in self.linears]
        if any(signature is None for signature in loaded):
            return None
        signature = _fault(self._place, pins)
        if signature is None:
            return None
        is_known = len(self._known) == len(loaded) and all(map(_is, loaded, self._known))
        if is_known and model_vbar.vbar_signature_compare(signature, self._signature):
            return self._matrix
        if not all(_is_there(linear, pins) for linear in self.linears):
            return None
        self._known, self._signature, self._matrix = loaded, signature, self._joined()
        return self._matrix

    def _joined(self) -> Tensor:
        from comfy_aimdo.torch import aimdo_to_tensor

        rows = sum(len(linear.weight) for linear in self.linears)
        together: Tensor = aimdo_to_tensor(self._place, self.device)
        return together.view(_dtype(self.linears[0])).view(rows, -1)


def one_after_the_other(linears: Sequence[Any], inputs: Sequence[Tensor]) -> Tensor:
    """What :class:`JointPages` computes, by calling each module."""
    each = inputs if len(inputs) > 1 else (*inputs,) * len(linears)
    return torch.cat([linear(x) for linear, x in zip(linears, each, strict=True)], dim=-1)


def _product(matrix: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    if all(x is inputs[0] for x in inputs):
        return F.linear(inputs[0], matrix)
    parts = matrix.chunk(len(inputs))
    return torch.cat([F.linear(x, part) for x, part in zip(inputs, parts, strict=True)], dim=-1)


def _fault(place: Place, pins: list[Place]) -> Any:
    """Brings the pages of a place in, and adds it to what is to be unpinned; None where there is no room.

    Pages are kept on the card until each fault that found them has had its unpin. Before comfy-aimdo 0.3.0 a single
    unpin gave back what several had found, so that all wait for the end of the product.
    """
    from comfy_aimdo import model_vbar

    signature = model_vbar.vbar_fault(place)
    if signature is not None:
        pins.append(place)
    return signature


def _is_there(linear: Any, pins: list[Place]) -> bool:
    from comfy_aimdo import model_vbar

    return bool(model_vbar.vbar_signature_compare(_fault(linear._v, pins), linear._v_signature))


def _is(one: Any, other: Any) -> bool:
    return one is other


def _place(module: nn.Module) -> Place | None:
    place: Place | None = vars(module).get("_v")
    return place


def _dtype(linear: Any) -> torch.dtype:
    """What ComfyUI keeps a weight in on the card."""
    dtype: torch.dtype = getattr(linear, "weight_comfy_model_dtype", None) or linear.weight.dtype
    return dtype


def _bytes(linear: Any) -> int:
    return int(linear.weight.numel()) * _dtype(linear).itemsize
