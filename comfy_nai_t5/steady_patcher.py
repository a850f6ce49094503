"""ComfyUI's patcher of a model in its dynamic memory, which prepares it anew only where something has changed.

ComfyUI prepares a model before every encode: it goes through all modules, sets what patches each weight has and where
it is to be on the card, and copies what is too small to be streamed there. For a T5 that takes longer than the encode,
and between two prompts nothing of it changes. What ComfyUI does about memory before, it does as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from torch import nn

from nai_t5_core.model.block import is_watched

# Older ComfyUI has no dynamic memory, and no patcher becomes steady there.
_Dynamic: Any = getattr(comfy.model_patcher, "ModelPatcherDynamic", comfy.model_patcher.ModelPatcher)


class SteadyPatcher(_Dynamic):
    """As ComfyUI's; a model that is as it was when it last served an encode is taken as it is.

    Whoever encodes says so by :meth:`has_served`. After an error nothing is said: modules may then be left in the
    middle of a copy, and so are prepared anew.
    """

    _prepared: Prepared | None = None
    # What becomes the above when the model has served.
    _in_use: Prepared | None = None

    def load(self, device_to: Any = None, *arguments: Any, **options: Any) -> Any:
        before = self._prepared if self.is_prepared and not options.get("dirty") else None
        self._prepared = self._in_use = None
        if before is not None and before.device == device_to:
            self._in_use = before
            return self._take_as_it_is()
        _begin_copies_anew(self.model)
        loaded = super().load(device_to, *arguments, **options)
        self._in_use = None if _has_own_ways(self) else Prepared.of(self, device_to)
        return loaded

    @property
    def is_prepared(self) -> bool:
        """Whether the model is as it was when it last served an encode by this patcher."""
        prepared = self._prepared
        return prepared is not None and not _has_own_ways(self) and prepared.is_still_so(self)

    def has_served(self) -> None:
        """Says that an encode has ended without an error since the model was last prepared."""
        if self._in_use is not None:
            self._prepared, self._in_use = self._in_use, None

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


def _begin_copies_anew(model: nn.Module) -> None:
    """Forgets what an error has broken off: the weight may lie there without its patches, or in memory that was freed.

    ComfyUI itself goes on with such a copy.
    """
    module: Any
    for module in model.modules():
        if vars(module).pop("_prefetch", None) is not None:
            module._v_signature = None


def _has_own_ways(patcher: Any) -> bool:
    """Whether hooks change weights while prompts are encoded, or other software wants to know of every load."""
    hooks = patcher.hook_patches or patcher.hook_backup or patcher.current_hooks or patcher.forced_hooks
    told = (CallbacksMP.ON_LOAD, CallbacksMP.ON_APPLY_HOOKS)
    return bool(hooks) or any(patcher.get_all_callbacks(event) for event in told)


class Prepared:
    """What a patcher left when it prepared a model, by which is seen whether anything has changed since.

    Every preparing, by whichever patcher of the model, gives each streamed module a new list of functions; each unload
    takes the copies of small weights back. No weight is kept alive.

    Args:
        places: of every streamed module, in dynamic memory.
    """

    def __init__(self, patcher: Any, device: torch.device, places: Mapping[nn.Module, Any]) -> None:
        model = patcher.model
        self.device = device
        self._by, self._uuid, self._patches = _Dynamic.load, patcher.patches_uuid, dict(patcher.patches)
        self._memory, self._pins = patcher._vbar_get(), model.dynamic_pins[device]
        self._small_bytes = model.model_loaded_weight_memory
        self._streamed = [(vars(module), place, module.weight_function) for module, place in places.items()]
        self._modules = list(model.modules())
        self._children = [(module._modules, list(module._modules.values())) for module in self._modules]
        tables = [table for module in self._modules for table in (module._parameters, module._buffers)]
        self._tensors = [
            (table, name, weakref.ref(tensor))
            for table in tables
            for name, tensor in table.items()
            if tensor is not None
        ]

    @classmethod
    def of(cls, patcher: Any, device: torch.device) -> Prepared | None:
        """None where nothing is streamed, so that another preparing would not be noticed."""
        places = {module: vars(module)["_v"] for module in patcher.model.modules() if "_v" in vars(module)}
        return cls(patcher, device, places) if places else None

    def is_still_so(self, patcher: Any) -> bool:
        return self._is_of(patcher) and self._has_its_places and self._has_its_members

    def _is_of(self, patcher: Any) -> bool:
        model = patcher.model
        return (
            _Dynamic.load is self._by
            and patcher.load_device == self.device
            and patcher.patches_uuid == self._uuid == model.current_weight_patches_uuid
            and len(patcher.patches) == len(self._patches)
            and all(self._patches.get(key) is patches for key, patches in patcher.patches.items())
            and model.model_loaded_weight_memory == self._small_bytes
            and patcher._vbar_get() is self._memory
            and model.dynamic_pins.get(self.device) is self._pins
        )

    @property
    def _has_its_places(self) -> bool:
        return all(
            found.get("_v") is place and found.get("weight_function") is functions
            for found, place, functions in self._streamed
        )

    @property
    def _has_its_members(self) -> bool:
        if is_watched(self._modules) or any(list(table.values()) != children for table, children in self._children):
            return False
        return all(tensor() is table.get(name) is not None for table, name, tensor in self._tensors)
