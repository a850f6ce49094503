"""LoRA merged into the weights of an encoder: any number at once, at any strength, and out again without a trace.

A LoRA is trained on the original weights. In the fused layout these are rows of a larger weight, whose columns hold the
norm before them and whose rows may hold a float16 scale; both are multiplied into the change as well. So a merged model
is as fast as it was, and equals the original one with its LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable

from nai_t5_core.lora.merge import Merger
from nai_t5_core.lora.set import HasStack, LoraSet, NamedLoras, Way
from nai_t5_core.model.encoder import T5EncoderStack


class Loras(LoraSet):
    """The LoRAs of one encoder, merged into its weights.

    >>> loras = Loras(encoder)                        # TextEncoder, T5EncoderStack or NAIT5EncoderModel
    >>> loras.add("style.safetensors", 0.8)
    'style'
    >>> loras.set_strength("style", 0.5)
    >>> loras.remove("style")                         # the weights are what they were, bit for bit

    The original of every changed weight is kept (it costs its memory once more, unless it is mapped from a file), and
    every change computes the weight anew from it, in float32: no rounding adds up, and when the last LoRA of a weight
    goes, the very original comes back. A model that was moved or cast meanwhile gets it moved and cast; float16 scales
    that were tightened meanwhile hold for it too.

    Weights that are packed, quantised or offloaded can't be changed; :class:`nai_t5_core.lora.live.LiveLoras` needs no
    change of weights.

    One such object per encoder: it is the one that knows the originals. Whatever saves, copies or gives back the
    encoder's weights (``restore_text_encoder``, too) takes them as they are: :meth:`clear` first if they should be
    without LoRA.
    """

    way: Way = "merged"

    def __init__(self, model: T5EncoderStack | HasStack) -> None:
        super().__init__(model)
        self._merger = Merger(self._stack)

    def _apply(self, loras: NamedLoras, changed: Iterable[str]) -> None:
        recipes, before = self._recipes(changed), self._loras
        self._loras = loras
        try:
            # All are looked at before the first is changed.
            for recipe in recipes:
                self._merger.refuse(recipe, self._changes_of)
        except ValueError:
            self._loras = before
            raise
        for recipe in recipes:
            self._merger.renew(recipe, self._changes_of)

    def _changed_count(self) -> int:
        return self._merger.count
