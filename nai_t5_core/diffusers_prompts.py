"""A pipeline's own `encode_prompt`, with all of its T5's work done in one packed pass before.

    pipe = replace_text_encoder(pipe)
    pipe(**encode_prompt(pipe, "a cat", negative_prompt="blurred"))

The pipeline's code makes the result, so that names, order, shapes, dtypes and masks are its own. What is predicted here
is only which token ids it will ask its T5 for; a wrong prediction costs the time of a second pass and changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.diffusers_adapter import family_of
from nai_t5_core.families import Family
from nai_t5_core.hf import NAIT5EncoderModel
from nai_t5_core.row_memory import RowMemory
from nai_t5_core.text_cleaning import clean_text

_PAIR = "prompt_embeds negative_prompt_embeds"
_WITH_MASKS = "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask"

# What `encode_prompt` of each family's pipelines returns, in order.
_OUTPUTS = {
    "allegro": _WITH_MASKS,
    "audioldm2": "prompt_embeds attention_mask generated_prompt_embeds",
    "auraflow": _WITH_MASKS,
    "bria": f"{_PAIR} text_ids",
    "chroma": "prompt_embeds text_ids prompt_attention_mask "
    "negative_prompt_embeds negative_text_ids negative_prompt_attention_mask",
    "cogvideox": _PAIR,
    "cogview3plus": _PAIR,
    "cosmos": _PAIR,
    "deepfloyd-if": _PAIR,
    "flux": "prompt_embeds pooled_prompt_embeds text_ids",
    "glm-image": _PAIR,
    "helios": _PAIR,
    "hidream": "prompt_embeds_t5 negative_prompt_embeds_t5 prompt_embeds_llama3 negative_prompt_embeds_llama3 "
    "pooled_prompt_embeds negative_pooled_prompt_embeds",
    "hunyuandit": f"{_PAIR} prompt_attention_mask negative_prompt_attention_mask",
    "hunyuanimage": "prompt_embeds prompt_embeds_mask prompt_embeds_2 prompt_embeds_mask_2",
    "hunyuanvideo-1.5": "prompt_embeds prompt_embeds_mask prompt_embeds_2 prompt_embeds_mask_2",
    "kandinsky3": f"{_PAIR} attention_mask negative_attention_mask",
    "latte": _PAIR,
    "longcat-audiodit": "prompt_embeds lengths",
    "ltx-condition": _WITH_MASKS,
    "ltx-video": _WITH_MASKS,
    "mochi": _WITH_MASKS,
    "pixart-alpha": _WITH_MASKS,
    "pixart-sigma": _WITH_MASKS,
    "sd3": f"{_PAIR} pooled_prompt_embeds negative_pooled_prompt_embeds",
    "stable-audio": "prompt_embeds",
    "wan": _PAIR,
}
# Without a negative prompt these make zeros themselves.
_ZEROS_WITHOUT_NEGATIVE = ("bria", "cogview3plus", "kandinsky3", "stable-audio")
# These cut the length to the tokenizer's own limit.
_LIMITED_BY_TOKENIZER = ("hidream", "longcat-audiodit", "stable-audio")
# The ids are put together by the pipeline; nothing is predicted, and each of its calls is a pass.
_NOT_PREDICTED = ("glm-image",)
# Each prompt goes alone and without pads into the encoder.
_ONE_BY_ONE = ("bria",)


def adapted_families() -> list[str]:
    """The families whose pipelines :func:`encode_prompt` takes, sorted."""
    return sorted(_OUTPUTS)


@torch.no_grad()
def encode_prompt(
    pipe: Any, prompt: str | list[str], *, word_weights: Mapping[str, float] | None = None, **options: Any
) -> dict[str, Any]:
    """The result of ``pipe.encode_prompt(prompt, **options)``, by name, with one pass through the T5.

    Prompts and negative prompts are encoded together, each different one once, before the pipeline's own function runs.

    Args:
        pipe: a pipeline of one of :func:`adapted_families` whose T5 is ours, see
            :func:`nai_t5_core.diffusers_adapter.replace_text_encoder`.
        prompt, options: what its ``encode_prompt`` takes. What that insists on beside the prompt may be left out.
        word_weights: such as ``{"red fox": 1.3}``. The T5's rows for these words are multiplied by the number, wherever
            the words stand in a prompt or negative prompt; other encoders do not know of it.

    Returns:
        Its results by name, in its order: shapes, dtypes and masks are those of the pipeline. With the policy
        ``"skip"``, rows of pads that it would keep are zeros.

    Raises:
        ValueError: another pipeline, one whose T5 is not ours, no prompt, an option that its ``encode_prompt`` has
            not, words that stand in no prompt, or a prompt that is changed in unforeseen ways before it is weighted.
    """
    request = _Request.of(pipe, prompt, options)
    weights = request.token_weights(word_weights or {})
    memory = RowMemory()
    for input_ids, attention_mask in request.batches():
        hidden = getattr(pipe, request.component)(input_ids, attention_mask)[0]
        memory.add(input_ids, attention_mask, weighted(hidden, input_ids, weights))
    with request.model.remembering(memory):
        results = pipe.encode_prompt(**request.arguments)
    if weights and memory.missed:
        raise ValueError(f"{type(pipe).__name__} changes these prompts itself, so that word_weights cannot be applied")
    names = _OUTPUTS[request.row.name].split()
    return dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))


def weighted(hidden: Tensor, input_ids: Tensor, weights: Mapping[tuple[int, ...], float]) -> Tensor:
    """Hidden states [batch, length, d_model] with the rows of each run of ids [batch, length] times its weight."""
    factors = torch.ones(input_ids.shape, dtype=torch.float32)
    for run, weight in weights.items():
        for row, ids in enumerate(input_ids.tolist()):
            for start in range(len(ids) - len(run) + 1):
                if tuple(ids[start : start + len(run)]) == run:
                    factors[row, start : start + len(run)] *= weight
    return hidden * factors[..., None].to(hidden)


def cut_text(pipe: Any, prompt: str | list[str], **options: Any) -> list[str]:
    """What the T5 does not see of each prompt because it is too long; "" where it sees all.

    Arguments and errors as for :func:`encode_prompt`; the text is that of the tokens, so it may be written differently.
    """
    return _Request.of(pipe, prompt, options).cut_text()


def _known_family(pipe: Any) -> Family:
    row = family_of(pipe)
    if row is None or row.name not in _OUTPUTS:
        raise ValueError(
            f"encode_prompt of {type(pipe).__name__} is not known here; call pipe.encode_prompt, which uses our "
            f"encoder as well. Known families: {', '.join(adapted_families())}"
        )
    return row


def _own_encoder(pipe: Any) -> tuple[str, NAIT5EncoderModel]:
    for name, part in pipe.components.items():
        model = getattr(part, "_orig_mod", part)
        if isinstance(model, NAIT5EncoderModel):
            return name, model
    raise ValueError(f"the T5 of {type(pipe).__name__} is not ours; call replace_text_encoder(pipe) first")


def _arguments(pipe: Any, prompt: str | list[str], options: dict[str, Any]) -> dict[str, Any]:
    """All that the pipeline's `encode_prompt` needs, with a value for what it has no default for."""
    if not isinstance(prompt, str | list) or prompt == []:
        raise ValueError(f"prompt is {prompt!r}; give a text or a list of texts")
    taken = inspect.signature(pipe.encode_prompt).parameters
    unknown = [name for name in options if name not in taken]
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt has no argument {', '.join(unknown)}; it has {', '.join(taken)}"
        )
    needed = {
        "prompt_2": None,
        "prompt_3": None,
        "do_classifier_free_guidance": True,
        "num_waveforms_per_prompt": 1,
        "device": pipe._execution_device,
        "batch_size": 1 if isinstance(prompt, str) else len(prompt),
    }
    defaults = {name: value for name, value in needed.items() if name in taken}
    return {**defaults, "prompt": prompt, **options}


@dataclass
class _Request:
    """What a pipeline will ask its T5 for."""

    pipe: Any
    row: Family
    component: str
    model: NAIT5EncoderModel
    arguments: dict[str, Any]

    @classmethod
    def of(cls, pipe: Any, prompt: str | list[str], options: dict[str, Any]) -> _Request:
        row = _known_family(pipe)
        return cls(pipe, row, *_own_encoder(pipe), _arguments(pipe, prompt, options))

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Ids [prompts, length] and mask of all different prompts, one batch for each length."""
        if self.row.name in _NOT_PREDICTED:
            return
        lengths: dict[int, dict[tuple[int, ...], tuple[Tensor, Tensor]]] = {}
        for texts in (self._prompts(), self._negative_prompts()):
            for ids, mask in self._tokens([clean_text(text, self.row.text_cleaning) for text in texts]):
                key = (*ids.tolist(), int(mask.sum()))
                lengths.setdefault(len(ids), {})[key] = (ids, mask)
        for rows in lengths.values():
            device = self.pipe._execution_device
            ids, mask = (torch.stack(column).to(device) for column in zip(*rows.values(), strict=True))
            yield ids, mask if self.row.encoder_mask else None

    def token_weights(self, word_weights: Mapping[str, float]) -> dict[tuple[int, ...], float]:
        """The weights by the words' token ids, which are the same at the beginning of a text and within it."""
        weights = {}
        texts = [clean_text(text, self.row.text_cleaning) for text in self._prompts() + self._negative_prompts()]
        for words, weight in word_weights.items():
            if not any(words.lower() in text.lower() for text in texts):
                raise ValueError(f"word_weights has {words!r}, which stands in no prompt")
            ids = self._tokenizer(clean_text(words, self.row.text_cleaning), add_special_tokens=False).input_ids
            weights[tuple(ids)] = weight
        return weights

    def cut_text(self) -> list[str]:
        """The end of each prompt that exceeds the length, behind the tokens that stay and their end token."""
        texts = [clean_text(text, self.row.text_cleaning) for text in self._prompts()]
        rows = self._tokenizer(texts, padding=False, truncation=False).input_ids
        kept = self._length() - 1
        return [self._tokenizer.decode(row[kept:-1]) if len(row) > kept + 1 else "" for row in rows]

    def _tokens(self, texts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and mask of each text, as the pipeline's tokenizer gives them."""
        if self.row.text_cleaning in ("quoted", "double-quoted"):
            texts = [text for text in texts if text]  # nothing in quotes is not encoded
        calls = [[text] for text in texts] if self.row.name in _ONE_BY_ONE else [texts] if texts else []
        padding = False if self.row.name in _ONE_BY_ONE else self.row.pad_to
        for call in calls:
            tokens = self._tokenizer(
                call, padding=padding, max_length=self._length(), truncation=True, return_tensors="pt"
            )
            yield from zip(tokens.input_ids, tokens.attention_mask, strict=True)

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.pipe, self.component.replace("text_encoder", "tokenizer"))

    def _length(self) -> int:
        default = inspect.signature(self.pipe.encode_prompt).parameters.get("max_sequence_length")
        length = self.arguments.get("max_sequence_length", None if default is None else default.default)
        length = self.row.max_length if length is None else length
        if self.row.name in _LIMITED_BY_TOKENIZER:
            return min(length, self._tokenizer.model_max_length)
        return int(length)

    def _prompts(self) -> list[str]:
        return _as_list(self._for_t5("prompt"))

    def _negative_prompts(self) -> list[str]:
        has_negative = "negative_prompt" in inspect.signature(self.pipe.encode_prompt).parameters
        if not has_negative or not self.arguments.get("do_classifier_free_guidance", True):
            return []
        negative = self._for_t5("negative_prompt")
        if negative is None:
            return [] if self.row.name in _ZEROS_WITHOUT_NEGATIVE else [""]
        return _as_list(negative)

    def _for_t5(self, name: str) -> Any:
        """The argument for this T5: that with its number, or else the first."""
        own = self.arguments.get(name + self.component.removeprefix("text_encoder"))
        return own or self.arguments.get(name)


def _as_list(texts: str | Iterable[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
