"""How hidden states of a padded batch are computed: by a loaded encoder, in parts that bound the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.kernels.runners import KernelsInPlace
from nai_t5_core.float16.guard import encode_guarded
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.prompts.encoding import Pads
from nai_t5_core.weights.load_report import LoadReport


class StackEncoding:
    """Encodes with a loaded encoder."""

    is_loaded = True

    def __init__(self, stack: T5EncoderStack, report: LoadReport | None = None) -> None:
        self.stack, self.report = stack, report
        self.source = None if report is None else report.source

    def __call__(self, ids: Tensor, mask: Tensor, pads: Pads, device: str | torch.device | None) -> Tensor:
        """[batch, length, d_model], computed in parts of at most ``token_budget`` rows."""
        parts = []
        for part in _parts(mask, pads):
            states = encode_guarded(self.stack, ids[part], mask[part], padding=pads.padding, extra_pad=pads.extra_pad)
            parts.append(states if device is None else states.to(device))
        if len(parts) == 1:
            return parts[0]
        length = max(states.shape[1] for states in parts)
        out = parts[0].new_zeros(len(ids), length, self.stack.config.d_model)
        start = 0
        for states in parts:
            out[start : start + len(states), : states.shape[1]] = states
            start += len(states)
        return out

    def __repr__(self) -> str:
        stack = self.stack
        size = stack.config.size_name or f"d_model {stack.config.d_model}"
        place = str(stack.device) if stack.offload is None else f"{stack.device}, offloaded layer by layer"
        facts = [stack.config.kind, size, str(stack.dtype), place, computed_by(stack)]
        return f"{', '.join(filter(None, facts))}, attention={stack.describe_attention()}"


def computed_by(stack: T5EncoderStack) -> str:
    """What computes the blocks in place of their modules; what computes the whole stack is told with its attention."""
    block: Any = stack.encoder.block[0]
    runner = block.runner
    if runner is None or stack.runner is not None or stack.device.type != "cpu":
        return ""
    leaves_it_to_modules = isinstance(runner, KernelsInPlace) and not runner.attends(block, stack.dtype)
    return "" if leaves_it_to_modules else str(runner.name)


def _parts(mask: Tensor, pads: Pads) -> Iterator[slice]:
    """Runs of consecutive prompts that fit into the token budget; a prompt that exceeds it is a run by itself."""
    computes_pads = pads.padding in ("attend", "exact")
    costs = [mask.shape[1]] * len(mask) if computes_pads else mask.sum(dim=1).tolist()
    start, total = 0, 0
    for index, cost in enumerate(costs):
        if index > start and total + cost > pads.token_budget:
            yield slice(start, index)
            start, total = index, 0
        total += cost
    yield slice(start, len(costs))
