"""Embeddings of a CLIP that are kept, and its weights, which may come late."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from comfy_nai_t5.clip_key import NotKnownError, key_of
from comfy_nai_t5.quantised import quantised_modules
from nai_t5_core.prompts.cache.contents import tensor_contents
from nai_t5_core.prompts.cache.key import Key
from nai_t5_core.prompts.cache.store import Store, default_folder

log = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# An entry of the output that is None, among tensors that go with an embedding.
_NONE = "none."


@cache
def store_for(choice: str) -> Store:
    """The one store of a choice of :data:`comfy_nai_t5.choices.CACHES`, for all CLIPs of the server."""
    return Store(None if choice == "memory only" else default_folder())


class ClipCache:
    """What a CLIP and its clones have in common that keep embeddings.

    Args:
        store: where they are kept.
        base: hash of the weights and of all else that does not change.
        fill: gives the weights to a CLIP whose modules have none yet; None where they are there.
    """

    def __init__(self, store: Store, base: str, fill: Callable[[Any], None] | None = None) -> None:
        self.store, self.base, self._fill = store, base, fill
        self._lock = RLock()

    @property
    def is_loaded(self) -> bool:
        return self._fill is None

    def with_store(self, store: Store) -> ClipCache:
        """The same weights, which may be late, with another store."""
        other = ClipCache(store, self.base)
        other._fill = None if self.is_loaded else self.fill
        return other

    def fill(self, clip: Any) -> None:
        """Has the weights in memory."""
        with self._lock:
            if self._fill is not None:
                self._fill(clip)
                self._fill = None

    def encode(
        self, clip: Any, t5_models: dict[str, Any], compute: Callable[..., Any], tokens: dict[str, Any], pooled: Any
    ) -> dict[str, Any]:
        """As ComfyUI's ``encode_from_tokens(…, return_dict=True)``, which is ``compute``."""
        key = self._key(clip, t5_models, tokens, pooled)
        found = None if key is None else self.store.find(key)
        if found is not None:
            out = _given_out(found.rows, found.extras)
            clip.add_hooks_to_dict(out)
            return out
        out = compute(tokens, return_pooled=pooled, return_dict=True)
        kept = _kept(out)
        # The scales of float16 may have been tightened by this very prompt.
        if key is not None and kept is not None and self._key(clip, t5_models, tokens, pooled) == key:
            self.store.put(key, *kept)
        return out

    def _key(self, clip: Any, t5_models: dict[str, Any], tokens: dict[str, Any], pooled: Any) -> Key | None:
        try:
            return key_of(clip, self.base, t5_models, tokens, pooled)
        except NotKnownError as reason:
            log.debug("the embedding cache is left out: %s", reason)
            return None


def _kept(out: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]] | None:
    """The rows of one prompt and what goes with them; None where there is more to it."""
    cond = out["cond"]
    others = {name: value for name, value in out.items() if name not in ("cond", "hooks")}
    if not isinstance(cond, Tensor) or cond.ndim != 3 or len(cond) != 1 or cond.dtype not in _FLOATS:
        return None
    if not all(value is None or isinstance(value, Tensor) for value in others.values()):
        return None
    nothing = torch.zeros(1)
    extras = {f"{_NONE}{name}" if value is None else name: _or(value, nothing) for name, value in others.items()}
    return cond[0], extras


def _or(value: Tensor | None, other: Tensor) -> Tensor:
    return other if value is None else value


def _given_out(rows: Tensor, extras: Any) -> dict[str, Any]:
    from comfy.model_management import intermediate_device

    device = intermediate_device()
    out: dict[str, Any] = {"cond": rows[None].to(device)}
    for name, tensor in extras.items():
        is_none = name.startswith(_NONE)
        out[name.removeprefix(_NONE)] = None if is_none else tensor.to(device)
    return out


def describe_store(store: Store) -> str:
    """Hits, and how much is kept where, in words."""
    counts = store.counts
    lines = [
        f"{counts.hits} hits ({counts.from_memory} from memory, {counts.from_disk} from disk), {counts.misses} misses",
        f"memory: {len(store.memory)} embeddings, {store.memory.nbytes / 1e6:.1f} MB",
    ]
    if store.disk is not None:
        store.wait()
        kept = store.disk.kept()
        nbytes = sum(entry.nbytes for entry in kept)
        lines.append(
            f"{store.disk.folder}: {len(kept)} embeddings, {nbytes / 1e6:.1f} MB of {store.disk.limit / 1e6:.0f} MB"
        )
    return "\n".join(lines)


def weights_in_memory(patcher: Any) -> str | None:
    """The hash of a CLIP's weights as they are without patches, whatever of them is patched in now.

    None where they cannot be had: ComfyUI streams them from the file, or keeps them in a form of its own.
    """
    digest = hashlib.sha256()
    backup = getattr(patcher, "backup", {})
    for name, tensor in sorted(patcher.model.state_dict().items()):
        original = backup[name].weight if name in backup else tensor
        if type(original) not in (Tensor, nn.Parameter) or original.is_meta:
            return None
        digest.update(f"{name} {tensor_contents(original)}\n".encode())
    for name, module in quantised_modules(patcher.model):
        digest.update(f"{name} {module.kind} {module.numbers_shape}\n".encode())
    return digest.hexdigest()


def transplant(source: nn.Module, target: nn.Module) -> None:
    """Gives every module of a model that has no weights what its twin in another model has."""
    for name, module in source.named_modules():
        twin = target.get_submodule(name)
        if next(module.children(), None) is None:
            twin.__dict__.update(module.__dict__)
        else:
            twin._parameters.update(module._parameters)
            twin._buffers.update(module._buffers)
