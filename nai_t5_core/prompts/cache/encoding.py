"""Encodes through the cache, and loads the encoder at the first prompt that is not in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.quantised.projections import QuantisedEmbedding
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.lora.set import LorasInForce
from nai_t5_core.prompts.cache.batch import through_cache
from nai_t5_core.prompts.cache.contents import lora_contents, tensor_contents
from nai_t5_core.prompts.cache.key import LoraUse, Settings
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.prompts.cache.watch import Watch
from nai_t5_core.prompts.stack_encoding import Pads, StackEncoding
from nai_t5_core.weights.load import LoadReport

log = logging.getLogger(__name__)

_UNKNOWN = (
    "the T5 was changed in a way that the embedding cache does not know (a moved or replaced weight, a hook); from now "
    "on it encodes without the cache. LoRAs are known where they come by Loras, LiveLoras or loras="
)


class SettingsOfStack:
    """The settings of a loaded encoder at every moment: those at its loading, with all that was told since.

    Args:
        stack: just loaded.
        at_load: gives the settings that it has without what was told since, the same object for as long as they are
            the same.
        note: called with scales that the guard has tightened.
    """

    def __init__(
        self, stack: Any, at_load: Callable[[], Settings], note: Callable[[StackScales], None] = lambda scales: None
    ) -> None:
        self._stack, self._at_load, self._note = stack, at_load, note
        self._is_told = False
        with stack.alterations.lock:
            self._vocabulary, self._scales = stack.config.vocab_size, stack.scales
            self._told_before = set(stack.alterations.done)
            self._watch = Watch(stack)
            self._before, self._done = at_load(), dict(stack.alterations.done)
        self._now = self._before

    def __call__(self) -> Settings | None:
        """None once something was done to the encoder that is not known; the same object while nothing is done.

        Waits for a change that is under way.
        """
        with self._stack.alterations.lock:
            self._watch.look()
            if not self._watch.is_known:
                if not self._is_told:
                    self._is_told = True
                    log.warning("%s", _UNKNOWN)
                return None
            done, before = self._stack.alterations.done, self._at_load()
            if self._done != done or before is not self._before:
                self._now, self._done, self._before = self._settings_with(before, done), dict(done), before
            return self._now

    def _settings_with(self, at_load: Settings, done: dict[object, Any]) -> Settings:
        told = [what for who, what in done.items() if who not in self._told_before and isinstance(what, LorasInForce)]
        uses = [LoraUse(lora_contents(lora), number, what.way) for what in told for lora, number in what.loras]
        stack, table = self._stack, self._stack.shared
        vectors = {index: tensor_contents(_row(table, index)) for index in range(self._vocabulary, len(table.weight))}
        scales = at_load.scales
        if stack.scales != self._scales:
            scales = stack.scales
            self._note(scales)
        return replace(at_load, loras=(*at_load.loras, *uses), vectors=vectors, scales=scales)


def _row(table: Any, index: int) -> Tensor:
    return table.row(index) if isinstance(table, QuantisedEmbedding) else table.weight[index]


class CachedEncoding:
    """Encodes through a store; what the store does not have is encoded by an encoder that is loaded for it.

    Args:
        settings: of the encoder that ``load`` gives.
        load: called once, at the first miss or when the encoder is asked for.
        store: where embeddings are kept.
        device: the encoder's.
        source: of the weights, for people.
        note: called with scales that the guard has tightened.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], StackEncoding],
        store: Store,
        device: torch.device,
        source: str,
        note: Callable[[StackScales], None],
    ) -> None:
        self.settings, self.store, self._note = settings, store, note
        self._load, self._device = load, device
        self.source: str | None = source
        self._loaded: StackEncoding | None = None
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

    def _ready(self) -> StackEncoding:
        with self._lock:
            if self._loaded is None:
                loaded = self._load()
                self._settings_now = SettingsOfStack(loaded.stack, lambda: self.settings, self._note)
                self._loaded = loaded
        return self._loaded

    def __repr__(self) -> str:
        what = repr(self._loaded) if self._loaded is not None else f"{self.source}, not loaded"
        return f"{what}, {self.store!r}"
