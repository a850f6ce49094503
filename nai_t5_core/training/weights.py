"""The weights of a run: float32 ones that the optimizer changes, and what is computed with."""

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
    """A float32 model, and a copy of it in the compute dtype on which losses and gradients are computed.

    The copy computes just as the trained model will when it is loaded in that dtype. Gradients of every batch are
    added up in float32. In float32 the copy is the model itself.

    Args:
        model: float32, in the separate layout.
        dtype: what is computed in.
        gradient_checkpointing: keep no activations inside a block; the backward pass computes them again.
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
        """Adds ``share`` of a batch's gradient to the float32 model's; returns the mean loss of the batch's labels."""
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
    """A float32 model spread over several processes, each of which computes its part of every batch.

    Weights are rounded to the compute dtype as a block's are gathered, so there is no copy of them; norms and the sum
    of all gradients stay in float32.

    Args:
        model, dtype, gradient_checkpointing: as for :class:`MasterWeights`; the model is sharded in place.
        processes: those that take part; their shares of a batch make 1 together.
    """

    def __init__(self, model: T5, dtype: torch.dtype, gradient_checkpointing: bool, processes: Processes) -> None:
        self.count = processes.count
        if gradient_checkpointing:
            checkpoint_blocks(model)
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        self.model = self.compute = shard(model, mesh, compute_dtype=dtype)

    def add_gradients(self, batch: Batch, share: float) -> float:
        """As :meth:`MasterWeights.add_gradients`, with the gradients of all processes' batches."""
        loss = self.compute(batch.input_ids, batch.attention_mask, labels=batch.labels).loss
        assert loss is not None
        # Of the gradients the mean is taken, and the sum is wanted.
        (loss * (share * self.count)).backward()
        return float(loss.detach())

    def publish(self) -> None:
        """Nothing: the weights are read where they are."""


class CheckpointedEncoderBlock(EncoderBlock):
    """The layers of another block; of their activations only the input is kept for the backward pass."""

    def __init__(self, block: EncoderBlock) -> None:
        super().__init__(*block.layer)

    def forward(self, *inputs: object) -> Tensor:
        out: Tensor = checkpoint(super().forward, *inputs, use_reentrant=False)
        return out


class CheckpointedDecoderBlock(DecoderBlock):
    """The same for a decoder's block."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__(*block.layer)

    def forward(self, *inputs: object) -> Tensor:
        out: Tensor = checkpoint(super().forward, *inputs, use_reentrant=False)
        return out


def checkpoint_blocks(model: T5) -> None:
    """Turns on gradient checkpointing in place; names and weights stay what they are."""
    for index, block in enumerate(model.encoder.block):
        assert isinstance(block, EncoderBlock)
        model.encoder.block[index] = CheckpointedEncoderBlock(block)
    for index, block in enumerate(model.decoder.block):
        assert isinstance(block, DecoderBlock)
        model.decoder.block[index] = CheckpointedDecoderBlock(block)
