"""Whether the kernels for CUDA can run an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn

from nai_t5_core.backends.cuda.byte_weight import refuses_projection
from nai_t5_core.backends.cuda.device_refusals import BYTES_NOT_FOR_AMD, is_amd, obstacles_of
from nai_t5_core.backends.quantised.projections import QuantisedEmbedding, QuantisedLinear
from nai_t5_core.model.attention import FusedSelfAttention, SelfAttentionLayer
from nai_t5_core.model.block import is_watched, torch_is_needed
from nai_t5_core.model.encoder import Encoder, T5EncoderStack
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.layers import (
    PLAIN_LINEARS,
    FeedForward,
    FeedForwardLayer,
    FoldedRMSNorm,
    FusedGatedFeedForward,
    NoInit,
    RMSNorm,
)

# Exactly these classes: subclasses do more (adapters, quantisation, offloading).
_KNOWN = {
    *(*PLAIN_LINEARS, nn.Embedding, NoInit.Embedding, nn.ModuleList),
    *(T5EncoderStack, Encoder, EncoderBlock, SelfAttentionLayer, FeedForwardLayer, FoldedRMSNorm, RMSNorm),
    *(FusedSelfAttention, FusedGatedFeedForward, FeedForward, QuantisedLinear, QuantisedEmbedding),
}


def refuses(stack: T5EncoderStack) -> str | None:
    """Why the kernels cannot run this encoder now, in words; None if they can."""
    return next(chain(_obstacles(stack), _momentary()), None)


def refuses_for_good(stack: T5EncoderStack) -> str | None:
    """As :func:`refuses`, but regardless of whether gradients are recorded or a compiler or dispatch mode is active."""
    return next(_obstacles(stack), None)


def refuses_now() -> str | None:
    """Why the kernels cannot run any encoder now: gradients are recorded, or a compiler or dispatch mode is active."""
    return next(_momentary(), None)


def _momentary() -> Iterator[str]:
    if torch.is_grad_enabled():
        yield "gradients are recorded; call it within torch.no_grad()"
    if torch_is_needed():
        yield "a compiler or a mode of torch's watches every operation"


def _obstacles(stack: T5EncoderStack) -> Iterator[str]:
    """Why the kernels cannot run a stack. Later checks assume that the earlier ones found nothing."""
    if stack.layout != "fused":
        yield f"the model has the {stack.layout} layout; allowed: fused"
    yield from obstacles_of(stack.device, stack.dtype, stack.config.d_kv)
    # Where layers are offloaded, weights rest elsewhere than where they are read.
    devices = {stack.device, stack.shared.weight.device}
    for module in stack.modules():
        yield from _module_obstacles(module, stack.dtype, devices)


def _module_obstacles(module: nn.Module, dtype: torch.dtype, devices: set[torch.device]) -> Iterator[str]:
    """Modules, hooks, replaced forwards and tensors of other software, which the kernels would ignore."""
    kind = type(module)
    if kind not in _KNOWN:
        yield f"the model has a module of class {kind.__name__}, which computes on its own"
    if is_watched((module,)):
        yield f"a {kind.__name__} of the model has hooks, or another forward"
    if module.__dict__.get("scale", 1) != 1:
        yield f"a {kind.__name__} is scaled from outside of its weights"
    if isinstance(module, QuantisedLinear | QuantisedEmbedding):
        yield from _quantised_obstacles(module, devices)
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if type(weight) is not nn.Parameter:
        yield f"a weight is a {type(weight).__name__}; allowed: plain parameters"
    needed = torch.float32 if kind is RMSNorm else dtype
    if weight.dtype != needed or weight.device not in devices or not weight.is_contiguous():
        yield (
            f"the weight of a {kind.__name__} is in {weight.dtype} on {weight.device}, or not contiguous; "
            f"needed: {needed} on {' or '.join(map(str, devices))}"
        )


def _quantised_obstacles(module: QuantisedLinear | QuantisedEmbedding, devices: set[torch.device]) -> Iterator[str]:
    if any(map(is_amd, devices)):
        yield BYTES_NOT_FOR_AMD
    forms = module.forms if isinstance(module, QuantisedLinear) else (module.form,)
    if any(form.weight.device not in devices for form in forms):
        yield f"a quantised weight is on {forms[0].weight.device}; needed: {' or '.join(map(str, devices))}"
    if isinstance(module, QuantisedLinear) and (reason := refuses_projection(module)):
        yield reason
