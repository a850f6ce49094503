"""What a load did, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nai_t5_core.model.encoder import Layout


@dataclass(frozen=True)
class LoadReport:
    """What a load did."""

    source: str
    format: str
    kind: str
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    used: tuple[str, ...]
    ignored: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.kind} from {self.source} ({self.format}): {len(self.used)} tensors used, "
            f"{len(self.ignored)} ignored, none missing; {self.layout} layout, {self.dtype}, {self.device}, "
            f"{self.seconds:.2f} s"
        ]
        for reason, names in by_reason(self.ignored).items():
            lines.append(f"  ignored {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "") + f": {reason}")
        return "\n".join(lines)


def by_reason(ignored: dict[str, str]) -> dict[str, list[str]]:
    """The ignored names under each reason for ignoring them."""
    reasons: dict[str, list[str]] = {}
    for name, reason in ignored.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
