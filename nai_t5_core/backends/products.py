"""oneDNN as backends for blocks of encoder and decoder: projections in oneDNN's blocked order, or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.held import ByModules, HeldLinear, original_weight
from nai_t5_core.backends.int8_weight import Int8Product, Int8Weight
from nai_t5_core.backends.onednn import OneDNNProduct
from nai_t5_core.facts.config import Activation
from nai_t5_core.model.block import Block, Lending, ModulesRecord, is_watched, operations_are_watched
from nai_t5_core.model.layers import (
    PLAIN_LINEARS,
    FoldedRMSNorm,
    FusedGatedFeedForward,
    GatedFeedForward,
    add_sublayer,
    scaled,
)

# Projections of a sublayer that do not read its norm's output, but an inner result or the encoder's hidden states.
_AFTER_NO_NORM = {"EncDecAttention": ("o", "wo", "k", "v", "kv")}
AFTER_THE_SUBLAYER = ("o", "wo")
# Projections whose result goes into attention.
_ATTENTION_INPUTS = ("q", "k", "v", "kv", "qkv")


class OneDNNRunner:
    """Calls the block's modules, but has activation and gating inside the feed-forward's products: rounded once."""

    name = "oneDNN"
    lending: Lending | None = None

    def __init__(self) -> None:
        self._seen: ModulesRecord | None = None

    def __call__(self, block: Block, residual: Tensor, *attends_and_dtype: Any) -> Tensor | None:
        *attends, dtype = attends_and_dtype
        if not self._serves(block, residual):
            return None
        last: Any
        *attending, last = block.layer
        for sublayer, attend in zip(attending, attends, strict=True):
            residual = sublayer(residual, attend, dtype)
        out = _feed_forward(last.DenseReluDense, last.layer_norm(residual).to(dtype))
        return add_sublayer(residual, out, last.out_scale)

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return False

    def forget(self) -> None:
        self._seen = None

    def _serves(self, block: Block, residual: Tensor) -> bool:
        last: Any = block.layer[-1]
        if torch.compiler.is_compiling():
            return _has_products(last.DenseReluDense)
        if operations_are_watched() or (residual.requires_grad and torch.is_grad_enabled()):
            return False
        if self._seen is None or not self._seen.is_same:
            modules = list(last.modules())
            if is_watched(modules) or not _has_products(last.DenseReluDense):
                return False
            self._seen = ModulesRecord(modules)
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}


class OneDNNBackend:
    """Puts every projection of a block in oneDNN's blocked order; each original weight is freed after its copy."""

    name = "oneDNN"

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"the model is on {device}; oneDNN is for the CPU"
        if not torch.backends.mkldnn.is_available():
            return "this torch was built without oneDNN"
        if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return None
        return f"oneDNN reorders float32, and bfloat16 where the processor supports it; the model is in {dtype}"

    def refuses(self, block: Block, dtype: torch.dtype) -> str | None:
        return None

    def bind(self, block: Block, dtype: torch.dtype) -> None:
        for layer in block.layer:
            for sublayer in layer.children():
                for owner, attribute, name in projections(sublayer):
                    # Gate and up are two products, so that oneDNN applies the activation in the gate's.
                    parts = 2 if isinstance(sublayer, FusedGatedFeedForward) and name == "wi" else 1
                    setattr(owner, attribute, self.held(getattr(owner, attribute), dtype, parts))
        block.runner = OneDNNRunner()

    @staticmethod
    def held(linear: nn.Module, dtype: torch.dtype, parts: int = 1) -> HeldLinear:
        """The projection that replaces ``linear``, as ``parts`` products of equal size."""
        weights: Any = original_weight(linear).chunk(parts)
        return HeldLinear([OneDNNProduct(weight.to(dtype)) for weight in weights], dtype=dtype)


class Int8Backend:
    """Quantises every projection of a block to 8 bits; each original weight is freed after its copy."""

    name = "oneDNN, in 8 bits"

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            return f"the model is in {dtype} on {device}; 8 bits are for float32 and bfloat16 on the CPU"
        if "onednn" not in torch.backends.quantized.supported_engines:
            return "this torch was built without oneDNN"
        if not any(getattr(torch.cpu, check, bool)() for check in ("_is_vnni_supported", "_is_amx_tile_supported")):
            return "this processor has no fast products of bytes (AVX512-VNNI or AMX)"
        return None

    def refuses(self, block: Block, dtype: torch.dtype) -> str | None:
        return None

    def bind(self, block: Block, dtype: torch.dtype) -> None:
        for layer in block.layer:
            norm = layer.layer_norm.folded_weight if isinstance(layer.layer_norm, FoldedRMSNorm) else None
            for sublayer_name, sublayer in layer.named_children():
                after_no_norm = _AFTER_NO_NORM.get(sublayer_name, AFTER_THE_SUBLAYER)
                for owner, attribute, name in projections(sublayer):
                    weight = original_weight(getattr(owner, attribute))
                    held = self._held(name, weight, None if name in after_no_norm else norm, dtype)
                    setattr(owner, attribute, held)
        block.runner = ByModules(self.name)

    @staticmethod
    def held(linear: nn.Module, dtype: torch.dtype) -> HeldLinear:
        """The projection that replaces ``linear``, which reads no norm, with a result in ``dtype``."""
        weight = original_weight(linear)
        quantised = weight if isinstance(weight, Int8Weight) else Int8Weight.of(weight)
        return HeldLinear([Int8Product(quantised, dtype)], dtype=dtype)

    def _held(self, name: str, weight: Tensor | Int8Weight, norm: Tensor | None, dtype: torch.dtype) -> HeldLinear:
        quantised = weight if isinstance(weight, Int8Weight) else Int8Weight.of(weight, norm)
        if name in _ATTENTION_INPUTS:
            return HeldLinear([Int8Product(quantised, dtype)], dtype=dtype)
        # All other results stay in float32: rounding them would take longer than it saves.
        return HeldLinear([Int8Product(quantised, torch.float32)])


ONEDNN = OneDNNBackend()
INT8_ONEDNN = Int8Backend()


def projections(sublayer: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Projections, plain or held by a backend: for each its owner, its name in the owner, its name in the sublayer.

    The two names differ where another module, such as a live LoRA, wraps the projection.
    """
    found = []
    for name, child in sublayer.named_children():
        if _can_be_taken(child):
            found.append((sublayer, name, name))
            continue
        for owner in child.modules():
            found += [(owner, inside, name) for inside, part in owner.named_children() if _can_be_taken(part)]
    return found


def _can_be_taken(linear: nn.Module) -> bool:
    return type(linear) in PLAIN_LINEARS or isinstance(linear, HeldLinear)


def _has_products(dense: Any) -> bool:
    """Whether all projections of a feed-forward are products that take an activation."""
    linears = list(dense.children())
    return all(isinstance(linear, HeldLinear) and isinstance(linear.forms[0], OneDNNProduct) for linear in linears)


def _feed_forward(dense: Any, hidden: Tensor) -> Tensor:
    """The result of the module ``dense``, all of whose projections are a :class:`OneDNNProduct`."""
    if isinstance(dense, FusedGatedFeedForward):
        return feed_forward(hidden, dense.wi.forms, dense.wo.forms[0], dense.activation)
    names = ("wi_0", "wi_1") if isinstance(dense, GatedFeedForward) else ("wi",)
    inner = [getattr(dense, name).forms[0] for name in names]
    return feed_forward(hidden, inner, dense.wo.forms[0], dense.activation, dense.scale)


def feed_forward(
    hidden: Tensor, inner: Sequence[OneDNNProduct], wo: OneDNNProduct, activation: Activation, scale: float = 1.0
) -> Tensor:
    """[…, d_model] to […, d_model], with activation and gating inside the products.

    Args:
        inner: the products of gate and up, or the only one.
        scale: multiplies the input of the last of these.
    """
    if len(inner) == 1:
        return wo(inner[0](scaled(hidden, scale), activation))
    gate, up = inner
    return wo(up(scaled(hidden, scale), factor=gate(hidden, activation)))
