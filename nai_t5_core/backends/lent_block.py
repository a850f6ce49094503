"""A block of the kernels that oneDNN computes for a while."""

from __future__ import annotations

from typing import Any

import torch

from nai_t5_core.backends.packed_block import PackedBlock, linear_of
from nai_t5_core.backends.plain_twin import plain_weight
from nai_t5_core.backends.prepack import PackedLinear, pack_children
from nai_t5_core.model.encoder_block import EncoderBlock


class LentBlock(EncoderBlock):
    """The block by oneDNN, whose products have places for what is added to them, until it is :meth:`returned`.

    Its weights are moved over and back: they are never there twice, and no number of them changes.

    Args:
        block: gives its weights away, and is of no use any more.
    """

    def __init__(self, block: PackedBlock) -> None:
        super().__init__(*block.unpacked().layer)
        self.form, self.dtype = type(block), block.kernels.weights[0].dtype
        dense: Any = self._dense
        # In a tuple, so that it is no part of this block; it comes back without what it computed with.
        self._own_dense = (dense,)
        self._names = tuple(name for name, _ in dense.named_children())
        pack_children(self)
        if self._dense is not dense:
            for name in self._names:
                delattr(dense, name)

    def returned(self) -> PackedBlock:
        """The block of the kernels again; this one is of no use any more.

        Nothing may be beside its projections.
        """
        layers: Any = self.layer
        like = torch.empty(0, dtype=self.dtype)
        for name, projection in layers[0].SelfAttention.named_children():
            if isinstance(projection, PackedLinear):
                setattr(layers[0].SelfAttention, name, linear_of(plain_weight(projection, "", like)))
        packed, (dense,) = self._dense, self._own_dense
        if packed is not dense:
            for name in self._names:
                setattr(dense, name, linear_of(plain_weight(packed, name, like)))
            layers[-1].DenseReluDense = dense
        return self.form(EncoderBlock(*layers), self.dtype)

    @property
    def _dense(self) -> Any:
        layers: Any = self.layer
        return layers[-1].DenseReluDense

    def extra_repr(self) -> str:
        return "oneDNN, lent by the kernels"
