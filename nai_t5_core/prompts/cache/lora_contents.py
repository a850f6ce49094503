"""Hashes of what LoRAs change, and the part that they have in a key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

from nai_t5_core.lora.changes import LowRankChange
from nai_t5_core.lora.files import Lora
from nai_t5_core.prompts.cache.contents import add_tensor
from nai_t5_core.prompts.cache.key import LoraUse


def uses_of(loras: Iterable[tuple[Lora, float]], way: Literal["merged", "live"] = "merged") -> tuple[LoraUse, ...]:
    """LoRAs with their strengths, in their order, as a key has them."""
    return tuple(LoraUse(lora_contents(lora), strength, way) for lora, strength in loras)


def lora_contents(lora: Lora) -> str:
    """The hash of all that a LoRA changes; its name is none of it."""
    digest = hashlib.sha256()
    for name, change in sorted(lora.changes.items()):
        factors = (change.up, change.down) if isinstance(change, LowRankChange) else (change.delta,)
        digest.update(f"{name} {type(change).__name__} {change.scale!r}\n".encode())
        for tensor in factors:
            add_tensor(digest, tensor)
    return digest.hexdigest()
