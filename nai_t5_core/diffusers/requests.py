"""What a diffusers pipeline will ask its T5 for, so that all of it can be encoded before."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from string import Formatter
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nai_t5_core.diffusers.adapter import family_of
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.diffusers.prompt_chunks import split_text
from nai_t5_core.facts.families import FAMILIES, Family
from nai_t5_core.facts.families.record import Diffusers
from nai_t5_core.facts.text_cleaning import clean_text

# A tokenizer with a greater limit than this has none.
_GREATEST_LIMIT = 32768

Texts = dict[str, list[str]]
"""The texts that the T5 gets, by the argument of `encode_prompt` that they stand in."""


@dataclass(frozen=True)
class Run:
    """One run of the pipeline's own `encode_prompt`."""

    arguments: dict[str, Any]
    naming: str = "{}"
    """What its results are called, from their names in the record."""
    uses_t5: bool = True


@dataclass(frozen=True)
class Request:
    """A pipeline, its T5, and what its `encode_prompt` is to be called with."""

    pipe: Any
    row: Family
    facts: Diffusers
    component: str
    model: NAIT5EncoderModel
    arguments: dict[str, Any]

    @classmethod
    def of(cls, pipe: Any, prompt: str | list[str], options: dict[str, Any]) -> Request:
        """Raises ValueError for all that :func:`nai_t5_core.diffusers.encode_prompt.encode_prompt` says."""
        row, facts = _known_family(pipe)
        return cls(pipe, row, facts, *_own_encoder(pipe), _arguments(pipe, facts, prompt, options))

    # -----------------------------------------------------------------------------------------------------------------
    # Runs and their texts
    # -----------------------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """The runs that make all that the pipeline's call needs."""
        if self.facts.runs == "by-encoder":
            indices = [self.arguments[_INDEX]] if _INDEX in self.arguments else [0, 1]
            return [Run({**self.arguments, _INDEX: i}, ("{}", "{}_2")[i], uses_t5=i == 1) for i in indices]
        if self.facts.runs == "once":
            return [Run(self.arguments)]
        negative = {name: value for name, value in self.arguments.items() if name.startswith("negative_prompt")}
        positive = {name: value for name, value in self.arguments.items() if name not in negative}
        if all(text is None for text in negative.values()):
            return [Run(positive)]
        count = len(_as_list(self.arguments["prompt"]))
        others = {name: None for name in positive if name.startswith("prompt_")}
        texts = {name.removeprefix("negative_"): _as_list(text, count) for name, text in negative.items() if text}
        return [Run(positive), Run(positive | others | {"prompt": [""] * count} | texts, "negative_{}")]

    def texts(self, run: Run) -> Texts:
        """What the T5 gets in a run; a negative prompt only if it is encoded."""
        if not run.uses_t5:
            return {}
        if self.facts.composed:
            return {self.facts.prompt_argument: _composed_texts(self.facts.composed, run.arguments)}
        prompts = _as_list(self._for_t5(run, "prompt"))
        texts = {self._name_for_t5("prompt"): prompts}
        if self.has_negative:
            negative = self._for_t5(run, "negative_prompt")
            if negative is not None or not self.facts.zeros_without_negative:
                texts[self._name_for_t5("negative_prompt")] = _as_list(negative or "", len(prompts))
        return texts

    @property
    def has_negative(self) -> bool:
        """Whether a run also encodes a negative prompt."""
        takes_it = "negative_prompt" in self._parameters
        return takes_it and bool(self.arguments.get("do_classifier_free_guidance", True))

    def _for_t5(self, run: Run, name: str) -> Any:
        """The argument for this T5: that with its number, or else the first."""
        return run.arguments.get(self._name_for_t5(name)) or run.arguments.get(name)

    def _name_for_t5(self, name: str) -> str:
        own = name + self.component.removeprefix("text_encoder")
        return own if own in self._parameters else name

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return _parameters(self.pipe.encode_prompt)

    # -----------------------------------------------------------------------------------------------------------------
    # Chunks
    # -----------------------------------------------------------------------------------------------------------------

    def chunks(self, texts: list[Texts], most: int, whole: Iterable[str]) -> list[list[Texts]]:
        """For each run its texts in pieces that fit, all of as many as the longest; ``""`` where a text has ended.

        Raises:
            ValueError: ``most`` is not 1 for a family whose model takes no longer text, or is less.
        """
        if most < 1:
            raise ValueError(f"max_chunks={most}; it must be 1 or more")
        if most == 1:
            return [[each] for each in texts]
        if self.facts.one_chunk:
            reason = f"{type(self.pipe).__name__} takes no longer text: {self.facts.one_chunk}"
            raise ValueError(f"max_chunks={most}, but {reason}; leave it 1")
        words = list(whole)

        def split(rows: list[str]) -> list[list[str]]:
            return [split_text(text, self._fits, most, words) for text in rows]

        pieces = [{name: split(rows) for name, rows in each.items()} for each in texts]
        count = max(len(text) for each in pieces for rows in each.values() for text in rows)

        def chunk(rows: list[list[str]], place: int) -> list[str]:
            return [text[place] if place < len(text) else "" for text in rows]

        return [
            [{name: chunk(rows, place) for name, rows in each.items()} for place in range(count)] for each in pieces
        ]

    def cut_text(self, texts: Texts) -> Texts:
        """The end of each text that exceeds the length, behind the tokens that stay and their end token."""
        kept = self._length_of(texts) - 1

        def cut(ids: list[int]) -> str:
            return self.tokenizer.decode(ids[kept:-1]) if len(ids) > kept + 1 else ""

        return {name: [cut(ids) for ids in self._ids(rows)] for name, rows in texts.items()}

    def _length_of(self, texts: Texts) -> int:
        """Tokens per text of a run: all, negative ones too, are cut to the longest prompt where pads go no further."""
        if self.row.pad_to != "longest":
            return self.length
        return min(self.length, max(len(ids) for ids in self._ids(texts["prompt"])))

    def _fits(self, text: str) -> bool:
        return len(self._ids([text])[0]) <= self.length

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            self.cleaned(texts), padding=False, truncation=False, verbose=False
        ).input_ids
        return ids

    # -----------------------------------------------------------------------------------------------------------------
    # Tokens
    # -----------------------------------------------------------------------------------------------------------------

    def batches(self, texts: Iterable[Texts]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Ids [prompts, length] and mask of all different texts: one batch, or one for each length that they have."""
        if self.facts.not_predicted:
            return
        rows = {}
        for each in texts:
            of_both = [text for prompts in each.values() for text in prompts]
            for ids, mask in self._tokens(of_both, self._length_of(each)):
                key = (*ids.tolist(), int(mask.sum()))
                rows[key] = (ids, mask)
        # Where the mask hides nothing, a pad would be text.
        hides = self.model.padding != "attend"
        by_length = sorted(rows.values(), key=lambda row: len(row[0]))
        for _, alike in groupby(by_length, key=lambda row: 0 if hides else len(row[0])):
            yield self._batch(alike)

    def batch(self, texts: list[str]) -> tuple[Tensor, Tensor | None]:
        """Ids and mask [texts, length] of texts that the pipeline pads to one length."""
        return self._batch(self._tokens(texts, self.length))

    def _batch(self, rows: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
        ids, mask = (
            pad_sequence(list(column), batch_first=True).to(self._device) for column in zip(*rows, strict=True)
        )
        return ids, mask if self.row.encoder_mask or self.facts.one_by_one else None

    @cached_property
    def _device(self) -> Any:
        """Where the pipeline computes. It looks at every module for that, so it is asked once."""
        return self.arguments.get("device") or self.pipe._execution_device

    def _tokens(self, texts: list[str], length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and mask of each text, as the pipeline's tokenizer gives them."""
        texts = self.cleaned(texts)
        if self.row.text_cleaning in ("quoted", "double-quoted"):
            texts = [text for text in texts if text]  # nothing in quotes is not encoded
        calls = [[text] for text in texts] if self.facts.one_by_one else [texts] if texts else []
        padding = False if self.facts.one_by_one else "max_length"
        for call in calls:
            tokens = self.tokenizer(call, padding=padding, max_length=length, truncation=True, return_tensors="pt")
            yield from zip(tokens.input_ids, tokens.attention_mask, strict=True)

    def token_weights(self, word_weights: Mapping[str, float], texts: Iterable[str]) -> dict[tuple[int, ...], float]:
        """The weights by the words' token ids, which are the same at the beginning of a text and within it."""
        if not word_weights:
            return {}
        if self.facts.not_predicted:
            raise ValueError(self.no_weights(self.facts.not_predicted))
        cleaned = self.cleaned(list(texts))
        weights = {}
        for words, weight in word_weights.items():
            if not any(words.lower() in text.lower() for text in cleaned):
                raise ValueError(f"word_weights has {words!r}, which stands in no prompt")
            ids = self.tokenizer(self.cleaned([words])[0], add_special_tokens=False).input_ids
            weights[tuple(ids)] = weight
        return weights

    def no_weights(self, reason: str) -> str:
        """What to say where words can have none."""
        return f"{type(self.pipe).__name__} {reason}, so that word_weights cannot be applied"

    def cleaned(self, texts: list[str]) -> list[str]:
        """The texts as the pipeline hands them to its tokenizer."""
        if hasattr(self.pipe, "_text_preprocessing"):
            cleaned: list[str] = self.pipe._text_preprocessing(texts, self.arguments.get("clean_caption", False))
            return cleaned
        return [clean_text(text, self.row.text_cleaning) for text in texts]

    @property
    def tokenizer(self) -> Any:
        return getattr(self.pipe, self.component.replace("text_encoder", "tokenizer"))

    @cached_property
    def length(self) -> int:
        """Tokens per prompt, end token included."""
        own = self.tokenizer.model_max_length
        if self.facts.tokenizer_limit == "is-the-length":
            return int(own) if own <= _GREATEST_LIMIT else self.row.max_length
        default = self._parameters.get("max_sequence_length")
        length = self.arguments.get("max_sequence_length", None if default is None else default.default)
        length = self.row.max_length if length is None else length
        if self.facts.tokenizer_limit == "cuts-the-length":
            return min(length, own)
        return int(length)


_INDEX = "text_encoder_index"


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def adapted_families() -> list[str]:
    """The families whose pipelines `encode_prompt` of ours takes, sorted."""
    return sorted(row.name for row in FAMILIES if row.diffusers is not None)


def _known_family(pipe: Any) -> tuple[Family, Diffusers]:
    row = family_of(pipe)
    if row is None or row.diffusers is None or not hasattr(pipe, "encode_prompt"):
        raise ValueError(
            f"encode_prompt of {type(pipe).__name__} is not known here; call pipe.encode_prompt, which uses our "
            f"encoder as well. Known families: {', '.join(adapted_families())}"
        )
    return row, row.diffusers


def _own_encoder(pipe: Any) -> tuple[str, NAIT5EncoderModel]:
    for name, part in pipe.components.items():
        model = getattr(part, "_orig_mod", part)
        if isinstance(model, NAIT5EncoderModel):
            return name, model
    raise ValueError(f"the T5 of {type(pipe).__name__} is not ours; call replace_text_encoder(pipe) first")


def _arguments(pipe: Any, facts: Diffusers, prompt: str | list[str], options: dict[str, Any]) -> dict[str, Any]:
    """All that the pipeline's `encode_prompt` needs. What is not given is what the pipeline's call would give it."""
    if not isinstance(prompt, str | list) or prompt == []:
        raise ValueError(f"prompt is {prompt!r}; give a text or a list of texts")
    taken, of_call = _parameters(pipe.encode_prompt), _parameters(pipe.__call__)
    apart = [name for name in of_call if name in ("negative_prompt", "negative_prompt_2")]
    allowed = [*taken, *(apart if facts.runs == "negative-apart" else [])]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__}.encode_prompt has no argument {', '.join(unknown)}; it has {', '.join(allowed)}"
        )
    needed = {
        "prompt_2": None,
        "prompt_3": None,
        "do_classifier_free_guidance": True,
        "num_waveforms_per_prompt": 1,
        "batch_size": 1 if isinstance(prompt, str) else len(prompt),
        "_cut_context": True,
        **{name: of_call[name].default for name in ("max_sequence_length", "clean_caption") if name in of_call},
    }
    defaults = {name: value for name, value in needed.items() if name in taken}
    if "device" in taken and "device" not in options:
        defaults["device"] = pipe._execution_device
    arguments = {**defaults, facts.prompt_argument: prompt, **options}
    missing = [
        name
        for name, parameter in taken.items()
        if name not in arguments and parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
    ]
    if missing:
        raise ValueError(f"{type(pipe).__name__}.encode_prompt needs {', '.join(missing)} beside the prompt")
    return arguments


def _composed_texts(pattern: str, arguments: dict[str, Any]) -> list[str]:
    names = [name for _, name, _, _ in Formatter().parse(pattern) if name]
    columns = (_as_list(arguments[f"{name}_prompt"] or "") for name in names)
    return [pattern.format(**dict(zip(names, row, strict=True))).strip() for row in zip(*columns, strict=True)]


def _as_list(texts: str | Iterable[str], count: int = 1) -> list[str]:
    return [texts] * count if isinstance(texts, str) else list(texts)
