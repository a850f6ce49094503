"""The drop-in class with its layers in the host's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nai_t5_core.backends.offload.offload import offload_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Base

    from nai_t5_core.model.encoder import T5EncoderStack
else:
    Base = object


class OffloadsLayers(Base):
    """A model of transformers that may have its weights elsewhere than where it computes."""

    if TYPE_CHECKING:
        # The drop-in class has it.
        @property
        def stack(self) -> T5EncoderStack: ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        offload = self.stack.offload
        device: torch.device = (offload and offload.device) or super().device
        return device

    def enable_layerwise_offload(self) -> None:
        """Has the weights rest in the host's memory from now on, and each layer brought to the GPU for its work.

        ``to("cuda")``, a pipeline's too, then says where it computes, and takes the memory of two layers there. See
        :func:`nai_t5_core.backends.offload.offload.offload_layers`.

        Raises:
            ValueError: weights in 8 bits for the CPU, or hooks of another offloading.
            MemoryError: the system does not lock as much memory as the weights take.
        """
        offload_layers(self.stack)
