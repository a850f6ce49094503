"""A layer on CUDA between ComfyUI's products: norms, gate and attention in a launch each, by the kernels of the core.

By ComfyUI's own norm alone, the square, the mean, the root, two products and the casts are eight launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.documents import document_table, has_holes
from nai_t5_core.backends.cuda.encoder import shapes_for
from nai_t5_core.backends.cuda.launches import Documents, add_norm, attend, attention_table, gate
from nai_t5_core.model.attention import Attend, DocumentAttention, DocumentLayer
from nai_t5_core.model.block import Block, Lending
from nai_t5_core.model.inputs import moved
from nai_t5_core.model.layers import GatedFeedForward, add_sublayer


class LayerProducts(Protocol):
    """The four products of one layer."""

    def qkv(self, hidden: Tensor, /) -> Tensor:
        """[tokens, d_model] to queries, keys and values side by side: [tokens, 3 · inner]."""
        ...

    def o(self, attended: Tensor, /) -> Tensor:
        """[tokens, inner] to [tokens, d_model]."""
        ...

    def wi(self, hidden: Tensor, /) -> Tensor:
        """[tokens, d_model] to gate and up side by side, or ReLU's only one: [tokens, 2 · d_ff or d_ff]."""
        ...

    def wo(self, inner: Tensor, /) -> Tensor:
        """[tokens, d_ff] to [tokens, d_model]."""
        ...


class OfTheCall:
    """What the layers of a call share on the device, made by the first that needs it."""

    def __init__(self) -> None:
        self._plan: DocumentAttention | None = None
        self._documents: Documents | None = None
        self._layer: DocumentLayer | None = None
        self._table: Tensor | None = None
        self._tables: dict[Block, Tensor] = {}

    def runner(self, norms: tuple[Tensor, Tensor], products: LayerProducts) -> CudaLayer:
        """What runs a layer; see :class:`CudaLayer`."""
        return CudaLayer(norms, products, self)

    def take_biases(self, blocks: Sequence[Block], biases: Tensor) -> None:
        """Makes all tables at once, of biases by distance that stand one above the other: [layers · heads, distances].

        Without this call each is made of what the layer attends by.
        """
        self._tables = dict(zip(blocks, attention_table(biases).chunk(len(blocks)), strict=True))

    def documents(self, plan: DocumentAttention, qkv: Tensor, d_kv: int) -> Documents | None:
        """The prompts as a table, in one copy; None where a mask has holes, which the kernel cannot describe."""
        if plan is not self._plan:
            self._plan, self._documents = plan, None
            if not has_holes(plan.groups):
                shape = shapes_for(card_of(qkv.device), d_kv)(len(qkv))
                table = document_table(plan.groups, shape.queries)
                self._documents = Documents(moved(table, qkv.device), shape)
        return self._documents

    def table(self, block: Block, layer: DocumentLayer) -> Tensor:
        """The bias by distance of a layer, as the kernel reads it."""
        if block in self._tables:
            return self._tables[block]
        if layer is not self._layer or self._table is None:
            self._layer, self._table = layer, attention_table(layer.table)
        return self._table


class CudaLayer:
    """Runs a layer for the time of a call.

    Args:
        norms: the weights before attention and before the feed-forward, [d_model] in any float dtype.
        products: on ComfyUI's modules or on their weights.
        shared: by the layers of a call.
    """

    name = "kernels for CUDA between ComfyUI's products"
    lending: Lending | None = None

    def __init__(self, norms: tuple[Tensor, Tensor], products: LayerProducts, shared: OfTheCall) -> None:
        self.norms, self.products, self.shared = norms, products, shared

    def __call__(self, block: Block, residual: Tensor, by_torch: Attend, dtype: torch.dtype) -> Tensor:
        if not len(residual):
            return residual
        attention: Any = block.layer[0]
        dense: Any = block.layer[-1]
        inner, products = dense.DenseReluDense, self.products
        attention_norm, dense_norm = self.norms
        hidden = add_norm(residual, None, 1.0, attention.layer_norm.variance_epsilon, dtype, attention_norm)
        attended = self._attended(block, products.qkv(hidden), by_torch)
        if attention.SelfAttention.scale != 1:
            attended.mul_(attention.SelfAttention.scale)
        delta, factor, epsilon = products.o(attended), 1 / attention.out_scale, dense.layer_norm.variance_epsilon
        # The scale is for up, and ReLU hands it on; the gate's is divided out before the activation.
        hidden = add_norm(residual, delta, factor, epsilon, dtype, dense_norm, factor=inner.scale)
        is_gated = isinstance(inner, GatedFeedForward)
        factor = 1 / inner.scale if is_gated else 1.0
        active = gate(products.wi(hidden), inner.activation, is_gated, factor=factor)
        return add_sublayer(residual, products.wo(active), dense.out_scale)

    def _attended(self, block: Any, qkv: Tensor, by_torch: Attend) -> Tensor:
        """[tokens, 3 · inner] to [tokens, inner]."""
        module, documents = block.layer[0].SelfAttention, None
        if isinstance(by_torch, DocumentLayer):
            documents = self.shared.documents(by_torch.plan, qkv, module.d_kv)
        if documents is None or not isinstance(by_torch, DocumentLayer):
            q, k, v = qkv.unflatten(-1, (3, module.heads, module.d_kv)).unbind(-3)
            return by_torch(q, k, v).flatten(-2)
        return attend(qkv, self.shared.table(block, by_torch), documents, by_torch.plan.scale)

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return True

    def forget(self) -> None:
        """Nothing: it is made for one call."""
