"""Encodes through the cache, and loads the encoder at the first prompt that is not in it."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.facts.scales import StackScales
from nai_t5_core.prompts.cache.batch import through_cache
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.prompts.encoding import Encoding, Pads
from nai_t5_core.weights.load_report import LoadReport


class CachedEncoding:
    """Encodes through a store; what the store does not have is encoded by an encoder that is loaded for it.

    Args:
        settings: those that the encoder is expected to have.
        load: called once, at the first miss or when the encoder is asked for; gives the encoder, and the settings that
            it has. Where they are others, such as without kernels that could not be built, what was looked up by the
            expected ones is not kept.
        store: where embeddings are kept.
        device: the encoder's.
        source: of the weights, for people.
        note: called with scales that the guard has tightened.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], tuple[Encoding, Settings]],
        store: Store,
        device: torch.device,
        source: str,
        note: Callable[[StackScales], None],
    ) -> None:
        self.settings, self.store, self._note = settings, store, note
        self._load, self._device = load, device
        self.source: str | None = source
        self._loaded: Encoding | None = None
        self._settings_now: Callable[[], Settings | None] = lambda: self.settings
        self._lock = RLock()

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    @property
    def stack(self) -> Any:
        return self._ready().stack

    @property
    def report(self) -> LoadReport | None:
        return self._loaded.report if self._loaded is not None else None

    def __call__(self, ids: Tensor, mask: Tensor, pads: Pads, device: str | torch.device | None) -> Tensor:
        return through_cache(
            self.store,
            lambda: self._settings_now(),
            lambda some, masks: self._ready()(some, masks, pads, device),
            ids,
            mask,
            pads.padding,
            pads.extra_pad,
            self._device if device is None else device,
        )

    def _ready(self) -> Encoding:
        with self._lock:
            if self._loaded is None:
                # Imported with the encoder, so that a prompt that is kept comes sooner.
                from nai_t5_core.prompts.cache.loaded_settings import SettingsOfStack

                loaded, has = self._load()
                if has != self.settings:
                    self.settings = has
                self._settings_now = SettingsOfStack(loaded.stack, lambda: self.settings, self._note)
                self._loaded = loaded
        return self._loaded

    def __repr__(self) -> str:
        what = repr(self._loaded) if self._loaded is not None else f"{self.source}, not loaded"
        return f"{what}, {self.store!r}"
