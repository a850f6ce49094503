"""How texts are generated: options with the names and meaning that transformers gives them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.given_numbers import real_number, whole_number
from nai_t5_core.facts.padding import LONGEST_ROW
from nai_t5_core.generation import token_scores

# Beams and samples of a prompt, which all grow side by side.
_MOST_TEXTS = 100_000


@dataclass(frozen=True)
class GenerationOptions:
    """How texts are generated.

    Attributes:
        max_new_tokens: the most tokens of a text, the end token included.
        min_new_tokens: before so many tokens, the end token is banned.
        num_beams: texts kept for each prompt; 1 is greedy, or sampling.
        num_return_sequences: texts returned for each prompt: the best beams, or that many samples.
        length_penalty: a finished beam's score is its log-probability divided by its length to this power.
        early_stopping: when a prompt stops that has ``num_beams`` finished texts. True: at once. False: when no running
            beam would have a better score if it ended now. "never": when none could have one at any length.
        do_sample: draw each token from its distribution.
        temperature: the logits are divided by it.
        top_k: draw from that many of the likeliest tokens; 0: from all.
        top_p: draw from the likeliest tokens that together have this probability.
        repetition_penalty: tokens of the text so far become less likely by this factor.
        no_repeat_ngram_size: no n-gram of this size comes twice in a text; 0: no such rule.
        forced_start: tokens that every text begins with, after the start token. They count neither in the score and
            its length nor in ``max_new_tokens``.
        decoder_start_token_id, eos_token_id, pad_token_id: None: those of the model.
        fixed_shapes: see :class:`nai_t5_core.generation.decoding.Decoding`.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forced_start: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    fixed_shapes: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "forced_start", tuple(self.forced_start))
        for name, least, most in (
            ("max_new_tokens", 1, LONGEST_ROW),
            ("min_new_tokens", 0, LONGEST_ROW),
            ("num_beams", 1, _MOST_TEXTS),
            ("num_return_sequences", 1, _MOST_TEXTS),
            ("top_k", 0, None),
            ("no_repeat_ngram_size", 0, None),
        ):
            whole_number(name, getattr(self, name), least, most)
        for name in ("temperature", "repetition_penalty", "top_p", "length_penalty"):
            real_number(name, getattr(self, name))
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must be above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; it must be above 0 and at most 1")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping={self.early_stopping!r}; allowed: True, False, 'never'")
        if self.do_sample and self.num_beams > 1:
            raise ValueError("do_sample=True goes with num_beams=1: beams are not sampled")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} with num_beams={self.num_beams}: there are only as "
                "many texts as beams; use more, or do_sample=True"
            )

    def for_model(self, config: T5Config) -> GenerationOptions:
        """A copy with the model's special tokens where none are given.

        Raises:
            ValueError: a token outside the vocabulary.
        """
        special = {
            name: getattr(config, name) if getattr(self, name) is None else getattr(self, name)
            for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id")
        }
        for name, token in [*special.items(), *(("forced_start", token) for token in self.forced_start)]:
            if not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise ValueError(f"{name}: token {token} is outside the vocabulary of {config.vocab_size} tokens")
        return dataclasses.replace(self, **special)

    @property
    def start(self) -> tuple[int, ...]:
        """The tokens that every text begins with; only for the result of :meth:`for_model`."""
        assert self.decoder_start_token_id is not None
        return (self.decoder_start_token_id, *self.forced_start)

    @property
    def end_token(self) -> int:
        assert self.eos_token_id is not None
        return self.eos_token_id

    @property
    def pad_token(self) -> int:
        assert self.pad_token_id is not None
        return self.pad_token_id

    @property
    def total_length(self) -> int:
        """The most tokens of a text, with those that it begins with."""
        return len(self.start) + self.max_new_tokens

    @property
    def texts_per_prompt(self) -> int:
        """Texts that are generated at once for each prompt: beams or samples."""
        return self.num_return_sequences if self.do_sample else self.num_beams

    def apply_rules(self, scores: Tensor, history: Tensor) -> Tensor:
        """Penalties and bans on logits or log-probabilities [texts, vocab_size]; history is [texts, tokens so far]."""
        if self.repetition_penalty != 1:
            scores = token_scores.penalise_repetition(scores, history, self.repetition_penalty)
        if self.no_repeat_ngram_size > 0:
            scores = token_scores.ban_repeated_ngrams(scores, history, self.no_repeat_ngram_size)
        if history.shape[1] - len(self.start) < self.min_new_tokens:
            scores = token_scores.ban_token(scores, self.end_token)
        return scores

    def apply_filters(self, logits: Tensor) -> Tensor:
        """Temperature, top-k and top-p of sampling: [texts, vocab_size], −∞ at tokens that cannot be drawn."""
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k > 0:
            logits = token_scores.keep_top_k(logits, self.top_k)
        return token_scores.keep_top_p(logits, self.top_p) if self.top_p < 1 else logits
