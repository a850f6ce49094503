"""Rules that change the scores of the next token before one is chosen: penalties, bans, and the filters of sampling.

Each rule maps scores [texts, vocab_size] (logits or log-probabilities) to new scores. Formulas and order are those of
transformers, so that the same options give the same texts.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores that find_largest looks at together; a divisor of the published vocabularies.
_BLOCK = 128


def penalise_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Makes the tokens of a text less likely: their scores are divided if positive, and multiplied if negative.

    ``history`` is [texts, tokens so far], the start token included (Keskar et al. 2019, section 4.1).
    """
    seen = scores.gather(1, history)
    return scores.scatter(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))


def ban_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Bans each token that would complete a run of ``size`` tokens which the text already has."""
    if history.shape[1] < size:
        return scores
    runs = history.unfold(1, size, 1)
    ending = history[:, history.shape[1] - size + 1 :]
    repeats = (runs[..., :-1] == ending[:, None]).all(dim=-1)
    vocab_size = scores.shape[1]
    # Runs that do not match ban an extra token behind the vocabulary, which is cut off below.
    banned = scores.new_zeros(scores.shape[0], vocab_size + 1, dtype=torch.bool)
    banned.scatter_(1, torch.where(repeats, runs[..., -1], vocab_size), True)
    return scores.masked_fill(banned[:, :vocab_size], -torch.inf)


def ban_token(scores: Tensor, token: int) -> Tensor:
    is_banned = torch.arange(scores.shape[1], device=scores.device) == token
    return scores.masked_fill(is_banned, -torch.inf)


def find_largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest scores of each row and their indices, largest first: [rows, count] each.

    The largest scores are in the ``count`` blocks with the largest maxima, so only those blocks are sorted. On the CPU
    this is several times faster than topk on a long row.
    """
    length = scores.shape[1]
    if length % _BLOCK or length < count * _BLOCK:
        best = scores.topk(count)
        return best.values, best.indices
    blocks = scores.unflatten(1, (-1, _BLOCK))
    chosen = blocks.amax(dim=-1).topk(count).indices
    best = blocks.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1).topk(count)
    block, place = best.indices // _BLOCK, best.indices % _BLOCK
    return best.values, chosen.gather(1, block) * _BLOCK + place


def keep_top_k(scores: Tensor, count: int) -> Tensor:
    """Bans all but the ``count`` likeliest tokens, and those exactly as likely as the last of them."""
    least = scores.topk(min(count, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: Tensor, mass: float) -> Tensor:
    """Bans the least likely tokens whose probabilities together are at most 1 − ``mass``; the likeliest stays."""
    ascending, order = scores.sort(dim=-1)
    is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - mass
    is_tail[:, -1] = False
    return scores.masked_fill(is_tail.scatter(1, order, is_tail), -torch.inf)
