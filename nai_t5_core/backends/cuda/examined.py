"""A stack that was examined, and whether it is still what was examined: cheap enough for every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nai_t5_core.backends.cuda.block import CudaBlocks
from nai_t5_core.backends.cuda.launches import Documents, Watch
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.cuda.torch_products import Products
from nai_t5_core.model.encoder import T5EncoderStack


class ExaminedStack:
    """What is read of a stack that the kernels can run.

    Raises:
        ValueError: they cannot run it.
    """

    def __init__(self, stack: T5EncoderStack, biases: Tensor) -> None:
        refuse(refuses_for_good(stack))
        self._stack = stack
        self._blocks = CudaBlocks.of(stack, biases)
        modules = list(stack.modules())
        self._modules = modules
        self._attributes = [module.__dict__ for module in modules]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        # Of modules and of their parameters, by name; those of leaves are empty, and become other objects never.
        self._members: list[dict[str, Any]] = [module._modules for module in modules]
        self._members += [module._parameters for module in modules]
        self._weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        self._state = self._present_state()

    @property
    def is_unchanged(self) -> bool:
        """Whether all modules, weights and scales are the same, the weights at the same place with any values."""
        return self._present_state() == self._state

    def encode(self, products: Products, ids: Tensor, documents: Documents, watch: Watch) -> Tensor:
        """Packed ids [tokens] to hidden states [tokens, d_model]; rows of no document come out as anything."""
        return self._blocks(self._stack.embed(ids), documents, products, watch)

    def _present_state(self) -> tuple[Any, ...]:
        attributes = self._attributes
        return (
            any(self._hooks),
            any("forward" in found for found in attributes),
            [found.get("out_scale", found.get("scale")) for found in attributes],
            self._stack.scales,
            list(map(type, self._modules)),
            [id(member) for members in self._members for member in members.values()],
            [weight.data_ptr() for weight in self._weights],
        )


def refuse(reason: str | None) -> None:
    """Raises a ValueError with the reason, if there is one."""
    if reason:
        raise ValueError(f"the kernels for CUDA cannot run this encoder: {reason}; call the encoder itself")
