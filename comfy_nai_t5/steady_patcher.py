"""ComfyUI's patcher of a model in its dynamic memory, which prepares it anew only where something has changed.

ComfyUI prepares a model before every encode: it goes through all modules, sets what patches each weight has and where
it is to be on the card, and copies what is too small to be streamed there. For a T5 that takes longer than the encode,
and between two prompts nothing of it changes. What ComfyUI does about memory before, it does as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from nai_t5_core.model.block import ModulesRecord

# Older ComfyUI has no dynamic memory, and no patcher becomes steady there.
_Dynamic: Any = getattr(comfy.model_patcher, "ModelPatcherDynamic", comfy.model_patcher.ModelPatcher)


class SteadyPatcher(_Dynamic):
    """As ComfyUI's; a model that is as it was when this patcher prepared it is taken as it is."""

    _prepared: Prepared | None = None

    def load(self, device_to: Any = None, *arguments: Any, **options: Any) -> Any:
        if self.is_prepared and not options.get("dirty") and self._prepared.device == device_to:  # type: ignore[union-attr]
            return self._take_as_it_is()
        self._prepared = None
        loaded = super().load(device_to, *arguments, **options)
        self._prepared = None if _has_own_ways(self) else Prepared.of(self, device_to)
        return loaded

    @property
    def is_prepared(self) -> bool:
        """Whether the model is as this patcher has prepared it."""
        return self._prepared is not None and not _has_own_ways(self) and self._prepared.is_still_so(self)

    def restore_loaded_backups(self) -> Any:
        self._prepared = None  # it refers to what is given back here
        return super().restore_loaded_backups()

    def _take_as_it_is(self) -> None:
        """What ComfyUI sets anew for every use of a model."""
        model = self.model
        pins = model.dynamic_pins[self.load_device]
        pins["failed"], pins["active"] = False, True
        if (memory := self._vbar_get()) is not None:
            memory.prioritize()
        model.device = self.load_device


def become_steady(patcher: Any) -> None:
    """Makes ComfyUI's own patcher of a model in dynamic memory a :class:`SteadyPatcher`; others stay what they are."""
    if type(patcher) is _Dynamic and _Dynamic is not comfy.model_patcher.ModelPatcher:
        patcher.__class__ = SteadyPatcher


def _has_own_ways(patcher: Any) -> bool:
    """Whether hooks change weights while prompts are encoded, or other software wants to know of every load."""
    hooks = patcher.hook_patches or patcher.hook_backup or patcher.current_hooks or patcher.forced_hooks
    return bool(hooks) or bool(patcher.get_all_callbacks(CallbacksMP.ON_LOAD))


class Prepared:
    """What a patcher left when it prepared a model, by which is seen whether anything has changed since.

    Every preparing, by whichever patcher of the model, gives each streamed module a new list of functions; each unload
    takes the copies of small weights back.

    Args:
        places: of every streamed module, in dynamic memory.
    """

    def __init__(self, patcher: Any, device: torch.device, places: Mapping[nn.Module, Any]) -> None:
        model = patcher.model
        self.device, self.patches = device, patcher.patches_uuid
        self._memory, self._pins = patcher._vbar_get(), model.dynamic_pins[device]
        self._small = _small_weights(patcher)
        self._bytes = model.model_loaded_weight_memory
        self._streamed = [(vars(module), place, module.weight_function) for module, place in places.items()]
        self._modules = ModulesRecord(model.modules())

    @classmethod
    def of(cls, patcher: Any, device: torch.device) -> Prepared | None:
        """None where nothing is streamed, so that another preparing would not be noticed."""
        places = {module: vars(module)["_v"] for module in patcher.model.modules() if "_v" in vars(module)}
        return cls(patcher, device, places) if places else None

    def is_still_so(self, patcher: Any) -> bool:
        model = patcher.model
        if patcher.load_device != self.device or patcher.patches_uuid != self.patches:
            return False
        if model.current_weight_patches_uuid != self.patches or model.model_loaded_weight_memory != self._bytes:
            return False
        if patcher._vbar_get() is not self._memory or model.dynamic_pins.get(self.device) is not self._pins:
            return False
        small = _small_weights(patcher)
        if len(small) != len(self._small) or any(a is not b for a, b in zip(small, self._small, strict=True)):
            return False
        for found, place, functions in self._streamed:
            if found.get("_v") is not place or found.get("weight_function") is not functions:
                return False
        return self._modules.is_same


def _small_weights(patcher: Any) -> list[Any]:
    """What ComfyUI keeps of weights and buffers that it has copied to the card as a whole."""
    return [*patcher.backup.values(), *patcher.backup_buffers.values()]
