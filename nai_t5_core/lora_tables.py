"""Live LoRAs of what is no projection: the embedding table, the tables of the position bias, and the norms.

A norm whose weight is multiplied into the projection behind it gets another that multiplies its output: what the weight
has become over what it was.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.layers import residual_dtype
from nai_t5_core.lora_changes import Change
from nai_t5_core.lora_merge import changed, norm_ratio


class LiveTable(nn.Module):
    """An embedding with a product beside it: base(ids) + up[ids] · down. Only the base is saved with the model.

    Args:
        base: from ids to [..., width].
        up: [rows, rank].
        down: [rank, width], in the dtype of ``up``.
    """

    up: Tensor
    down: Tensor

    def __init__(self, base: nn.Module, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table without its LoRAs, which tells dtype and device."""
        base: Any = self.base
        weight: Tensor = base.weight
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to [..., width], in the residual's precision."""
        out = self.base(ids)
        out = out.to(residual_dtype(out.dtype))
        rows = F.embedding(ids.to(self.up.device), self.up)
        return out + (rows.to(out) @ self.down.to(out))

    def extra_repr(self) -> str:
        return f"rank={self.down.shape[0]}"


class LiveNorm(nn.Module):
    """A norm with another weight than it has: of a folded one, the factor of its output. Only the base is saved."""

    weight: Tensor

    def __init__(self, base: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("weight", weight, persistent=False)
        # What is multiplied into the projection stays what it was.
        if hasattr(base, "folded_weight"):
            self.register_buffer("folded_weight", base.folded_weight, persistent=False)

    @property
    def eps(self) -> float:
        base: Any = self.base
        return float(base.eps)

    def forward(self, residual: Tensor) -> Tensor:
        """[..., d_model] to the same, in its precision."""
        weight = self.weight.to(residual.device, residual.dtype)
        return F.rms_norm(residual, residual.shape[-1:], weight, self.eps)


def live_table(base: nn.Module, changes: list[tuple[Change, float]], dtype: torch.dtype) -> nn.Module:
    """A table with these changes beside it; by itself where there are none. ``dtype`` is that of the factors."""
    if not changes:
        return base
    place: Any = base
    device = torch.device("cpu") if place.weight.is_meta else place.weight.device
    pairs = [(change.factors(), factor) for change, factor in changes]
    up = torch.cat([up.float() * factor for (up, _), factor in pairs], dim=1).to(device, dtype)
    down = torch.cat([down.float() for (_, down), _ in pairs]).to(device, dtype)
    if not (up.isfinite().all() and down.isfinite().all()):
        raise ValueError(f"the change of a table is not finite in {dtype}; take a lower strength")
    return LiveTable(base, up, down)


def live_norm(base: nn.Module, name: str, changes: list[tuple[Change, float]]) -> nn.Module:
    """A norm with these changes; by itself where there are none.

    Raises:
        ValueError: it is offloaded, or see :func:`nai_t5_core.lora_merge.norm_ratio`.
    """
    if not changes:
        return base
    own: Any = base
    is_folded = hasattr(base, "folded_weight")
    before: Tensor = own.folded_weight if is_folded else own.weight.detach()
    if before.is_meta:
        raise ValueError(f"{name} is offloaded; remove the offload hooks, add, and offload again")
    after = changed(before, changes)
    return LiveNorm(base, norm_ratio(name, before, after) if is_folded else after)
