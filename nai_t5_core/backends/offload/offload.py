"""An encoder that is offloaded layer by layer: where it computes, and what computes its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.backends.cuda.byte_weight import lay_as_in_file, lay_out_all
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.offload.kernels import KernelsLayerByLayer
from nai_t5_core.backends.offload.mover import CudaMover, Mover
from nai_t5_core.backends.offload.ring import Ring, lock_weights
from nai_t5_core.backends.offload.weights import Layout, refuse_hooked, replace_parameters, shadow, weights_of
from nai_t5_core.model.alterations import Alterations
from nai_t5_core.model.block import Block, BlockRunner, Lending
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.fixed_weights import FixedWeights
from nai_t5_core.model.inputs import moved
from nai_t5_core.model.layers import FoldedRMSNorm

CPU = torch.device("cpu")
# Where a stack that is offloaded may compute.
_COMPUTING = ("cpu", "cuda")


def offload_layers(
    stack: T5EncoderStack, device: torch.device | str | None = None, by_kernels: bool = True
) -> T5EncoderStack:
    """Has a stack's weights rest in the host's memory, wherever it is moved from now on.

    ``stack.to("cuda")`` then says where it computes: each layer is brought there for its work. On the CPU it computes
    as ever. It cannot be cast or trained any more; LoRA, saving and copying see the weights where they rest. Who writes
    to a weight by other means waits for the device first, as the guard does in every call.

    Calls of other threads that run are waited for. From then on they compute one at a time.

    Args:
        stack: in any layout and dtype, also with weights that stay quantised; not prepacked or compiled.
        device: where it computes, at once; by default where it is.
        by_kernels: by our kernels for CUDA, where they can; else by torch.

    Returns:
        The same stack.

    Raises:
        ValueError: it is prepacked, in 8 bits for the CPU or compiled; a device that is neither CPU nor CUDA; hooks of
            other software's offloading.
        MemoryError: the system does not lock as much memory as its weights take.
    """
    device = None if device is None else torch.device(device)
    if device is not None and device.type not in _COMPUTING:
        raise ValueError(
            f"the encoder is to be offloaded to {device}; its layers come from the host's memory to CUDA "
            "alone, or stay on the CPU"
        )
    with stack.turns.change():
        if stack.offload is not None:
            return stack if device is None else stack.to(device)
        _refuse(stack)
        with _unless_it_fails(stack):
            device = device or stack.device
            stack.to(CPU).requires_grad_(False)
            stack.runner, stack.turns.one_at_a_time = None, True
            stack.offload = Offload(stack, by_kernels)
            return stack.to(device)


@contextmanager
def _unless_it_fails(stack: T5EncoderStack) -> Iterator[None]:
    """Offloads a stack within, or leaves it as it was."""
    device, runner = stack.device, stack.runner
    needed = [(weight, weight.requires_grad) for weight in stack.parameters()]
    blocks: Any = stack.encoder.block
    runners = [block.runner for block in blocks]
    try:
        yield
    except BaseException:
        stack.offload, stack.runner, stack.turns.one_at_a_time = None, runner, False
        for block, own in zip(blocks, runners, strict=True):
            block.runner = own
        lay_as_in_file(stack)
        stack.to(device)
        for weight, is_needed in needed:
            weight.requires_grad_(is_needed)
        raise


def _refuse(stack: T5EncoderStack) -> None:
    fixed = next((each for each in stack.modules() if isinstance(each, FixedWeights) and not _can_move(each)), None)
    if fixed is not None:
        raise ValueError(
            "the encoder is prepacked or quantised for the CPU, and its layers cannot be offloaded; load it anew "
            "without that"
        )
    if stack.runner is not None and not isinstance(stack.runner, CudaRunner):
        raise ValueError(
            f"the encoder is computed as a whole ({stack.runner.name}), and its layers cannot be offloaded; load it "
            "anew without that"
        )
    for block in stack.encoder.block:
        refuse_hooked(block)


def _can_move(module: FixedWeights) -> bool:
    try:
        module.refuse_change(lambda weight: weight.to("meta"))
    except ValueError:
        return False
    return True


class Offload:
    """Where a stack computes whose weights rest in the host's memory. The stack and its blocks hold it.

    Attributes:
        device: where it computes; None where the weights rest, on the CPU.
    """

    def __init__(
        self, stack: T5EncoderStack, by_kernels: bool, make_mover: Callable[[torch.device], Mover] = CudaMover
    ) -> None:
        self.device: torch.device | None = None
        self._alterations: Alterations = stack.alterations
        self._by_kernels, self._make_mover = by_kernels, make_mover
        self._count, self._nbytes = len(stack.encoder.block), 0
        self._ring: Ring | None = None
        block: Any
        for index, block in enumerate(stack.encoder.block):
            block.runner = OffloadedBlock(index, self, block.runner)

    @property
    def ring(self) -> Ring:
        """What brings the layers; made anew for a copy of the stack."""
        if self._ring is None:
            assert self.device is not None
            self._ring = Ring(self._make_mover(self.device), self._count, self._nbytes, self._tell)
        return self._ring

    def move(self, stack: T5EncoderStack, change: Callable[[Tensor], Tensor]) -> None:
        """In place of a change of all parameters: another device to compute on.

        Raises:
            ValueError: the change casts, or goes to a device that is neither CPU nor CUDA.
            MemoryError: the system does not lock as much memory as the weights take. The stack is where it was.
        """
        then = change(torch.empty(0, dtype=stack.dtype))
        if then.dtype != stack.dtype or then.device.type not in _COMPUTING:
            raise ValueError(
                f"the encoder's layers are offloaded from the host's memory in {stack.dtype}, and it cannot be moved "
                f"or cast to {then.dtype} on {then.device}; load it anew in that dtype, or without offload=True"
            )
        if then.device.type == "cpu":
            self.rest(stack)
        elif self.device is None or then.device != self.device:
            self.start(stack, self._make_mover(then.device))

    def start(self, stack: T5EncoderStack, mover: Mover) -> None:
        """Has the stack compute on a mover's device, with locked weights.

        Raises:
            MemoryError: as of :meth:`move`.
        """
        for block in stack.encoder.block:
            refuse_hooked(block)
        with stack.turns.change(), ExitStack() as undone:
            before, self.device = self.device, mover.device
            undone.callback(setattr, self, "device", before)
            are_read = self._by_kernels and refuses_for_good(stack) is None
            for block in stack.encoder.block:
                if are_read:
                    self._tell(partial(lay_out_all, block))
                if (memory := lock_weights(block, mover, self._tell)) is not None:
                    undone.callback(mover.unlock, memory)
            nbytes = max(Layout.of(weights_of(block)).nbytes for block in stack.encoder.block)
            ring = Ring(mover, self._count, nbytes, self._tell, stack.encoder.block)
            undone.callback(_move_the_rest, stack, before or CPU)
            runner = KernelsLayerByLayer(self) if self._by_kernels else None
            self._tell(lambda: _compute_on(stack, mover.device, runner))
            undone.pop_all()
            self._nbytes, self._ring = nbytes, ring

    def rest(self, stack: T5EncoderStack) -> None:
        """Has the stack compute where its weights are; what it had on a device is freed."""
        with stack.turns.change():
            self.device = self._ring = None
            self._tell(lambda: _compute_on(stack, CPU, None))

    def rows(self, table: nn.Module, ids: Tensor) -> Tensor:
        """See :class:`nai_t5_core.model.offloading.Offloading`."""
        if self.device is None:
            rows: Tensor = table(ids)
            return rows
        weight: Any = table.weight
        return moved(table(ids.to(weight.device)), self.device)

    def _tell(self, change: Callable[[], None]) -> None:
        with self._alterations.by("offloaded", lambda: None):
            change()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ring": None}


def _compute_on(stack: T5EncoderStack, device: torch.device, runner: KernelsLayerByLayer | None) -> None:
    # Told as one change: a cache of prompts looks at what computes as well.
    _move_the_rest(stack, device)
    stack.runner = runner


@torch.no_grad()
@torch.inference_mode(False)
def _move_the_rest(stack: T5EncoderStack, device: torch.device) -> None:
    """Moves all that is not brought layer by layer: tables of the position bias, the last norm, live LoRAs."""
    brought = {id(weight) for block in stack.encoder.block for weight in weights_of(block)}
    for module in stack.encoder.modules():
        replace_parameters(module, lambda weight: weight if id(weight) in brought else weight.to(device))
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(module, FoldedRMSNorm):
                module._buffers[name] = buffer.to(device)


@dataclass(eq=False)
class OffloadedBlock:
    """The runner of a block whose weights rest elsewhere than where it computes.

    Attributes:
        resting: what computes the block where its weights rest.
    """

    index: int
    offload: Offload
    resting: BlockRunner | None
    lending: Lending | None = None

    @property
    def name(self) -> str:
        if self.offload.device is None:
            return "" if self.resting is None else self.resting.name
        return f"brought to {self.offload.device}"

    def __call__(self, block: Block, residual: Tensor, *attends_and_dtype: Any) -> Tensor | None:
        if self.offload.device is None:
            # What computes on the CPU reads the bytes of a file. Who only rests is not laid anew.
            lay_as_in_file(block)
            return None if self.resting is None else self.resting(block, residual, *attends_and_dtype)
        refuse_gradients(block, residual)
        with self.offload.ring.layer(self.index, block) as place:
            return shadow(block, place).by_modules(residual, *attends_and_dtype)

    def attends(self, block: Block, dtype: torch.dtype) -> bool:
        return self.offload.device is None and self.resting is not None and self.resting.attends(block, dtype)

    def forget(self) -> None:
        if self.resting is not None:
            self.resting.forget()


def refuse_gradients(block: nn.Module, residual: Tensor) -> None:
    """Raises a ValueError where a gradient would be recorded: the weights are gone when it is computed."""
    if torch.is_grad_enabled() and (residual.requires_grad or any(each.requires_grad for each in weights_of(block))):
        raise ValueError(
            "an offloaded encoder computes no gradients, since its weights come and go: call it within "
            "torch.no_grad(), or load it without offload=True to train"
        )
