"""CTranslate2's T5 on the CPU, made of the same weights by its own converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.bench.peers import State, require, transformers_t5
from nai_t5_core.facts.config import T5Config

CTRANSLATE2 = "ctranslate2"


def dtype_of_ctranslate2(dtype: torch.dtype) -> torch.dtype:
    """The dtype that CTranslate2 is to compute in beside ours: the same where this processor has it, or float32."""
    possible = require(CTRANSLATE2, extra=CTRANSLATE2).get_supported_compute_types("cpu")
    return dtype if _name(dtype) in possible else torch.float32


def ctranslate2_generate(config: T5Config, state: State, dtype: torch.dtype, int8: bool) -> Callable[..., Tensor]:
    """A function of ids [prompts, length], the number of beams and that of new tokens, to tokens [prompts, new tokens].

    It has as many threads as torch. The weights go through a temporary folder of transformers' format.

    Args:
        dtype: float32, or bfloat16 where CTranslate2 computes in it on this processor.
        int8: weights and products in 8 bits, and everything else in ``dtype``.

    Raises:
        ValueError: CTranslate2 or transformers is not installed, or does not compute in this dtype here.
    """
    ctranslate2 = require(CTRANSLATE2, extra=CTRANSLATE2)
    wanted = f"int8_{_name(dtype)}" if int8 else _name(dtype)
    possible = ctranslate2.get_supported_compute_types("cpu")
    if wanted not in possible:
        raise ValueError(f"CTranslate2 computes here in {', '.join(sorted(possible))}, and not in {wanted}")
    model: Any = transformers_t5(config, state, torch.float32)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _words(config.vocab_size).save_pretrained(folder)
        target = Path(folder) / CTRANSLATE2
        ctranslate2.converters.TransformersConverter(folder).convert(str(target), quantization=wanted)
        threads = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
        translator = ctranslate2.Translator(str(target), device="cpu", compute_type=wanted, **threads)

    def generate(ids: Tensor, beams: int, new_tokens: int) -> Tensor:
        lengths = {"max_decoding_length": new_tokens, "min_decoding_length": new_tokens}
        prompts = [[_word(number) for number in row] for row in ids.tolist()]
        found = translator.translate_batch(prompts, beam_size=beams, max_input_length=0, **lengths)
        return torch.tensor([[int(word[1:-1]) for word in text.hypotheses[0]] for text in found])

    return generate


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _word(number: int) -> str:
    return f"<{number}>"


def _words(vocab_size: int) -> Any:
    """A tokenizer whose words are the ids, since CTranslate2 takes words."""
    tokenizers, transformers = require("tokenizers"), require("transformers")
    words = {_word(number): number for number in range(vocab_size)}
    model = tokenizers.models.WordLevel(words, unk_token=_word(2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token=_word(0), eos_token=_word(1), unk_token=_word(2)
    )
