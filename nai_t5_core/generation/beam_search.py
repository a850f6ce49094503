"""Batched beam search. Every prompt stops on its own, so that its texts are the same in a batch as alone.

Scores are float32 sums of log-probabilities, added and compared in the same order as in transformers: where two texts
have nearly the same score, rounding decides which one is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nai_t5_core.generation.decoding import Decoding
from nai_t5_core.generation.options import GenerationOptions
from nai_t5_core.generation.token_scores import find_largest

# Added to the score of what must not be chosen; finite, so that such scores still have an order.
_HOPELESS = -1.0e9


class BeamResult(NamedTuple):
    """The best texts of every prompt, best first.

    ``tokens`` is [prompts · num_return_sequences, new tokens], padded behind the end token; ``scores`` has their
    log-probabilities divided by length to the power of ``length_penalty``, [prompts · num_return_sequences] float32.
    """

    tokens: Tensor
    scores: Tensor


@dataclass
class _Texts:
    """Texts of every prompt: ``tokens`` [prompts, texts, total length], ``scores`` [prompts, texts]."""

    tokens: Tensor
    scores: Tensor

    def select(self, index: Tensor) -> _Texts:
        """The texts at ``index``, [prompts, chosen] int64."""
        tokens = self.tokens.gather(1, index[:, :, None].expand(-1, -1, self.tokens.shape[2]))
        return _Texts(tokens, self.scores.gather(1, index))


@torch.no_grad()
def beam_search(decoding: Decoding, options: GenerationOptions) -> BeamResult:
    """Finds the best ``options.num_return_sequences`` texts for every prompt, with ``options.num_beams`` beams."""
    search = _Search(decoding, options)
    logits = decoding.begin(options.start)
    for length in range(len(options.start), options.total_length):
        parents, tokens = search.extend(logits, length)
        (is_over,) = decoding.ask(search.is_over())
        if is_over or length + 1 == options.total_length:
            break
        decoding.reorder(parents)
        logits = decoding.step(tokens)
    return search.result()


class _Search:
    """The running and the finished texts of all prompts."""

    def __init__(self, decoding: Decoding, options: GenerationOptions) -> None:
        self.options = options
        device, shape = decoding.model.device, decoding.shape
        tokens = torch.full((*shape, options.total_length), options.pad_token, device=device)
        tokens[:, :, : len(options.start)] = torch.tensor(options.start, device=device)
        # All beams begin with the same tokens, so only the first may be continued.
        scores = torch.zeros(shape, device=device)
        scores[:, 1:] = _HOPELESS
        self.running = _Texts(tokens, scores)
        self.finished = _Texts(tokens, torch.full(shape, _HOPELESS, device=device))
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        # For each prompt, whether a running text may still get a better score than the finished ones.
        self.is_open = torch.ones(shape[0], 1, dtype=torch.bool, device=device)

    def extend(self, logits: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Continues the running texts, which have ``length`` tokens.

        Takes logits [prompts, beams, vocab_size]; returns the beams that are continued and their new tokens,
        [prompts, beams] each.
        """
        beams = logits.shape[1]
        candidates, parents = self._candidates(logits, length)
        tokens = candidates.tokens[:, :, length]
        is_last = length + 1 == self.options.total_length
        ends = torch.ones_like(tokens, dtype=torch.bool) if is_last else tokens == self.options.end_token
        self._finish(candidates, ends, length + 1 - len(self.options.start))
        candidates.scores = candidates.scores + ends * _HOPELESS
        chosen = candidates.scores.topk(beams).indices
        self.running = candidates.select(chosen)
        self._close(length + 1 - len(self.options.start))
        return parents.gather(1, chosen), tokens.gather(1, chosen)

    def _candidates(self, logits: Tensor, length: int) -> tuple[_Texts, Tensor]:
        """The best 2 · beams continuations, at most half of which end now, and the beams that they continue."""
        prompts, beams, vocab_size = logits.shape
        scores = logits.log_softmax(dim=-1).flatten(0, 1)
        scores = self.options.apply_rules(scores, self.running.tokens[:, :, :length].flatten(0, 1))
        scores = scores.unflatten(0, (prompts, beams)).add_(self.running.scores[:, :, None])
        best, places = find_largest(scores.flatten(1), 2 * beams)
        parents = places // vocab_size
        candidates = self.running.select(parents)
        candidates.scores = best
        candidates.tokens[:, :, length] = places % vocab_size
        return candidates, parents

    def _finish(self, candidates: _Texts, ends: Tensor, new_tokens: int) -> None:
        """Keeps the best of the finished texts and those among the best ``beams`` candidates that end now."""
        beams = self.finished.scores.shape[1]
        ends = ends & (torch.arange(2 * beams, device=ends.device) < beams)
        scores = candidates.scores / (new_tokens**self.options.length_penalty)
        is_shut = ~self.is_open
        if self.options.early_stopping is True:
            is_shut = is_shut | self.is_finished.all(dim=1, keepdim=True)
        scores = scores + (is_shut | ~ends) * _HOPELESS
        both = _Texts(
            torch.cat([self.finished.tokens, candidates.tokens], dim=1),
            torch.cat([self.finished.scores, scores], dim=1),
        )
        best = both.scores.topk(beams).indices
        self.finished = both.select(best)
        self.is_finished = torch.cat([self.is_finished, ends], dim=1).gather(1, best)

    def _close(self, new_tokens: int) -> None:
        """Closes the prompts whose running texts cannot get a better score than the worst finished one."""
        options = self.options
        # Where long texts are favoured, "never" assumes that a running text reaches the greatest length.
        is_patient = options.early_stopping == "never" and options.length_penalty > 0
        length = options.max_new_tokens if is_patient else new_tokens
        best_running = self.running.scores[:, :1] / (length**options.length_penalty)
        worst = self.finished.scores.amin(dim=1, keepdim=True)
        worst_finished = torch.where(self.is_finished, worst, _HOPELESS)
        self.is_open = self.is_open & (best_running > worst_finished).any(dim=1, keepdim=True)

    def is_over(self) -> Tensor:
        """Whether the search has ended for every prompt: bool []."""
        are_closed = self.is_open.logical_not().all()
        return are_closed | self.is_finished.all() if self.options.early_stopping is True else are_closed

    def result(self) -> BeamResult:
        wanted, first = self.options.num_return_sequences, len(self.options.start)
        tokens = self.finished.tokens[:, :wanted, first:].flatten(0, 1)
        is_end = tokens == self.options.end_token
        is_behind = is_end.cumsum(dim=1) - is_end.long() > 0
        longest = int((~is_behind).sum(dim=1).max())
        tokens = tokens.masked_fill(is_behind, self.options.pad_token)[:, :longest]
        return BeamResult(tokens, self.finished.scores[:, :wanted].flatten())
