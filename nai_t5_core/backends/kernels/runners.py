"""The kernels as backends: on the modules' own weights, on copies in panels, and in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nai_t5_core.backends.held import HeldLinear, original_weight
from nai_t5_core.backends.int8_weight import Int8Weight
from nai_t5_core.backends.kernels.block import BlockOfKernels, KernelBlock, KernelDecoderBlock
from nai_t5_core.backends.kernels.build import (
    best_set,
    missing_for,
    nearest_set,
    prepare_kernels,
    set_to_use,
)
from nai_t5_core.backends.kernels.calls import ACTIVATION_NUMBERS
from nai_t5_core.backends.kernels.sets import SETS, InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN, Int8Backend, OneDNNBackend
from nai_t5_core.backends.widened import WIDENED, WidenedBackend
from nai_t5_core.model.attention import Attend, FusedSelfAttention
from nai_t5_core.model.block import Block, Lending, ModulesRecord, is_watched, operations_are_watched, torch_is_needed
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.layers import (
    PLAIN_LINEARS,
    FeedForward,
    FoldedRMSNorm,
    FusedGatedFeedForward,
    GatedFeedForward,
)

# What holds single projections, too.
LenderOfProducts = OneDNNBackend | Int8Backend | WidenedBackend

# ---------------------------------------------------------------------------------------------------------------------
# On the modules' own weights
# ---------------------------------------------------------------------------------------------------------------------


class KernelsInPlace:
    """Computes a block by the kernels, from its modules' own weights; changes of the weights take effect.

    Wherever the kernels cannot compute the block in its present state, its modules do.

    Args:
        instructions: what to compute with; None: the best that this processor has, unless oneDNN has something better.
    """

    lending: Lending | None = None

    def __init__(self, instructions: InstructionSet | None = None) -> None:
        self._named = instructions
        self._looked: tuple[torch.dtype, ModulesRecord, KernelBlock | None] | None = None

    @property
    def name(self) -> str:
        if (instructions := set_to_use(self._named)) is None:
            return "kernels"
        kernels = None if self._looked is None else self._looked[2]
        return f"{instructions.title} kernels{'' if kernels is None else kernels.widening}"

    def __call__(self, block: Block, residual: Tensor, attend: Attend, dtype: torch.dtype) -> Tensor | None:
        if torch_is_needed() or not residual.is_cpu:
            return None
        kernels = self._kernels(block, dtype)
        return None if kernels is None else kernels(residual, attend)

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        instructions = set_to_use(self._named)
        return instructions is not None and refuses_in_place(block, dtype, instructions) is None

    def _kernels(self, block: Block, dtype: torch.dtype) -> KernelBlock | None:
        if self._looked is not None:
            looked_dtype, seen, kernels = self._looked
            if looked_dtype == dtype and seen.is_same:
                return kernels
        kernels = None
        if self.attends(block, dtype) and prepare_kernels(self._named) is None:
            kernels = _kernels_in_place(block, dtype, set_to_use(self._named))
        self._looked = (dtype, ModulesRecord(list(block.modules())[1:]), kernels)
        return kernels

    def forget(self) -> None:
        self._looked = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_named": self._named, "_looked": None}


def refuses_in_place(block: Block, dtype: torch.dtype, instructions: InstructionSet) -> str | None:
    """Why the kernels cannot compute a block from its modules' present weights, as a sentence; None if they can."""
    if refused := refuses_dtype(dtype, instructions):
        return refused
    attends, dense = _sublayers(block)
    if not isinstance(attends, FusedSelfAttention) or type(dense) not in (FusedGatedFeedForward, FeedForward):
        return "the projections are not joined (the layout is separate)"
    for linear in (attends.qkv, attends.o, dense.wi, dense.wo):
        if type(linear) not in PLAIN_LINEARS:
            return f"a projection is of class {type(linear).__name__}"
        weight = linear.weight
        is_plain = type(weight) is nn.Parameter and weight.dtype == dtype and weight.is_cpu and weight.is_contiguous()
        if not is_plain or weight.shape[1] % 2:
            return f"a weight is no plain {dtype} of even depth on the CPU"
    # The kernels compute norms without a weight here; a live LoRA may give a norm one.
    if not all(type(layer.layer_norm) is FoldedRMSNorm for layer in block.layer):
        return "a norm has a weight of its own"
    if is_watched(block.modules()):
        return "other software hooks into its modules"
    return refuses_mathematics(block)


def refuses_dtype(dtype: torch.dtype, instructions: InstructionSet) -> str | None:
    """Why kernels are not for a model in a dtype, as a sentence; None if they are."""
    return None if dtype in instructions.stored else f"the model is in {dtype}; {_dtypes_of(instructions)}"


def _dtypes_of(instructions: InstructionSet) -> str:
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in instructions.stored)
    return f"the kernels for {instructions.title} are for models in {known}"


def _kernels_in_place(block: Block, dtype: torch.dtype, instructions: InstructionSet | None) -> KernelBlock:
    attends, dense = _sublayers(block)
    weights = [linear.weight for linear in (attends.qkv, attends.o, dense.wi, dense.wo)]
    return KernelBlock.of(weights, dtype, dense, attends.heads, _epsilon(block), instructions=instructions)


# ---------------------------------------------------------------------------------------------------------------------
# On copies in panels
# ---------------------------------------------------------------------------------------------------------------------


class _Held:
    """A block's weights, held by the backend alone; the second call puts them in panels.

    So a process that encodes once never pays for panels. ``in_scales`` are the factors of the inputs that were divided
    out of weights in 8 bits, one for each weight, see :class:`nai_t5_core.backends.int8_weight.Int8Weight`.
    """

    def __init__(self, kernels: BlockOfKernels, in_scales: Sequence[Tensor | None] | None = None) -> None:
        self.kernels, self.in_scales = kernels, tuple(in_scales or [None] * len(kernels.weights))
        self.called = False

    def ready(self) -> Any:
        """The block as a function, for this call."""
        # The attribute is replaced at once, so it does not matter which of the objects another thread reads.
        while self.called and not self.kernels.is_in_panels:
            self.kernels = self.kernels.with_next_in_panels()
        self.called = True
        return self.kernels


class _HeldForm:
    """The :class:`nai_t5_core.backends.held.Form` of one of a block's weights."""

    def __init__(self, held: _Held, place: int) -> None:
        self.held, self.place = held, place
        kept = held.kernels.weights[place]
        self.out_features, self.in_features = kept.columns, kept.depth

    @property
    def in_8_bits(self) -> bool:
        return self.held.kernels.weights[self.place].scales is not None

    def original(self) -> Tensor | Int8Weight:
        kept = self.held.kernels.weights[self.place]
        values = kept.original()
        return values if kept.scales is None else Int8Weight(values, kept.scales, self.held.in_scales[self.place])

    def __str__(self) -> str:
        kernels = self.held.kernels
        return f"the kernels' {'panels' if kernels.is_in_panels else 'weights'}{', 8 bits' if self.in_8_bits else ''}"


class KernelsOnPanels:
    """Computes a block by the kernels, from weights that the backend holds.

    Attributes:
        lending: the backend that computes the block while a live LoRA stands beside its weights, which the kernels
            cannot compute.
    """

    def __init__(self, backend: KernelsBackend, held: _Held) -> None:
        self.lending: Lending | None = Lending(to=backend.lends_to, back=backend)
        self._name, self._held = backend.name, held
        self._seen: ModulesRecord | None = None

    @property
    def name(self) -> str:
        kernels = self._held.kernels
        return f"{self._name}{kernels.widening}, {'in panels' if kernels.is_in_panels else 'to be in panels'}"

    def __call__(self, block: Block, residual: Tensor, *attends_and_dtype: Any) -> Tensor | None:
        if not residual.is_cpu or operations_are_watched() or (residual.requires_grad and torch.is_grad_enabled()):
            return None
        if self._seen is None or not self._seen.is_same:
            modules = list(block.modules())[1:]
            if is_watched(modules) or not self._has_all_of(block):
                return None
            self._seen = ModulesRecord(modules)
        *attends, _ = attends_and_dtype
        out: Tensor = self._held.ready()(residual, *attends, *norm_weights(block, self._held.in_scales[::2]))
        return out

    def _has_all_of(self, block: Block) -> bool:
        linears = [getattr(owner, name) for owner, names in places(block) for name in names]
        forms: list[Any] = [linear.forms[0] for linear in linears if isinstance(linear, HeldLinear)]
        return len(forms) == len(linears) and all(getattr(form, "held", None) is self._held for form in forms)

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return not isinstance(block, DecoderBlock)

    def forget(self) -> None:
        self._seen = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}


class KernelsBackend:
    """Computes blocks by the kernels, from copies of their weights in panels; the originals are freed.

    The keys and values of a decoder's cross-attention, which are made once for each prompt, are left to ``lends_to``.
    """

    # The kernels read a row of a weight in groups of this many numbers.
    unit = 2

    # What is added to the name.
    suffix = ""

    def __init__(self, instructions: InstructionSet) -> None:
        self.instructions = instructions
        self.name = f"{instructions.title} kernels{self.suffix}"

    @property
    def lends_to(self) -> LenderOfProducts:
        """What computes a block that has a live LoRA: oneDNN where it is sure to have the same dtypes."""
        return ONEDNN if self.instructions.stores_bfloat16 else WIDENED

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype not in self.instructions.stored:
            return f"{_dtypes_of(self.instructions)} on the CPU; this is a model in {dtype} on {device}"
        return missing_for(self.instructions)

    def refuses(self, block: Block, dtype: torch.dtype) -> str | None:
        for owner, names in places(block):
            for name in names:
                linear: Any = getattr(owner, name)
                if type(linear) not in PLAIN_LINEARS and not isinstance(linear, HeldLinear):
                    return f"a projection is of class {type(linear).__name__}"
                if linear.in_features % self.unit:
                    return f"a projection has {linear.in_features} inputs; their number must divide by {self.unit}"
        return refuses_mathematics(block)

    def bind(self, block: Block, dtype: torch.dtype) -> None:
        taken_from = places(block)
        weights = [_joined([original_weight(getattr(owner, name)) for name in names]) for owner, names in taken_from]
        held = self._held(block, weights, dtype)
        for place, (owner, names) in enumerate(taken_from):
            for part, name in enumerate(names):
                setattr(owner, name, HeldLinear([_HeldForm(held, place)], part, len(names), dtype))
        if isinstance(block, DecoderBlock):
            across: Any = block.layer[1].EncDecAttention
            for name in {"kv", "k", "v"} & across._modules.keys():
                setattr(across, name, self.lends_to.held(getattr(across, name), dtype))
        block.runner = KernelsOnPanels(self, held)

    def _held(self, block: Block, weights: list[Any], dtype: torch.dtype) -> _Held:
        return _Held(self._kernels(block, weights, dtype))

    def _kernels(self, block: Block, weights: Sequence[Tensor], dtype: torch.dtype, scales: Any = None) -> Any:
        kind = KernelDecoderBlock if isinstance(block, DecoderBlock) else KernelBlock
        attends, dense = _sublayers(block)
        return kind.of(weights, dtype, dense, attends.heads, _epsilon(block), scales, self.instructions)


class Int8KernelsBackend(KernelsBackend):
    """:class:`KernelsBackend` with weights and products in 8 bits; activations are stored in the model's dtype."""

    unit = 4
    suffix = ", in 8 bits"

    @property
    def lends_to(self) -> LenderOfProducts:
        return INT8_ONEDNN if self.instructions.stores_bfloat16 else WIDENED

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        lent = INT8_ONEDNN.missing(device, dtype) if self.instructions.stores_bfloat16 else None
        return super().missing(device, dtype) or lent

    def _held(self, block: Block, weights: list[Any], dtype: torch.dtype) -> _Held:
        # A norm weight that was folded into a projection is divided out of it, and multiplies activations instead.
        factors: list[Tensor | None] = []
        for layer in block.layer:
            norm: Any = layer.layer_norm
            factors += [norm.folded_weight if isinstance(norm, FoldedRMSNorm) else None, None]
        quantised = [
            weight if isinstance(weight, Int8Weight) else Int8Weight.of(weight, in_scale)
            for weight, in_scale in zip(weights, factors, strict=True)
        ]
        values, scales, in_scales = zip(*((one.values, one.scale, one.in_scale) for one in quantised), strict=True)
        return _Held(self._kernels(block, values, dtype, scales).in_panels(), in_scales)


# By the names of instruction sets, the best first.
KERNELS = {instructions.name: KernelsBackend(instructions) for instructions in SETS}
INT8_KERNELS = {instructions.name: Int8KernelsBackend(instructions) for instructions in SETS}

Kernels = TypeVar("Kernels", bound=KernelsBackend)


def best(kernels: Mapping[str, Kernels]) -> Kernels:
    """The backend for the best set of this machine; where it has none, one that says what is missing."""
    found = best_set() or nearest_set()
    return kernels[found.name]


def _joined(weights: list[Any]) -> Any:
    """The weights of several projections joined into one, rows in order."""
    if len(weights) == 1:
        return weights[0]
    return Int8Weight.joined(weights) if isinstance(weights[0], Int8Weight) else torch.cat(weights)


def places(block: Block) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Where the weights that the kernels compute with are, in the order of their use.

    For each, the module and the names of its projections there: qkv, o, a decoder's q and o of cross-attention, inner,
    and wo.
    """
    attends, dense = _sublayers(block)
    across = [(module, (name,)) for module in _across(block) for name in ("q", "o")]
    qkv = ("qkv",) if isinstance(attends, FusedSelfAttention) else ("q", "k", "v")
    inner = ("wi_0", "wi_1") if isinstance(dense, GatedFeedForward) else ("wi",)
    return [(attends, qkv), (attends, ("o",)), *across, (dense, inner), (dense, ("wo",))]


def refuses_mathematics(block: Block) -> str | None:
    """What a block computes that the kernels do not support, whatever its weights, as a sentence; None if nothing."""
    attends, dense = _sublayers(block)
    if dense.activation not in ACTIVATION_NUMBERS:
        return f"the activation is {dense.activation}, which the kernels do not know"
    if attends.d_kv % 2:
        return f"a head has {attends.d_kv} numbers; the kernels need an even number"
    scaled = (attends, *_across(block), dense)
    factors = [layer.out_scale for layer in block.layer] + [getattr(module, "scale", 1) for module in scaled]
    if any(factor != 1 for factor in factors):
        return "a block has float16 scales, which the kernels do not know"
    return None


def norm_weights(block: Block, factors: Sequence[Tensor | None] | None = None) -> list[Tensor | None]:
    """The norm weights of the sublayers, in float32; None where there is none.

    Args:
        factors: what each sublayer's norm is multiplied by besides; None where nothing is.
    """
    found = []
    for layer, factor in zip(block.layer, factors or [None] * len(block.layer), strict=True):
        norm: Any = layer.layer_norm
        # In float32 again: casting a model, even to its own compute dtype, casts the norm weights as well.
        own = None if type(norm) is FoldedRMSNorm else norm.weight.detach().float()
        found.append(own if factor is None else factor if own is None else own * factor)
    return found


def kernel_block(block: Block, weights: Sequence[KernelWeight], dtype: torch.dtype) -> KernelBlock:
    """An encoder's block with the weights of :func:`places`."""
    attends, dense = _sublayers(block)
    return KernelBlock(tuple(weights), dtype, dense.activation, attends.heads, _epsilon(block))


def _sublayers(block: Block) -> tuple[Any, Any]:
    """The modules of attention and feed-forward."""
    layers: Any = block.layer
    return layers[0].SelfAttention, layers[-1].DenseReluDense


def _across(block: Block) -> list[Any]:
    """The module of cross-attention, if the block has one."""
    layers: Any = block.layer
    return [layers[1].EncDecAttention] if isinstance(block, DecoderBlock) else []


def _epsilon(block: Block) -> float:
    norm: Any = block.layer[0].layer_norm
    return float(norm.eps)
