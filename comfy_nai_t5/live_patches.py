"""ComfyUI's patcher of a model some of whose weights stay quantised.

A patched weight would be unpacked for as long as it is loaded, which is what such files are there to avoid. So patches
of a quantised weight, by LoRAs, merges and hooks alike, are kept beside it and added to its numbers in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.lora
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from comfy_nai_t5.quantised import Quantised, quantised_modules

# The patches that add how far another model's weight is from the unchanged one, which they have to be given.
_FROM_UNCHANGED = "model_as_lora"


class LivePatches:
    """Adds ComfyUI's patches of a weight to its numbers."""

    def __init__(self, key: str, patches: Sequence[Any]) -> None:
        self.key, self.patches = key, patches

    def __call__(self, numbers: Tensor) -> Tensor:
        """[rows, columns] float32, which are changed in place."""
        return self._changed(numbers)

    def _changed(self, numbers: Tensor, **options: Any) -> Tensor:
        changed: Tensor = comfy.lora.calculate_weight(
            self.patches, numbers, self.key, intermediate_dtype=numbers.dtype, **options
        )
        return changed


class LiveHooks(LivePatches):
    """Adds the patches of hooks, among which may be those that need the weight as it is without any patch."""

    def __init__(self, key: str, patches: Sequence[Any], module: Quantised) -> None:
        super().__init__(key, patches)
        self.module = module
        self.needs_unchanged = any(isinstance(each[1], tuple) and each[1][0] == _FROM_UNCHANGED for each in patches)

    def __call__(self, numbers: Tensor) -> Tensor:
        if not self.needs_unchanged:
            return super().__call__(numbers)
        # As ComfyUI has original weights: the first of what there is for a key, and of that the first again.
        return self._changed(numbers, original_weights={self.key: [(self.module.unchanged(numbers.device),)]})


class LivePatcher(ModelPatcher):
    """Has patches of quantised weights added in every call, and all others as ComfyUI has them."""

    def load(self, *arguments: Any, **options: Any) -> Any:
        loaded = super().load(*arguments, **options)
        self._set_patches()
        return loaded

    def partially_unload(self, *arguments: Any, **options: Any) -> Any:
        freed = super().partially_unload(*arguments, **options)
        self._set_patches()
        return freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        unpatched = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for _, module in quantised_modules(self.model):
                module.weight_function = []
        return unpatched

    def patch_weight_to_device(self, key: str, *arguments: Any, **options: Any) -> Any:
        module = self._quantised(key)
        return super().patch_weight_to_device(key, *arguments, **options) if module is None else module.weight

    def patch_hook_weight_to_device(
        self,
        hooks: Any,
        combined_patches: dict[str, Any],
        key: str,
        original_weights: dict[str, Any],
        memory_counter: Any,
    ) -> None:
        module = self._quantised(key)
        if module is None:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        elif key in combined_patches:
            module.hooked = [LiveHooks(key, combined_patches[key], module)]

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        super().unpatch_hooks(whitelist_keys_set)
        for path, module in quantised_modules(self.model):
            if not whitelist_keys_set or f"{path}.weight" in whitelist_keys_set:
                module.hooked = []

    def _set_patches(self) -> None:
        """ComfyUI adds some of them itself while it offloads; each is to be there once."""
        for path, module in quantised_modules(self.model):
            key = f"{path}.weight"
            own = [LivePatches(key, self.patches[key])] if key in self.patches else []
            module.weight_function = [*own, *self.weight_wrapper_patches.get(key, ())]

    def _quantised(self, key: str) -> Quantised | None:
        path, _, name = key.rpartition(".")
        module = self.model.get_submodule(path) if name == "weight" else None
        return module if isinstance(module, Quantised) else None
