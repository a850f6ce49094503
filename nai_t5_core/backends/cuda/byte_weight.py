"""Weights in 8 bits as the kernels for CUDA read them, and how a projection is laid out for that.

A projection that stays quantised has its bytes in several tensors: q, k and v; gate and up. The kernels read one, in
which they stand one above the other. Blocks of Q8_0 are 34 bytes, a scale and 32 numbers: no more than 2 bytes of them
can be read at once, and none of them without waiting. So numbers and scales are put apart, once, when the weight is on
the device: as many bytes as before, and to the bit what they were. The bytes as they lay are let go; a projection that
is moved takes the form of its file again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.cuda.byte_kinds import APART, BLOCK, Q8_0, is_read
from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.backends.quantised.projections import QuantisedForm, QuantisedLinear
from nai_t5_core.backends.quantised.scaled import SCALE, Scaled

# The largest input that float16 is asked to hold after a norm's weight was multiplied into it.
_LARGEST_INPUT = 2.0**15


@dataclass(frozen=True)
class RowScaled:
    """Numbers of 8 bits that nothing but a scale of each column multiplies.

    Attributes:
        dtype: of the numbers.
        is_asked: whether ``quantize="int8"`` made them, which on a CPU stands for inputs in 8 bits as well.
    """

    dtype: torch.dtype
    is_asked: bool = False


@dataclass(frozen=True)
class ByteWeight:
    """A weight [columns, depth] in 8 bits; where it joins gate and up, one above the other.

    Attributes:
        values: [columns, depth] in a dtype of :data:`nai_t5_core.backends.cuda.byte_kinds.READ_DTYPES`, contiguous.
        scales: [columns] float32: what the sum of a column is multiplied by.
        block_scales: [depth / 32, columns] float16, the scales of each 32 numbers of a column, or None.
        norm: [depth] float32, what inputs are multiplied by before, or None for ones.
        in_8_bits: whether it was quantised here, and is no longer the weight that was given.
    """

    values: Tensor
    scales: Tensor
    block_scales: Tensor | None = None
    norm: Tensor | None = None
    in_8_bits: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        columns, depth = self.values.shape
        return columns, depth

    def placed(self, place: Callable[[Tensor], Tensor]) -> ByteWeight:
        """With its bytes and the scales of blocks elsewhere; what has a number for each column or input stays."""
        blocks = None if self.block_scales is None else place(self.block_scales)
        return replace(self, values=place(self.values), block_scales=blocks)

    def beside(self, device: torch.device) -> ByteWeight:
        """With what stays of it, see :meth:`placed`, on a device."""
        norm = None if self.norm is None else self.norm.to(device)
        return replace(self, scales=self.scales.to(device), norm=norm)

    @property
    def row_scaled(self) -> RowScaled | None:
        """Its numbers, where bytes are multiplied by them; else None. Sizes have to be multiples of 32 for that."""
        is_possible = self.block_scales is None and not any(size % 32 for size in self.shape)
        return RowScaled(self.values.dtype, self.in_8_bits) if is_possible else None


# A weight as the kernels read it.
Weight = Tensor | ByteWeight


@dataclass(frozen=True, kw_only=True)
class JoinedForm(QuantisedForm):
    """A form whose bytes stand in one tensor with those of the other forms of its projection.

    Attributes:
        joined: all numbers of the projection [columns, depth].
        block_scales: all scales of blocks [depth / 32, columns], or None.
        first_row: where its own begin.
    """

    joined: Tensor
    block_scales: Tensor | None = None
    first_row: int = 0

    @classmethod
    def of(
        cls, form: QuantisedForm, weight: QuantisedWeight, joined: Tensor, block_scales: Tensor | None, first_row: int
    ) -> JoinedForm:
        """A form with this weight, whose parts that are joined are taken from there."""
        parts = weight.parts | _views(weight.shape[0], joined, block_scales, first_row)
        return cls(
            weight=replace(weight, parts=parts, read_rows=None),
            columns=form.columns,
            scale=form.scale,
            in_8_bits=form.in_8_bits,
            joined=joined,
            block_scales=block_scales,
            first_row=first_row,
        )

    @property
    def tensors(self) -> list[Tensor]:
        shared = [self.joined, *(() if self.block_scales is None else (self.block_scales,))]
        views = (WEIGHT,) if self.block_scales is None else (WEIGHT, SCALE)
        own = [part for name, part in self.weight.parts.items() if name not in views]
        return [*shared, *own, *(() if self.columns is None else (self.columns,))]

    def placed(self, place: Callable[[Tensor], Tensor]) -> JoinedForm:
        joined, blocks = place(self.joined), None if self.block_scales is None else place(self.block_scales)
        views = _views(self.out_features, joined, blocks, self.first_row)
        own = {name: place(part) for name, part in self.weight.parts.items() if name not in views}
        columns = None if self.columns is None else place(self.columns)
        form, weight = replace(self, columns=columns), replace(self.weight, parts=own)
        return JoinedForm.of(form, weight, joined, blocks, self.first_row)

    def as_in_file(self) -> QuantisedForm:
        """With its bytes as they lay before."""
        return self._with(self.weight)

    def moved(self, move: Callable[[Tensor], Tensor]) -> QuantisedForm:
        weight = self.weight.moved(move)
        return self if weight.device == self.weight.device else self._with(weight)

    def _with(self, weight: QuantisedWeight) -> QuantisedForm:
        columns = None if self.columns is None else self.columns.to(weight.device)
        return QuantisedForm(_as_in_file(weight), columns, self.scale, self.in_8_bits)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied and pickled as in its file: every view of a tensor is pickled with all of the tensor.
        own = _as_in_file(replace(self.weight, parts={name: part.clone() for name, part in self.weight.parts.items()}))
        return QuantisedForm, (own, self.columns, self.scale, self.in_8_bits)


def _views(rows: int, joined: Tensor, block_scales: Tensor | None, first_row: int) -> dict[str, Tensor]:
    """The parts of a weight of so many rows that are parts of what its projection has joined."""
    own = slice(first_row, first_row + rows)
    return {WEIGHT: joined[own]} | ({} if block_scales is None else {SCALE: block_scales.t()[own]})


def refuses_projection(linear: QuantisedLinear) -> str | None:
    """Why the kernels cannot read a projection, as a sentence; None if they can."""
    kinds = list(dict.fromkeys(form.weight.kind.name for form in linear.forms))
    for form in linear.forms:
        if not is_read(form.weight.kind):
            return f"a projection is of kind {form.weight.kind.name}, which is unpacked in every call"
    if len({_dtype_and_blocks(form.weight) for form in linear.forms}) > 1:
        return f"a projection is of several kinds: {', '.join(kinds)}"
    return None


def kinds_of(stack: nn.Module) -> list[str]:
    """The kinds of a model's projections that stay quantised, by name."""
    linears = (module for module in stack.modules() if isinstance(module, QuantisedLinear))
    return list(dict.fromkeys(form.weight.kind.name for linear in linears for form in linear.forms))


def weight_of(linear: Any) -> Weight:
    """The weight of a projection, plain or quantised, as the kernels read it; the latter is laid out for that."""
    if not isinstance(linear, QuantisedLinear):
        weight: Tensor = linear.weight
        return weight
    lay_out(linear)
    form: Any = linear.forms[0]
    scales = torch.cat([_scales_of_columns(each) for each in linear.forms])
    norm = None if form.columns is None else form.columns.float()
    if norm is not None:
        # A power of two that keeps inputs in float16: those of a norm are no larger than the root of their number.
        power = (norm.abs().amax() * len(norm) ** 0.5 / _LARGEST_INPUT).log2().ceil().clamp(min=0).exp2().round()
        norm, scales = (norm / power).contiguous(), scales * power
    in_8_bits = all(each.in_8_bits for each in linear.forms)
    return ByteWeight(form.joined, scales.contiguous(), form.block_scales, norm, in_8_bits)


@torch.inference_mode(False)
def lay_out(linear: QuantisedLinear) -> None:
    """Puts the bytes of a projection into one tensor, with scales of blocks apart. What was laid out stays."""
    if all(isinstance(form, JoinedForm) for form in linear.forms):
        return
    weights = [_apart(form.weight) for form in linear.forms]
    values = _one_above_the_other([weight.parts[WEIGHT] for weight in weights])
    scales = None
    if weights[0].kind == APART:
        scales = torch.cat([weight.parts[SCALE] for weight in weights]).t().contiguous()
    first_rows = accumulate((form.out_features for form in linear.forms), initial=0)
    laid_out = zip(linear.forms, weights, first_rows, strict=False)
    linear.forms = tuple(JoinedForm.of(form, weight, values, scales, row) for form, weight, row in laid_out)


def lay_out_all(module: nn.Module) -> None:
    """See :func:`lay_out`: every projection of a module that stays quantised."""
    for each in module.modules():
        if isinstance(each, QuantisedLinear):
            lay_out(each)


@torch.inference_mode(False)
def lay_as_in_file(module: nn.Module) -> None:
    """The way back, for who does not read scales of blocks apart; others stay as they were laid out."""
    for each in module.modules():
        if isinstance(each, QuantisedLinear) and any(form.weight.kind == APART for form in each.forms):
            each.forms = tuple(form.as_in_file() if isinstance(form, JoinedForm) else form for form in each.forms)


def _one_above_the_other(values: list[Tensor]) -> Tensor:
    """Bytes of a dtype joined; those of one tensor as they are, where it is contiguous."""
    if len(values) == 1:
        return values[0].contiguous()
    # Not every torch joins float8.
    return torch.cat([each.view(torch.uint8) for each in values]).view(values[0].dtype)


def _dtype_and_blocks(weight: QuantisedWeight) -> tuple[torch.dtype, bool]:
    if isinstance(weight.kind, BlockKind) or weight.kind == APART:
        return torch.int8, True
    return weight.parts[WEIGHT].dtype, False


def _scales_of_columns(form: QuantisedForm) -> Tensor:
    """[out_features] float32; NaN for a column that has NaN of float8_e4m3, which its kernel reads as numbers."""
    weight, rows = form.weight, form.out_features
    values = weight.parts[WEIGHT]
    scale = torch.full((rows,), form.scale, dtype=torch.float32, device=values.device)
    if weight.kind != APART and SCALE in weight.parts:
        scale *= weight.parts[SCALE].float().reshape(-1)
    if isinstance(weight.kind, Scaled):
        scale *= weight.kind.unit
    if values.dtype == torch.float8_e4m3fn:
        scale.masked_fill_(_has_nan(values), torch.nan)
    return scale


def _has_nan(values: Tensor) -> Tensor:
    """[rows] bool: which rows of float8_e4m3 have NaN."""
    return torch.cat([((some.view(torch.uint8) & 127) == 127).any(dim=1) for some in values.split(1024)])


# ---------------------------------------------------------------------------------------------------------------------
# Q8_0
# ---------------------------------------------------------------------------------------------------------------------


def _apart(weight: QuantisedWeight) -> QuantisedWeight:
    """Q8_0 with numbers and scales apart; other kinds as they are."""
    if weight.kind != Q8_0:
        return weight
    rows, columns = weight.shape
    blocks = weight.parts[WEIGHT].reshape(rows, columns // BLOCK, Q8_0.size)
    scales = blocks[:, :, :2].contiguous().view(torch.float16).reshape(rows, columns // BLOCK)
    values = blocks[:, :, 2:].reshape(rows, columns).view(torch.int8)
    return QuantisedWeight(APART, weight.shape, {WEIGHT: values, SCALE: scales})


def _as_in_file(weight: QuantisedWeight) -> QuantisedWeight:
    """The way back from :func:`_apart`, to the bit."""
    if weight.kind != APART:
        return weight
    rows, columns = weight.shape
    scales = weight.parts[SCALE].contiguous().view(torch.uint8).reshape(rows, columns // BLOCK, 2)
    values = weight.parts[WEIGHT].view(torch.uint8).reshape(rows, columns // BLOCK, BLOCK)
    return QuantisedWeight(Q8_0, weight.shape, {WEIGHT: torch.cat((scales, values), dim=2).reshape(rows, -1)})
