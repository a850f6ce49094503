"""Which adapters of peft the drop-in class takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Base

    from nai_t5_core.model.encoder import T5EncoderStack
else:
    Base = object


class RefusesAdaptersWhenFused(Base):
    """A model of transformers whose adapters have no place in the fused layout."""

    if TYPE_CHECKING:
        # The drop-in class has it.
        @property
        def stack(self) -> T5EncoderStack: ...

    def add_adapter(self, *arguments: Any, **options: Any) -> None:
        """As transformers', in the separate layout; in the fused one a ValueError says what takes a LoRA there."""
        self._refuse_adapters()
        super().add_adapter(*arguments, **options)

    def load_adapter(self, *arguments: Any, **options: Any) -> Any:
        """See :meth:`add_adapter`."""
        self._refuse_adapters()
        return super().load_adapter(*arguments, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        # With this attribute peft marks a model that it puts adapters into, by whichever of its functions.
        if name == "peft_config":
            self._refuse_adapters()
        super().__setattr__(name, value)

    def _refuse_adapters(self) -> None:
        """In the fused layout those modules that keep their names are scaled, or read their input without the norm."""
        if self.stack.layout == "fused":
            raise ValueError(
                "peft's adapters belong beside the original weights, and these are fused: add a file of them with "
                "nai_t5_core.LiveLoras(model), or have layout='separate' for adapters that are trained"
            )
