"""Making a finished model faster, from outside: functions that take a model and give it back changed."""

from __future__ import annotations

import itertools
from typing import Any, Literal, TypeVar, get_args
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.backends.packed_block import PackedBlock
from nai_t5_core.facts.config import Activation
from nai_t5_core.kernels.build import prepare_kernels, why_not_kernels
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.encoder_block import EncoderBlock
from nai_t5_core.model.fixed_weights import FixedWeights
from nai_t5_core.model.kernel_block import PLAIN_LINEARS
from nai_t5_core.model.layers import ACTIVATIONS, FeedForward, FusedGatedFeedForward, GatedFeedForward, scaled
from nai_t5_core.model.t5 import T5Model

Model = TypeVar("Model", bound=T5EncoderStack | T5Model)

ProductsChoice = Literal["auto", "kernels", "onednn"]
PRODUCTS_CHOICES: tuple[ProductsChoice, ...] = get_args(ProductsChoice)

# How oneDNN names what it does to a product before rounding it.
_POST_OPERATIONS: dict[Activation | None, tuple[str, list[Any], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu_new": ("gelu", [], "tanh"),
    "gelu": ("gelu", [], "none"),
    "silu": ("swish", [], ""),
}

# By which a compiled graph finds the modules of its products, for it cannot hold weights in oneDNN's order.
_NUMBERS = itertools.count()
_BY_NUMBER: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


class PackedLinear(FixedWeights):
    """A product with a weight that lies in oneDNN's own blocked order, which saves reordering it in every call.

    It is packed by the second call: a process that encodes once never pays for it. For inference on the CPU only: the
    weight is no parameter, and can neither be moved nor saved.

    Args:
        weight: [out_features, in_features].
        activation: applied to the product before it is rounded.
    """

    def __init__(self, weight: Tensor, activation: Activation | None = None) -> None:
        super().__init__(weight.dtype)
        self._take_number()
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.plain: Tensor | None = weight.detach()
        self.packed: Tensor | None = None
        self.called = False

    def forward(self, x: Tensor, factor: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        """act(x · weightᵀ + addend) · factor: […, in_features] to […, out_features] in the dtype of the weight.

        ``factor`` and ``addend`` are [..., out_features]; the factor only for products without activation.

        Raises:
            RuntimeError: gradients of ``x`` are recorded.
        """
        self.refuse_gradients(x)
        if torch.compiler.is_compiling():
            product: Tensor = torch.ops.nai_t5.packed_product(x, self.number, self.out_features, factor, addend)
            return product
        return self.product(x, factor, addend)

    def product(self, x: Tensor, factor: Tensor | None, addend: Tensor | None) -> Tensor:
        """See :meth:`forward`."""
        if self.plain is not None:
            if not self.called:
                self.called = True
                product = F.linear(x, self.plain)
                return self._finished(product if addend is None else product + addend, factor)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain)
            self.plain = None
        pointwise = torch.ops.mkldnn._linear_pointwise
        out: Tensor
        if addend is not None:
            out = self._finished(pointwise.binary(x, addend, self.packed, None, "add"), factor)
        elif factor is not None:
            out = pointwise.binary(x, factor, self.packed, None, "mul")
        else:
            out = pointwise(x, self.packed, None, *_POST_OPERATIONS[self.activation])
        return out

    def plain_weight(self, path: str, like: Tensor) -> Tensor:
        """See :func:`nai_t5_core.backends.plain_twin.plain_weight`; the very numbers that were given."""
        if self.plain is not None:
            return self.plain
        assert self.packed is not None
        return self.packed.to_dense()

    def _take_number(self) -> None:
        # A tensor, since a plain number would be compiled into the graph, which then served one module alone.
        self.number = torch.tensor(next(_NUMBERS), device="cpu")
        _BY_NUMBER[int(self.number)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and what comes back from a file have a number of their own."""
        super().__setstate__(state)
        self._take_number()

    def _finished(self, product: Tensor, factor: Tensor | None) -> Tensor:
        if self.activation is not None:
            product = ACTIVATIONS[self.activation](product)
        return product if factor is None else product * factor

    def extra_repr(self) -> str:
        state = "to be packed" if self.packed is None else "packed"
        activation = f", {self.activation}" if self.activation else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{activation}, {state}"


@torch.library.custom_op("nai_t5::packed_product", mutates_args=())
def _packed_product(
    x: Tensor, number: Tensor, out_features: int, factor: Tensor | None, addend: Tensor | None
) -> Tensor:
    """The product of the module with this number."""
    return _BY_NUMBER[int(number)].product(x, factor, addend)


@_packed_product.register_fake
def _(x: Tensor, number: Tensor, out_features: int, factor: Tensor | None, addend: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class PackedFeedForward(nn.Module):
    """wo(act(wi(x))), with the activation inside the first product."""

    def __init__(self, wi: Tensor, wo: Tensor, activation: Activation, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.wi = PackedLinear(wi, activation)
        self.wo = PackedLinear(wo)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, d_model] to [tokens, d_model]."""
        out: Tensor = self.wo(self.wi(scaled(hidden, self.scale)))
        return out


class PackedGatedFeedForward(nn.Module):
    """wo(act(gate(x)) · up(x)), with activation and gating inside the products: each is rounded once, not twice."""

    def __init__(self, gate: Tensor, up: Tensor, wo: Tensor, activation: Activation, up_scale: float = 1.0) -> None:
        super().__init__()
        self.up_scale = up_scale
        self.gate = PackedLinear(gate, activation)
        self.up = PackedLinear(up)
        self.wo = PackedLinear(wo)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, d_model] to [tokens, d_model]."""
        out: Tensor = self.wo(self.up(scaled(hidden, self.up_scale), self.gate(hidden)))
        return out

    def plain_weight(self, path: str, like: Tensor) -> Tensor:
        """See :func:`nai_t5_core.backends.plain_twin.plain_weight`; gate and up go by their names in either layout."""
        projections: dict[str, tuple[Any, ...]] = {
            "wi": (self.gate, self.up),
            "wi_0": (self.gate,),
            "wi_1": (self.up,),
            "wo": (self.wo,),
        }
        return torch.cat([projection.plain_weight("", like) for projection in projections[path]])


def can_prepack(stack: T5EncoderStack | T5Model) -> bool:
    """Whether this machine can pack this model's weights."""
    return packs(stack.device, stack.dtype)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype on this device can be packed."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def prepack(stack: Model, products: ProductsChoice = "auto") -> Model:
    """Has every projection packed for fast inference on this CPU; each original is let go when its copy is made.

    Args:
        products: ``"auto"`` has the blocks of the encoder computed by the kernels where these can do it and are faster
            (see :mod:`nai_t5_core.kernels`), and all else by oneDNN; ``"kernels"`` takes them wherever the processor
            has the instructions, and is an error elsewhere; ``"onednn"`` does without them.

    Returns:
        The same model, changed. It can no longer be moved, cast, saved or trained. A tied head gets a copy of its own,
        since the embedding stays as it was.

    Raises:
        ValueError: the model is not on the CPU, or not in float32 or a bfloat16 that this processor's oneDNN supports;
            or the kernels were asked for and cannot compute it.
    """
    if not can_prepack(stack):
        raise ValueError(
            f"cannot prepack a model in {stack.dtype} on {stack.device}: oneDNN packs float32, and bfloat16 where the "
            "processor supports it, on the CPU"
        )
    take_blocks(stack, products, PackedBlock)
    pack_children(stack)
    return stack


def take_blocks(stack: T5EncoderStack | T5Model, products: ProductsChoice, form: type[PackedBlock]) -> None:
    """Puts the encoder's blocks into a form for the kernels, if that is wanted and possible.

    Raises:
        ValueError: unknown products, or the kernels were asked for and cannot compute this model.
    """
    if products not in PRODUCTS_CHOICES:
        raise ValueError(f"unknown products {products!r}; allowed: {', '.join(PRODUCTS_CHOICES)}")
    if products == "onednn" or (products == "auto" and why_not_kernels()):
        return
    blocks = stack.encoder.block
    if all(form.takes(block) for block in blocks):
        obstacle = prepare_kernels()
    else:
        obstacle = "the model has scales, an activation that the kernels do not know, or projections of other classes"
    if obstacle and products == "kernels":
        raise ValueError(f"products='kernels' is not possible: {obstacle}; use products='auto' or 'onednn'")
    for index, block in enumerate(() if obstacle else blocks):
        assert isinstance(block, EncoderBlock)
        blocks[index] = form(block, stack.dtype)


def is_packed(model: nn.Module) -> bool:
    """Whether any weight of a model is packed, by :func:`prepack` or in 8 bits for the kernels."""
    return any(isinstance(module, PackedLinear | PackedBlock) for module in model.modules())


def pack_children(parent: nn.Module) -> None:
    """Puts the packed form of every projection into its place, but for those of the kernels."""
    for name, child in parent.named_children():
        if isinstance(child, PackedBlock):
            continue
        packed = _packed(child)
        if packed is None:
            pack_children(child)
        else:
            setattr(parent, name, packed)


def _packed(module: nn.Module) -> nn.Module | None:
    """The packed form of a projection or feed-forward; None for everything else."""
    if isinstance(module, nn.Linear) and type(module) in PLAIN_LINEARS:
        return PackedLinear(module.weight)
    if not all(type(child) in PLAIN_LINEARS for child in module.children()):
        return None
    if isinstance(module, FeedForward):
        return PackedFeedForward(module.wi.weight, module.wo.weight, module.activation, module.scale)
    if isinstance(module, GatedFeedForward):
        gate, up, wo = module.wi_0.weight, module.wi_1.weight, module.wo.weight
        return PackedGatedFeedForward(gate, up, wo, module.activation, module.scale)
    if isinstance(module, FusedGatedFeedForward):
        gate, up = module.wi.weight.detach().chunk(2)
        return PackedGatedFeedForward(gate, up, module.wo.weight, module.activation)
    return None
