"""The kernels for CUDA on layers that are brought one after the other.

Every launch is made in every call: of an encode, launching takes a small part of what copying takes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nai_t5_core.backends.cuda.byte_weight import ByteWeight, Weight, lay_out_all
from nai_t5_core.backends.cuda.card import card_of
from nai_t5_core.backends.cuda.documents import COLUMNS, document_table
from nai_t5_core.backends.cuda.encoder import CudaEncoder, products_for, shapes_for
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.inputs import moved
from nai_t5_core.model.packing import Packing

if TYPE_CHECKING:
    from nai_t5_core.backends.cuda.activations import Activations, Sums
    from nai_t5_core.backends.cuda.block import CudaBlock
    from nai_t5_core.backends.cuda.examined import ExaminedStack
    from nai_t5_core.backends.cuda.launches import Documents
    from nai_t5_core.backends.cuda.torch_products import Products
    from nai_t5_core.backends.offload.ring import HasRing
    from nai_t5_core.backends.offload.weights import Place


class KernelsLayerByLayer(CudaRunner):
    """As :class:`nai_t5_core.backends.cuda.runner.CudaRunner`, for a stack whose layers are offloaded."""

    def __init__(self, offload: HasRing) -> None:
        super().__init__(eager=True)
        self.name = "kernels for CUDA, layer by layer"
        self._offload = offload

    def _encoder_of(self, stack: T5EncoderStack) -> CudaEncoder | None:
        if self._encoder is None and self.refusal(stack) is None:
            self._encoder = _EncoderLayerByLayer(stack, self._offload)
        return self._encoder


class _EncoderLayerByLayer(CudaEncoder):
    def __init__(self, stack: T5EncoderStack, offload: HasRing) -> None:
        self._offload = offload
        card = card_of(stack.device)
        # Where the bus takes most of the time, nothing is gained by launches that overlap.
        products = products_for("auto", card, may_overlap=False)
        super().__init__(stack, True, products, shapes_for(card, stack.config.d_kv))

    def _read(self) -> ExaminedStack:
        # What was replaced is locked at once: what is read now has to be what is brought.
        for block in self.stack.encoder.block:
            lay_out_all(block)
            self._offload.ring.lock(block)
        found = super()._read()
        blocks = zip(found.resting, self.stack.encoder.block, strict=True)
        brought = tuple(
            _BroughtBlock(_beside(resting, self.stack.device), index, block, self._offload)
            for index, (resting, block) in enumerate(blocks)
        )
        found.blocks = replace(found.blocks, blocks=brought)
        return found

    def _run(self, ids: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        from nai_t5_core.backends.cuda.launches import Documents, Watch

        self._biases.refresh(self.stack)
        shape = self._shapes(packing.tokens)
        table = document_table(packing.groups, shape.queries)
        count = torch.tensor([packing.tokens], dtype=torch.int32)
        given = moved(torch.cat([count, table.flatten()]), self.device)
        finite = torch.ones(1, dtype=torch.int32, device=self.device)
        documents = Documents(given[1:].view(-1, COLUMNS), shape)
        # The ids stay where they are, since their rows are gathered on the host.
        return self._examined.encode(self._products, ids, documents, Watch(finite, given[:1])), finite


@dataclass
class _BroughtBlock:
    """A :class:`nai_t5_core.backends.cuda.block.CudaBlock` whose weights come for its two calls, one after the other.

    Attributes:
        resting: with the weights where they rest; scales of columns and the weights of norms are on the device.
    """

    resting: CudaBlock
    index: int
    block: nn.Module
    offload: HasRing
    _here: CudaBlock | None = None
    _until: ExitStack = field(default_factory=ExitStack)

    @property
    def is_in_bytes(self) -> bool:
        return self.resting.is_in_bytes

    @property
    def feed_forward_factor(self) -> float:
        return self.resting.feed_forward_factor

    def normed(
        self, residual: Tensor, delta: Tensor | Sums | None, factor: float, dtype: torch.dtype, products: Products
    ) -> Activations:
        return self.resting.normed(residual, delta, factor, dtype, products)

    def add_attention(
        self, residual: Tensor, hidden: Activations, documents: Documents, products: Products
    ) -> Activations:
        self._until.close()  # of a call that was broken off
        place = self._until.enter_context(self.offload.ring.layer(self.index, self.block))
        self._here = _with_weights(self.resting, lambda weight: _placed(weight, place))
        return self._here.add_attention(residual, hidden, documents, products)

    def feed_forward(self, hidden: Activations, products: Products) -> Tensor | Sums:
        assert self._here is not None
        try:
            return self._here.feed_forward(hidden, products)
        finally:
            self._here = None
            self._until.close()


def _with_weights(block: CudaBlock, of: Callable[[Weight], Weight]) -> CudaBlock:
    return replace(block, qkv=of(block.qkv), o=of(block.o), wi=of(block.wi), wo=of(block.wo))


def _placed(weight: Weight, place: Place) -> Weight:
    return weight.placed(place) if isinstance(weight, ByteWeight) else place(weight)


def _beside(block: CudaBlock, device: torch.device) -> CudaBlock:
    """With what a weight in 8 bits has for each column and input on the device, for good: little, and read first."""
    return _with_weights(block, lambda weight: weight.beside(device) if isinstance(weight, ByteWeight) else weight)
