"""The embedding table of the drop-in class, which transformers' functions ask for and replace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Base

    from nai_t5_core.model.encoder import T5EncoderStack
else:
    Base = object


class HasOneTable(Base):
    """A model of transformers with one embedding table, which may have a float16 scale in it."""

    if TYPE_CHECKING:
        # The drop-in class has it.
        @property
        def stack(self) -> T5EncoderStack: ...

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table.

        Raises:
            ValueError: a float16 scale is in it, so that its rows are not what others take them for.
        """
        if self.stack.scales.embedding != 1:
            raise ValueError(
                f"the embedding table exceeds float16, and is kept times {self.stack.scales.embedding:g}; load the "
                "model in bfloat16 or float32 to read or change it"
            )
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Another embedding table [tokens, d_model]; as ``resize_token_embeddings`` makes them."""
        self.shared = self.stack.shared = value
        self.stack.config = self.stack.config.model_copy(update={"vocab_size": value.weight.shape[0]})
        self.config.vocab_size = value.weight.shape[0]
