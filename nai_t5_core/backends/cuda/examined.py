"""What the kernels read of a stack, and whether the stack has changed since; cheap enough for every call."""

from __future__ import annotations

import weakref

from torch import Tensor

from nai_t5_core.backends.cuda.block import CudaBlocks, cuda_blocks
from nai_t5_core.backends.cuda.launches import Documents, Watch
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.cuda.torch_products import Products, sums_in_float32
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.model.block import ModulesRecord
from nai_t5_core.model.encoder import T5EncoderStack


class ExaminedStack:
    """References to the weights and sizes of a stack that the kernels can run.

    Raises:
        ValueError: the kernels cannot run the stack.
    """

    def __init__(self, stack: T5EncoderStack, biases: Tensor) -> None:
        refuse(refuses_for_good(stack))
        # No reference to the stack is kept: the stack may hold this object.
        self._stack = weakref.proxy(stack)
        # The layers by themselves, for one who brings their weights.
        self.resting = cuda_blocks(stack, biases)
        self.blocks = CudaBlocks.of(stack, self.resting)
        modules = list(stack.modules())[1:]
        self._seen = ModulesRecord(modules, [stack._modules])
        # Moving a projection, or another scale, gives it other forms.
        self._forms = [(module, module.forms) for module in modules if isinstance(module, QuantisedLinear)]
        self._scales = stack.scales

    @property
    def is_unchanged(self) -> bool:
        """Whether modules, weights, the weights' addresses and the scales are as they were; values may differ."""
        is_same = all(linear.forms is forms for linear, forms in self._forms)
        return is_same and self._stack.scales == self._scales and self._seen.is_same

    def encode(self, products: Products, ids: Tensor, documents: Documents, watch: Watch) -> Tensor:
        """Packed ids [tokens] to hidden states [tokens, d_model]; rows of no document have undefined values."""
        with sums_in_float32():
            return self.blocks(self._stack.embed(ids), documents, products, watch)


def refuse(reason: str | None) -> None:
    """Raises a ValueError with the reason, if there is one."""
    if reason:
        raise ValueError(f"the kernels for CUDA cannot run this encoder: {reason}; call the encoder itself")
