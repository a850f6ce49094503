"""LoRA beside the weights of an encoder: its low-rank products are added in every call, and no weight is touched.

So it works where weights cannot be changed (packed for oneDNN, in 8 bits, offloaded), needs no copy of them, and is on
and off in an instant, at the price of two narrow products for each projection.

A LoRA is trained on the original weights. Where a norm is folded into a projection, that projection reads the input
without the norm's weight, which is multiplied into the LoRA's first factor instead; a float16 scale of the projection's
rows is multiplied into its second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.lora.set import HasStack, NamedLoras, Way
from nai_t5_core.lora.tables import LiveTables
from nai_t5_core.model.block import Backend
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import residual_dtype
from nai_t5_core.model.plain_twin import plain_weight
from nai_t5_core.weights.fuse import Recipe, folded_norm


class LiveLinear(nn.Module):
    """A projection of any kind, with a low-rank product beside it: base(x) + (x · downᵀ) · upᵀ.

    The factors move and are cast with the model, but are not saved with it.

    Args:
        base: from [tokens, in_features] to [tokens, out_features].
        down: [rank, in_features].
        up: [out_features, rank], in the dtype of ``down``.
    """

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    @property
    def out_features(self) -> int:
        return self.up.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] to [tokens, out_features] in the dtype of the base's result, rounded once more."""
        out: Tensor = self.base(x)
        return torch.addmm(out, self.narrow(x).to(out), self.up.to(out).T)

    def narrow(self, x: Tensor) -> Tensor:
        """[tokens, in_features] to [tokens, rank]."""
        # Under offloading the factors may be elsewhere than the input, and beside 8-bit weights in another dtype.
        return F.linear(x, self.down.to(x))

    def plain_weight(self, like: Tensor) -> Tensor:
        """See :func:`nai_t5_core.model.plain_twin.plain_weight`; the sum, in the residual's precision."""
        precision = residual_dtype(like.dtype)
        down, up = (factor.to(like.device, precision) for factor in (self.down, self.up))
        return torch.addmm(plain_weight(self.base, like).to(down), up, down)

    def multiply_rows(self, factor: float, first_row: int) -> None:
        """Multiplies the rows of its own part from one on; the base is the caller's."""
        self.up[first_row:] *= factor

    def extra_repr(self) -> str:
        return f"rank={self.down.shape[0]}"


class LiveLoras(LiveTables):
    """The LoRAs of one encoder, added in every call.

    >>> loras = LiveLoras(encoder)                    # TextEncoder, T5EncoderStack or NAIT5EncoderModel
    >>> loras.add("style.safetensors", 0.8)
    'style'
    >>> loras.set_strength("style", 0.5)              # computes small factors; the weights stay as they are
    >>> loras.remove("style")

    Takes weights of every kind: fused or separate, packed, in 8 bits, offloaded, and those that
    :class:`nai_t5_core.lora.loras.Loras` has changed. A block that the kernels compute is computed by oneDNN while it
    has live LoRAs. While there are live LoRAs, the model's weights can be neither saved
    nor given back: :meth:`clear` first. A compiled model is compiled anew when a LoRA comes or goes, and not when its
    strength changes.

    One such object per encoder.
    """

    way: Way = "live"

    def __init__(self, model: T5EncoderStack | HasStack) -> None:
        super().__init__(model)
        if self._changed_count():
            raise ValueError("the encoder has live LoRAs of another LiveLoras object; use that, or clear() it first")
        self._lent: dict[int, Backend] = {}

    @torch.no_grad()
    def _apply(self, loras: NamedLoras, changed: Iterable[str]) -> None:
        recipes = self._recipes(changed)
        before, self._loras = self._loras, loras
        try:
            # All are computed before anything is set.
            is_changed = {_block_of(recipe) for recipe in recipes if self._factors(recipe) is not None}
        except ValueError:
            self._loras = before
            raise
        self._lend(is_changed)
        for recipe in recipes:
            path = recipe.target.removesuffix(".weight")
            parent, _, name = path.rpartition(".")
            setattr(self._stack.get_submodule(parent), name, self._renewed(path, recipe))
        self._take_back()

    def _lend(self, indices: Iterable[int]) -> None:
        """Has blocks computed by another backend, where theirs has no place for what is added to its products."""
        block: Any
        for index in indices:
            block = self._stack.encoder.block[index]
            lending = block.runner and block.runner.lending
            if lending is not None:
                self._lent[index] = lending.back
                lending.to.bind(block, self._stack.dtype)

    def _take_back(self) -> None:
        """Gives blocks that have no live LoRA any more back to their backend."""
        for index, backend in list(self._lent.items()):
            block: Any = self._stack.encoder.block[index]
            if not any(isinstance(part, LiveLinear) for part in block.modules()):
                backend.bind(block, self._stack.dtype)
                del self._lent[index]

    def _renewed(self, path: str, recipe: Recipe) -> nn.Module:
        """The projection with the present LoRAs beside it; by itself where there are none."""
        module = self._stack.get_submodule(path)
        base: nn.Module = module.base if isinstance(module, LiveLinear) else module
        factors = self._factors(recipe)
        if factors is None:
            return base
        return LiveLinear(base, *factors)

    def _factors(self, recipe: Recipe) -> tuple[Tensor, Tensor] | None:
        """All changes of a weight as one: down [ranks, in_features] and up [out_features, ranks]."""
        stack = self._stack
        precision = residual_dtype(stack.dtype)
        norm = None if recipe.norm is None else self._norm(recipe.norm).to(precision)
        counts = self._row_counts(recipe)
        downs, ups = [], []
        for index, change, factor in self._changes(recipe):
            change_up, change_down = change.factors()
            down = change_down.to(norm) if norm is not None else change_down.to(precision)
            downs.append(down if norm is None else down * norm)
            # Rows of the other originals that lie in the same weight get nothing.
            up = torch.zeros(sum(counts), down.shape[0], dtype=precision)
            up.split(counts)[index].copy_(change_up.to(precision) * factor)
            ups.append(up)
        if not downs:
            return None
        device = torch.device("cpu") if stack.device.type == "meta" else stack.device
        down, up = (torch.cat(parts, axis).to(device, stack.dtype) for axis, parts in enumerate((downs, ups)))
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"the change of {recipe.target} is not finite in {stack.dtype}; take a lower strength")
        return down, up

    def _norm(self, name: str) -> Tensor:
        norm = self._stack.get_buffer(folded_norm(name))
        if norm.is_meta:
            raise ValueError(f"{folded_norm(name)} is offloaded; remove the offload hooks, add, and offload again")
        return norm

    def _changed_count(self) -> int:
        return sum(isinstance(module, LiveLinear) for module in self._stack.modules()) + self._table_count()


def _block_of(recipe: Recipe) -> int:
    """The number of the block that a weight belongs to."""
    return int(recipe.target.split(".")[2])
