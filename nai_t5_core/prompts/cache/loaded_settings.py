"""The settings of an encoder that is loaded, at every moment: what is done to it is in the key of all that follows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from nai_t5_core.backends.quantised.projections import QuantisedEmbedding
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.lora.set import LorasInForce
from nai_t5_core.prompts.cache.contents import tensor_contents
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.prompts.cache.lora_contents import uses_of
from nai_t5_core.prompts.cache.watch import Watch

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
        uses = [use for what in told for use in uses_of(what.loras, what.way)]
        stack, table = self._stack, self._stack.shared
        vectors = {index: tensor_contents(_row(table, index)) for index in range(self._vocabulary, len(table.weight))}
        scales = at_load.scales
        if stack.scales != self._scales:
            scales = stack.scales
            self._note(scales)
        return replace(at_load, loras=(*at_load.loras, *uses), vectors=vectors, scales=scales)


def _row(table: Any, index: int) -> Tensor:
    return table.row(index) if isinstance(table, QuantisedEmbedding) else table.weight[index]
