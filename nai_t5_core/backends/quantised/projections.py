"""Projections and tables whose weights stay quantised, as they lie in their file.

A projection makes numbers of a few rows at a time and multiplies by them; a table, of the rows that are asked for. So
memory holds the bytes of the file and little beside them, whatever the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.backends.held import HeldLinear
from nai_t5_core.backends.quantised.kinds import QuantisedWeight, Rows
from nai_t5_core.model.fixed_weights import FixedWeights
from nai_t5_core.model.layers import residual_dtype


@dataclass(frozen=True)
class QuantisedForm:
    """Rows of a projection: a quantised weight, times what is multiplied into the weight where it is unpacked.

    So a projection is to the bit what it would be of the unpacked weight.

    Attributes:
        weight: [out_features, in_features].
        columns: the weight of the norm before it [in_features] float32, which a fused model has in its projections.
        scale: the power of two that keeps float16 in range.
        in_8_bits: whether it was quantised here, and is no longer the weight that was given.
    """

    weight: QuantisedWeight
    columns: Tensor | None = None
    scale: float = 1.0
    in_8_bits: bool = False

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def rows(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """Some rows [rows, in_features]; the product is taken in float32 and rounded once."""
        values = self.weight.rows(rows)
        precision = residual_dtype(dtype)
        if self.columns is not None:
            values = values.to(precision).mul_((self.columns * self.scale).to(values.device, precision))
        elif self.scale != 1:
            values = values.to(precision).mul_(self.scale)
        return values.to(dtype)

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [out_features, in_features]."""
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        for rows in self.weight.slices():
            out[rows] = self.rows(rows, dtype)
        return out

    def __call__(self, x: Tensor) -> Tensor:
        """[…, in_features] to […, out_features] in the same dtype, on the device of ``x``."""
        here = self.to(x.device)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for rows in here.weight.slices():
            out[..., rows] = F.linear(x, here.rows(rows, x.dtype))
        return out

    def lies(self) -> Tensor:
        """[out_features, in_features] float32."""
        return self.plain(torch.float32)

    def to(self, device: torch.device) -> QuantisedForm:
        """On another device."""
        return self if device == self.weight.device else self._with(self.weight.to(device))

    def moved(self, move: Callable[[Tensor], Tensor]) -> QuantisedForm:
        """With its bytes moved; what is multiplied into them goes along and keeps its dtype."""
        return self._with(self.weight.moved(move))

    def _with(self, weight: QuantisedWeight) -> QuantisedForm:
        return replace(self, weight=weight, columns=None if self.columns is None else self.columns.to(weight.device))

    def __str__(self) -> str:
        return self.weight.kind.name


class QuantisedLinear(HeldLinear):
    """A projection whose weight stays quantised. It may be moved, and computes in the dtype of its input.

    Where it is called on another device than its weight's, the bytes are copied for the call.
    """

    forms: tuple[QuantisedForm, ...]
    tells: Tensor

    def __init__(self, forms: Sequence[QuantisedForm], dtype: torch.dtype) -> None:
        """``dtype`` is what the model computes in, and what :meth:`plain` gives."""
        super().__init__(forms)
        # A buffer, since it is moved and cast with the model.
        tells = torch.empty((), dtype=dtype, device=forms[0].weight.device)
        self.register_buffer("tells", tells, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] to […, out_features]; gradients of ``x`` are recorded."""
        if self._torch_is_needed(x):
            return F.linear(x, self._joined(x.dtype).to(x.device))
        products = [form(x) for form in self.forms]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def plain(self) -> Tensor:
        """The weight [out_features, in_features] in the dtype that the model computes in."""
        return self._joined(self.tells.dtype)

    def plain_weight(self, like: Tensor) -> Tensor:
        """See :func:`nai_t5_core.model.plain_twin.plain_weight`; the exact weight, which float16 may not hold."""
        return self._joined(residual_dtype(like.dtype))

    def _joined(self, dtype: torch.dtype) -> Tensor:
        weights = [form.plain(dtype) for form in self.forms]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def multiply_rows(self, factor: float, first_row: int) -> None:
        """Multiplies the rows from one on, which is the first of a form; the bytes stay what they are."""
        row, forms = 0, []
        for form in self.forms:
            forms.append(form if row < first_row else replace(form, scale=form.scale * factor))
            row += form.out_features
        self.forms = tuple(forms)

    def refuse_change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Nothing: the bytes can be on every device, and every dtype is made of them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        super()._apply(fn, recurse)
        self.forms = tuple(form.moved(fn) for form in self.forms)
        return self


class QuantisedEmbedding(FixedWeights):
    """A table of embeddings that stays quantised: of the rows that are asked for, numbers are made.

    Args:
        form: the table, with its scale.
        dtype: what the rows are made in.
    """

    tells: Tensor
    added: Tensor

    def __init__(self, form: QuantisedForm, dtype: torch.dtype) -> None:
        super().__init__(None)
        self.form = form
        self.embedding_dim = form.in_features
        device = form.weight.device
        self.register_buffer("tells", torch.full((), torch.nan, dtype=dtype, device=device), persistent=False)
        self.register_buffer("added", torch.empty(0, self.embedding_dim, dtype=dtype, device=device), persistent=False)

    @property
    def num_embeddings(self) -> int:
        return self.form.out_features + len(self.added)

    @property
    def weight(self) -> Tensor:
        """Tells shape, dtype and device of the table; its numbers are NaN, so that nobody takes them for real."""
        return self.tells.expand(self.num_embeddings, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to [..., embedding_dim] on their device; rows are made where the table is, then moved."""
        own = self.form.out_features
        flat = ids.reshape(-1).to(self.form.weight.device).long()
        rows = self.form.rows(flat.clamp(max=own - 1), self.tells.dtype)
        if len(self.added):
            rows = torch.where((flat < own)[:, None], rows, self.added[(flat - own).clamp(min=0)])
        return rows.to(ids.device).reshape(*ids.shape, -1)

    def row(self, index: int) -> Tensor:
        """The numbers of one row: [embedding_dim]."""
        return self.forward(torch.tensor([index], device=self.added.device))[0]

    def plain(self) -> Tensor:
        """The whole table [rows, embedding_dim]."""
        return torch.cat((self.form.plain(self.tells.dtype), self.added))

    def grow(self, rows: Tensor) -> None:
        """Adds rows at the end: [rows, embedding_dim]."""
        self.added = torch.cat((self.added, rows.to(self.added)))

    def refuse_change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Nothing: the bytes can be on every device, and every dtype is made of them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedEmbedding:
        super()._apply(fn, recurse)
        self.form = self.form.moved(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.plain()

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form}"


def stays_quantised(model: nn.Module) -> bool:
    """Whether a model has weights that stay as they lie in a quantised file."""
    return any(isinstance(module, (QuantisedLinear, QuantisedEmbedding)) for module in model.modules())
