"""A T5 of any size that belongs to no diffusion model ComfyUI knows: masked, unpadded, with the tokenizer it came with.

The classes have the constructors that ComfyUI calls; tokenizer and end tokens come through its option dictionaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.text_encoders.t5
from comfy import sd1_clip

from nai_t5_core.tokenizer import Tokenizer

# The entry of tokenizer_data that holds a nai_t5_core tokenizer, and that of model_options with its special tokens.
TOKENIZER = "t5_tokenizer"
SPECIAL_TOKENS = "t5_special_tokens"


class PlainT5(sd1_clip.SDClipModel):
    """The T5 itself: pads are masked, their rows are zeros, and the mask is handed on."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        options = model_options or {}
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config={},
            special_tokens=options[SPECIAL_TOKENS],
            model_class=comfy.text_encoders.t5.T5,
            enable_attention_masks=True,
            return_attention_masks=True,
            zero_out_masked=True,
            model_options=options,
        )


class PlainModel(sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] | None = None) -> None:
        super().__init__(device=device, dtype=dtype, name="t5", clip_model=PlainT5, model_options=model_options or {})


class _ServerTokenizer:
    """One of our tokenizers behind the few calls that ComfyUI makes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, tokenizer: Tokenizer, **_: Any) -> _ServerTokenizer:
        return cls(tokenizer)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokenizer.encode(text)}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return {self.tokenizer.decode([token], skip_special_tokens=False): token for token in range(len(self))}

    def __len__(self) -> int:
        return self.tokenizer.vocab_size


class PlainT5Tokenizer(sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        data = tokenizer_data or {}
        tokenizer: Tokenizer = data[TOKENIZER]
        super().__init__(
            tokenizer,
            tokenizer_class=_ServerTokenizer,
            embedding_directory=embedding_directory,
            embedding_key="t5",
            has_start_token=False,
            pad_with_end=False,
            pad_token=tokenizer.pad_token_id,
            pad_to_max_length=False,
            max_length=99_999_999,
            min_length=1,
            tokenizer_data=data,
        )


class PlainTokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        super().__init__(
            embedding_directory, tokenizer_data or {}, clip_name="t5", tokenizer=PlainT5Tokenizer, name="t5"
        )
