"""The weights of a run: float32 ones that the optimizer changes, and those in the compute dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from nai_t5_core.backends.sharding import shard
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import NoInit
from nai_t5_core.training.batches import Batch
from nai_t5_core.training.processes import Processes


class MasterWeights:
    """A float32 model, and a copy in the compute dtype that computes losses and gradients.

    The copy computes exactly as the trained model does when loaded in that dtype. Gradients are accumulated in float32.
    If the compute dtype is float32, the copy is the model itself.

    Args:
        model: float32, in the separate layout.
        dtype: the compute dtype.
        gradient_checkpointing: keep only the inputs of blocks; the backward pass computes their activations again.
    """

    def __init__(self, model: T5, dtype: torch.dtype, gradient_checkpointing: bool = False) -> None:
        self.model = model
        if dtype == model.dtype:
            self.compute = model
        else:
            self.compute = T5(model.config, model.layout, NoInit, device=model.device, dtype=dtype)
        if gradient_checkpointing:
            checkpoint_blocks(self.compute)
        self.publish()

    def add_gradients(self, batch: Batch, share: float) -> float:
        """Adds ``share`` times a batch's gradient to the float32 gradients; returns the mean loss of its labels."""
        loss = self.compute(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
        assert loss is not None
        (loss * share).backward()
        for master, copy in self._copies():
            if copy.grad is not None:
                gradient = copy.grad.to(master.dtype)
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                copy.grad = None
        return float(loss.detach())

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the float32 weights into the copy."""
        for master, copy in self._copies():
            copy.copy_(master)

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        if self.compute is self.model:
            return []
        return list(zip(self.model.parameters(), self.compute.parameters(), strict=True))


class ShardedWeights:
    """A float32 model sharded over several processes, each of which computes its rows of every batch.

    A block's weights are rounded to the compute dtype when they are gathered, so there is no permanent copy; norms and
    the accumulated gradients stay in float32.

    Args:
        model, dtype, gradient_checkpointing: as for :class:`MasterWeights`; the model is sharded in place.
        processes: those that train together; their shares of a batch sum to 1.
    """

    def __init__(self, model: T5, dtype: torch.dtype, gradient_checkpointing: bool, processes: Processes) -> None:
        self.count = processes.count
        if gradient_checkpointing:
            checkpoint_blocks(model)
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        self.model = self.compute = shard(model, mesh, compute_dtype=dtype)

    def add_gradients(self, batch: Batch, share: float) -> float:
        """As :meth:`MasterWeights.add_gradients`, for the gradients of all processes together."""
        loss = self.compute(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
        assert loss is not None
        # FSDP averages the gradients over the processes; multiplied by their number, that is the sum.
        (loss * (share * self.count)).backward()
        return float(loss.detach())

    def publish(self) -> None:
        """Does nothing, since there is no copy."""


class CheckpointedEncoderBlock(EncoderBlock):
    """A block with gradient checkpointing, of another block's layers: it keeps only its input for the backward pass."""

    def __init__(self, block: EncoderBlock) -> None:
        super().__init__(*block.layer)

    def forward(self, *inputs: object) -> Tensor:
        out: Tensor = checkpoint(super().forward, *inputs, use_reentrant=False)
        return out


class CheckpointedDecoderBlock(DecoderBlock):
    """A decoder block with gradient checkpointing, see :class:`CheckpointedEncoderBlock`."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__(*block.layer)

    def forward(self, *inputs: object) -> Tensor:
        out: Tensor = checkpoint(super().forward, *inputs, use_reentrant=False)
        return out


def checkpoint_blocks(model: T5) -> None:
    """Turns on gradient checkpointing in place; names and weights do not change."""
    for index, block in enumerate(model.encoder.block):
        assert isinstance(block, EncoderBlock)
        model.encoder.block[index] = CheckpointedEncoderBlock(block)
    for index, block in enumerate(model.decoder.block):
        assert isinstance(block, DecoderBlock)
        model.decoder.block[index] = CheckpointedDecoderBlock(block)
