"""Modules of a ComfyUI T5 whose weights stay quantised, as they lie in their file.

ComfyUI counts, moves, patches and merges them as all others. What it finds there as a weight are bytes, of which
``convert_weight`` makes numbers; patches are added to these in every call (see :mod:`comfy_nai_t5.live_patches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.kinds import QuantisedWeight
from nai_t5_core.backends.quantised.single import KernelProduct
from nai_t5_core.model.precision import is_finite

# Changes numbers [rows, columns] in float32, perhaps in place.
Change = Callable[[Tensor], Tensor]


class Quantised(comfy.ops.CastWeightBiasOp, nn.Module):
    """What projections and tables have in common.

    Attributes:
        weight_function: changes of the numbers that belong to the loaded model. The name is ComfyUI's.
        hooked: further changes, of the hooks that are in force now.
    """

    # Tells ComfyUI that the weight may stay where it is, and comes to the input for a call.
    comfy_cast_weights = True
    weight: Tensor

    def __init__(self, weight: QuantisedWeight) -> None:
        nn.Module.__init__(self)
        self.kind, self.numbers_shape = weight.kind, weight.shape
        self.part_names, self.read_rows = tuple(weight.parts), weight.read_rows
        for name, part in weight.parts.items():
            self.register_buffer(name, part)
        self.register_parameter("bias", None)
        self.weight_function: list[Change] = []
        self.bias_function: list[Change] = []
        self.hooked: list[Change] = []

    @property
    def quantised(self) -> QuantisedWeight:
        parts = {name: getattr(self, name) for name in self.part_names}
        return QuantisedWeight(self.kind, self.numbers_shape, parts, self.read_rows)

    @property
    def form(self) -> QuantisedForm:
        """The rows as the file has them."""
        return QuantisedForm(self.quantised)

    @property
    def changes(self) -> list[Change]:
        """All changes of the numbers, in their order."""
        return [*self.weight_function, *self.hooked]

    def unchanged(self, device: torch.device) -> Tensor:
        """The numbers [rows, columns] in float32, as the file has them: the caller's own."""
        return self.quantised.to(device).plain()

    def numbers(self, device: torch.device) -> Tensor:
        """The numbers [rows, columns] in float32, with all changes."""
        numbers = self.unchanged(device)
        for change in self.changes:
            numbers = change(numbers)
        return numbers

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """For ComfyUI, where it merges models: the unchanged numbers, on the device of the bytes that it gives."""
        return self.unchanged(weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantised:
        """Moves the parts; whatever would cast numbers finds bytes."""
        for name, part in self.quantised.moved(fn).parts.items():
            self._buffers[name] = part
        return self


class QuantisedLinear(Quantised, nn.Linear):
    """A projection: our CPU kernels read the bytes, or of a few rows at a time numbers are made; of all, where they are
    changed.
    """

    def __init__(self, weight: QuantisedWeight) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.product = KernelProduct()

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] to […, out_features], on the device of ``x``."""
        if self.changes or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.numbers(x.device).to(x.dtype))
        form = self.form
        product = self.product(x, (form,))
        return form(x) if product is None else product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantised:
        self.product.forget()
        return super()._apply(fn, recurse)


class QuantisedEmbedding(Quantised, nn.Embedding):
    """A table: of the rows that are asked for numbers are made; of all, where they are changed."""

    def __init__(self, weight: QuantisedWeight) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Ids of any shape to [..., embedding_dim] on their device; the table stays where it is, unless it changes."""
        place = ids.device if self.changes else self.quantised.device
        flat = ids.reshape(-1).to(place).long()
        rows = self.numbers(place)[flat] if self.changes else self.quantised.rows(flat)
        return rows.to(out_dtype or torch.float32).to(ids.device).reshape(*ids.shape, -1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind.name}"


def quantised_modules(model: nn.Module) -> Iterator[tuple[str, Quantised]]:
    """The modules whose weights stay quantised, by their paths."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Quantised))


def stays_quantised(model: nn.Module) -> bool:
    """Whether a model has weights that stay quantised."""
    return next(quantised_modules(model), None) is not None


def unpacked_state(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a model for a file: quantised ones with all changes, in float16 where that holds them."""
    state = dict(state)
    for path, module in quantised_modules(model):
        for name in module.part_names:
            state.pop(f"{path}.{name}", None)
        numbers = module.numbers(torch.device("cpu"))
        half = numbers.half()
        state[f"{path}.weight"] = half if is_finite(half) else numbers
    return state
