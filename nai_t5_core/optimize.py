"""Making a finished model faster, from outside: functions that take a model and give it back changed."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.encoder import T5EncoderStack
from nai_t5_core.layers import NoInit
from nai_t5_core.model import T5

Model = TypeVar("Model", T5EncoderStack, T5)

# Not their subclasses: what those do beyond a product (adapters, quantisation, offloading) packing would lose.
_PLAIN_LINEARS = (nn.Linear, NoInit.Linear)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _PLAIN_LINEARS


class PackedLinear(nn.Module):
    """A Linear without bias whose weight lies in oneDNN's own blocked order, which saves reordering it in every call.

    It is packed by the second call: a process that encodes once never pays for it. For inference on the CPU only: the
    weight is no parameter, and can neither be moved nor saved.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.plain: Tensor | None = linear.weight.detach()
        self.packed: Tensor | None = None
        self.called = False

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] to [..., out_features] in the dtype of the weight."""
        plain = self.plain
        if plain is not None and not self.called:
            self.called = True
            return F.linear(x, plain)
        if plain is not None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(plain)
            self.plain = None
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return out

    def extra_repr(self) -> str:
        state = "to be packed" if self.packed is None else "packed"
        return f"in_features={self.in_features}, out_features={self.out_features}, {state}"


def can_prepack(stack: T5EncoderStack | T5) -> bool:
    """Whether this machine's oneDNN takes this model's weights."""
    if stack.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if stack.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return stack.dtype == torch.float32


def prepack(stack: Model) -> Model:
    """Has every projection packed for fast inference on this CPU; each original is let go when its copy is made.

    Returns:
        The same model, changed. It can no longer be moved, cast, saved or trained. A tied head gets a copy of its own,
        since the embedding stays as it was.

    Raises:
        ValueError: the model is not on the CPU, or not in float32 or a bfloat16 that this processor's oneDNN supports.
    """
    if not can_prepack(stack):
        raise ValueError(
            f"cannot prepack a model in {stack.dtype} on {stack.device}: oneDNN packs float32, and bfloat16 where the "
            "processor supports it, on the CPU"
        )
    with torch.no_grad():
        # The parents alone are listed: a list of every module would keep the originals alive to the end.
        for parent in [module for module in stack.modules() if any(_is_plain(child) for child in module.children())]:
            for name in [name for name, child in parent.named_children() if _is_plain(child)]:
                setattr(parent, name, PackedLinear(getattr(parent, name)))
    return stack
