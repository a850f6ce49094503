"""Which encoder computes a set: the arguments to load it by, in every process and on every machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from nai_t5_core.backends.choices import ProductsChoice, Quantisation
from nai_t5_core.model.attention_choice import AttentionChoice
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.prompts.cache.settings import settings_of
from nai_t5_core.prompts.choices import Choices
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.tokenizer import Tokenizer
from nai_t5_core.weights.examine import find_tokenizer_for


@dataclass(frozen=True)
class EncoderChoice:
    """Arguments of :meth:`nai_t5_core.TextEncoder.from_pretrained`, as plain values that can be sent to a process."""

    source: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    subfolder: str = ""
    tokenizer: str | None = None
    scales: str = "auto"
    quantize: Quantisation | None = None
    compile: bool | str = False
    attention: AttentionChoice = "auto"
    loras: tuple[tuple[str, float], ...] = ()
    products: ProductsChoice = "auto"
    unpack: bool = False

    def settings(self) -> Settings:
        """What its keys have in common; no weights are read but to hash them, once.

        Raises:
            ValueError: what loading would refuse: an unknown choice, or one that is not possible on this device.
        """
        arguments = self._arguments()
        source, subfolder, _ = (arguments.pop(name) for name in ("source", "subfolder", "tokenizer"))
        Choices(**arguments).refuse_impossible()
        return settings_of(source, subfolder=subfolder, **arguments)

    def find_tokenizer(self) -> Tokenizer:
        return find_tokenizer_for(self.source, self.subfolder, self.tokenizer)

    def load(self) -> TextEncoder:
        return TextEncoder.from_pretrained(**self._arguments())

    def on(self, device: str) -> EncoderChoice:
        return replace(self, device=device)

    def _arguments(self) -> dict[str, Any]:
        return {**asdict(self), "loras": list(self.loras)}
