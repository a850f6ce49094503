"""A batch through the cache: what is kept is taken, the rest is encoded in one pass, and all comes in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nai_t5_core.facts.padding import PaddingPolicy
from nai_t5_core.model.precision import DTYPES
from nai_t5_core.prompts.cache.key import Settings
from nai_t5_core.prompts.cache.store import Store


@dataclass(frozen=True)
class _Row:
    """One prompt of a batch: the ids that are attended to, and those behind them that are only computed."""

    fed: list[int]
    pads: list[int]

    @property
    def length(self) -> int:
        """How many hidden states the result has of it."""
        return len(self.fed) + len(self.pads)


def through_cache(
    store: Store,
    settings_now: Callable[[], Settings | None],
    encode: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    mask: Tensor,
    padding: PaddingPolicy,
    extra_pad: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Hidden states [batch, length, d_model] of a padded batch, as ``encode(ids, mask)`` gives them.

    Args:
        settings_now: those of the encoder at this moment, the same object for as long as they are the same; None while
            they are not known, which is as if there were no cache. Results are kept if they were the same before and
            after.
        encode: computes some of the prompts, with this padding.
        ids, mask: [batch, length]; True at the tokens. Prompts whose tokens are not one run from the first place on
            make the whole batch be encoded.
        padding, extra_pad: see :func:`nai_t5_core.model.packing.pack_batch`.
        device: where results are put that were kept.
    """
    settings = settings_now()
    rows = None if settings is None else _rows(ids, mask, padding, extra_pad)
    if settings is None or rows is None:
        return encode(ids, mask)
    keys = [settings.key(row.fed, row.pads) for row in rows]
    found: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for index, (key, row) in enumerate(zip(keys, rows, strict=True)):
        if key.digest in found or key.digest in missing:
            continue
        states = store.get(key, row.length)
        if states is None:
            missing[key.digest] = index
        else:
            found[key.digest] = states[: row.length].to(device)
    if missing:
        chosen = list(missing.values())
        is_whole = len(chosen) == len(rows)
        states = encode(ids, mask) if is_whole else encode(ids[chosen], mask[chosen])
        is_known = settings_now() is settings
        for index, encoded in zip(chosen, states, strict=True):
            found[keys[index].digest] = encoded[: rows[index].length]
            if is_known:
                store.put(keys[index], encoded[: rows[index].length])
        if is_whole:
            return states
    longest = max(row.length for row in rows) if padding == "trim" else ids.shape[1]
    first = next(iter(found.values()))
    out = torch.zeros(len(rows), longest, settings.config.d_model, dtype=DTYPES[settings.dtype], device=first.device)
    for place, key, row in zip(out, keys, rows, strict=True):
        place[: row.length] = found[key.digest]
    return out


def _rows(ids: Tensor, mask: Tensor, padding: PaddingPolicy, extra_pad: int) -> list[_Row] | None:
    length = ids.shape[1]
    counts = mask.sum(dim=1)
    is_run = mask == (torch.arange(length, device=mask.device) < counts[:, None])
    if not length or not bool(is_run.all()) or not bool(counts.all()):
        return None
    found = []
    for row, count in zip(ids.tolist(), counts.tolist(), strict=True):
        # Pads that are attended to are tokens like others.
        fed = length if padding == "attend" else count
        computed = length if padding in ("attend", "exact") else count + extra_pad
        found.append(_Row(row[:fed], row[fed:computed]))
    return found
