"""What the steps share: the device, and models that are built when a step first asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.auto_dtype import resolve_dtype
from nai_t5_core.backends.choose import prepack, why_not_prepack
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.bench.doctor.model import GivenModel, RandomModel, model_of
from nai_t5_core.bench.doctor.settings import DoctorSettings
from nai_t5_core.bench.peers import State
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import encode_guarded, guard
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.precision import resolve_device
from nai_t5_core.model.stack_runner import StackRunner

# What a step found, as plain values. Under "wrong" it lists, in words, the numbers that are not what they must be.
Finding = dict[str, Any]

_SIZES = {"cpu": "t5-v1_1-base", "mps": "t5-v1_1-large", "cuda": "t5-v1_1-large"}
_FULL_SIZES = {"cpu": "t5-v1_1-large", "mps": "t5-v1_1-xxl", "cuda": "t5-v1_1-xxl"}


class Patient:
    """The device under examination, and the model that is timed on it."""

    def __init__(self, settings: DoctorSettings) -> None:
        self.settings = settings
        self.device = resolve_device(settings.device)

    @cached_property
    def model(self) -> RandomModel | GivenModel:
        """The model that is timed."""
        name = self.settings.model or (_FULL_SIZES if self.settings.full else _SIZES)[self.device.type]
        return model_of(name, self.dtype, self.device)

    @property
    def config(self) -> T5Config:
        return self.model.config

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that ``dtype="auto"`` chooses here."""
        return resolve_dtype("auto", self.device)

    @cached_property
    def state(self) -> State:
        """Weights under Hugging Face names on the device."""
        return self.model.state

    @cached_property
    def stack(self) -> T5EncoderStack:
        """Our encoder, as ``TextEncoder.from_pretrained`` makes it: a guard of its own lets what computes it check
        results as is cheapest there.
        """
        stack = self.model.stack
        stack = prepack(stack) if why_not_prepack(stack) is None else stack
        stack.guard = guard
        return stack

    @cached_property
    def encode(self) -> Callable[..., Tensor]:
        """A function from ids, mask and padding policy to hidden states, guarded, by what ``TextEncoder`` uses here."""
        if self._takes_kernels_for_cuda:
            return encoding_by(CudaRunner(), self.stack)
        return partial(encode_guarded, self.stack)

    @property
    def _takes_kernels_for_cuda(self) -> bool:
        return self.device.type == "cuda" and CudaRunner().refusal(self.stack) is None

    @property
    def encoded_by(self) -> str:
        """What ``encode`` runs, in words."""
        if self._takes_kernels_for_cuda:
            return f"our {CudaRunner().describe(self.stack)}, in graphs"
        blocks: Any = self.stack.encoder.block
        by = "torch" if blocks[0].runner is None else blocks[0].runner.name
        if blocks[0].attends_by_itself(self.dtype):
            return f"our {by}"
        return f"{by}, attention {self.stack.describe_attention()}"

    def ids(self, batch: int, length: int) -> Tensor:
        """Random ids on the CPU, where tokenizers leave them: [batch, length]."""
        generator = torch.Generator().manual_seed(length)
        return torch.randint(self.config.vocab_size, (batch, length), generator=generator)


def encoding_by(runner: StackRunner, stack: T5EncoderStack) -> Callable[..., Tensor]:
    """A guarded function from ids, mask and padding policy to hidden states, by a runner set only during each call."""

    def encode(*inputs: Any, **options: Any) -> Tensor:
        stack.runner = runner
        try:
            return encode_guarded(stack, *inputs, **options)
        finally:
            stack.runner = None

    return encode
