"""Live LoRAs of what is no projection: the embedding table, the tables of the position bias, and the norms.

A norm whose weight is multiplied into the projection behind it gets another that multiplies its output: what the weight
has become over what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nai_t5_core.lora.changes import Change
from nai_t5_core.lora.merge import changed, norm_ratio
from nai_t5_core.lora.set import LoraSet, NamedLoras
from nai_t5_core.model.layers import FoldedRMSNorm, RMSNorm, residual_dtype
from nai_t5_core.weights.fuse import Recipe


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
        if isinstance(base, FoldedRMSNorm):
            # What is multiplied into the projection stays what it was.
            self.register_buffer("folded_weight", base.folded_weight, persistent=False)

    @property
    def eps(self) -> float:
        base: Any = self.base
        return float(base.eps)

    def forward(self, residual: Tensor) -> Tensor:
        """[..., d_model] to the same, in its precision."""
        weight = self.weight.to(residual.device, residual.dtype)
        return F.rms_norm(residual, residual.shape[-1:], weight, self.eps)


class LiveTables(LoraSet):
    """What live LoRAs do to tables and norms; the projections are the subclass's."""

    @torch.no_grad()
    def _change(self, loras: NamedLoras, changed: Iterable[str]) -> None:
        names = set(changed)
        others = {name for name in names if not _is_projection(name)}
        before, self._loras = self._loras, loras
        try:
            # Computed before the first projection is changed, since they may be refused.
            renewed = [self._renewed_other(r) for r in self._recipes(others) if others.issuperset(r.parts)]
        finally:
            self._loras = before
        self._apply(loras, names - others)
        for path, module in renewed:
            parent, _, name = path.rpartition(".")
            setattr(self._stack.get_submodule(parent), name, module)

    def _renewed_other(self, recipe: Recipe) -> tuple[str, nn.Module]:
        """A table or norm with the present LoRAs, by itself where there are none; and where it belongs."""
        path = recipe.target.rpartition(".")[0]
        present: Any = self._stack.get_submodule(path)
        base = present.base if isinstance(present, (LiveTable, LiveNorm)) else present
        changes = [(change, factor) for _, change, factor in self._changes(recipe)]
        if not changes:
            return path, base
        if isinstance(base, (RMSNorm, FoldedRMSNorm)):
            return path, _live_norm(base, recipe.parts[0], changes)
        return path, _live_table(base, changes, self._stack.dtype)

    def _table_count(self) -> int:
        """How many tables and norms have LoRAs."""
        return sum(isinstance(module, (LiveTable, LiveNorm)) for module in self._stack.modules())


def _is_projection(name: str) -> bool:
    """Whether an original weight is that of a matrix product, and no table or norm."""
    return name.startswith("encoder.block.") and "layer_norm" not in name and "relative_attention_bias" not in name


def _live_table(base: Any, changes: list[tuple[Change, float]], dtype: torch.dtype) -> LiveTable:
    """A table with these changes beside it; ``dtype`` is that of the factors."""
    device = torch.device("cpu") if base.weight.is_meta else base.weight.device
    pairs = [(change.factors(), factor) for change, factor in changes]
    precision = residual_dtype(dtype)
    up = torch.cat([up.to(precision) * factor for (up, _), factor in pairs], dim=1).to(device, dtype)
    down = torch.cat([down.to(precision) for (_, down), _ in pairs]).to(device, dtype)
    if not (up.isfinite().all() and down.isfinite().all()):
        raise ValueError(f"the change of a table is not finite in {dtype}; take a lower strength")
    return LiveTable(base, up, down)


def _live_norm(base: RMSNorm | FoldedRMSNorm, name: str, changes: list[tuple[Change, float]]) -> LiveNorm:
    """A norm with these changes.

    Raises:
        ValueError: it is offloaded, or see :func:`nai_t5_core.lora.merge.norm_ratio`.
    """
    before = base.folded_weight if isinstance(base, FoldedRMSNorm) else base.weight.detach()
    if before.is_meta:
        raise ValueError(f"{name} is offloaded; remove the offload hooks, add, and offload again")
    after = changed(before, changes)
    return LiveNorm(base, norm_ratio(name, before, after) if isinstance(base, FoldedRMSNorm) else after)
