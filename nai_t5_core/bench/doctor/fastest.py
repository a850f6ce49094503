"""Which of the ways that were timed on a card are taken, for products and for attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from nai_t5_core.backends.cuda.measured_card import FEW_ROWS, TORCH, MeasuredAttention, MeasuredProduct

if TYPE_CHECKING:
    from nai_t5_core.backends.cuda.products import Configurations
    from nai_t5_core.bench.doctor.card_times import WayTime

# What is not faster by this much is left to torch: a difference may be noise, and other ways round otherwise.
FASTER = 0.97
# By how much whole layers have to be faster.
LAYERS_FASTER = 0.99

# Milliseconds of layers by the number of rows, and by how they are computed.
Together = Mapping[str, Mapping[str, float]]


def fastest_products(times: Iterable[WayTime]) -> tuple[MeasuredProduct, ...]:
    """The fastest way for every kind of product and number of rows, where it is faster than torch's."""
    found = []
    for ways in _by_kind_and_rows(times):
        by_torch = _torch_among(ways)
        best = min(ways, key=lambda each: each.microseconds)
        found.append(_measured(best if best.microseconds <= FASTER * by_torch.microseconds else by_torch, by_torch))
    return tuple(found)


def fastest_for_few_rows(times: Iterable[WayTime]) -> tuple[MeasuredProduct, ...]:
    """The fastest configuration of our kernel for few rows, whether or not it is faster than torch.

    Torch's launches do not overlap: one that is not slower by itself may be faster among others that do.
    """
    found = []
    for ways in _by_kind_and_rows(times):
        if ours := [each for each in ways if each.way == FEW_ROWS]:
            found.append(_measured(min(ours, key=lambda each: each.microseconds), _torch_among(ways)))
    return tuple(found)


def those_of_a_table(times: Iterable[WayTime], table: Configurations) -> tuple[MeasuredProduct, ...]:
    """The first configurations of a table, as they were timed.

    What is fastest alone need not be so among launches that overlap, which share multiprocessors and memory.
    """
    first_of: dict[tuple[str, int], dict[str, int]] = {key: asdict(known[0]) for key, known in table.items() if known}
    found = []
    for ways in _by_kind_and_rows(times):
        for each in ways:
            if each.way == FEW_ROWS and each.configuration == first_of.get((each.kind, each.rows)):
                found.append(_measured(each, _torch_among(ways)))
    return tuple(found)


def _by_kind_and_rows(times: Iterable[WayTime]) -> Iterable[list[WayTime]]:
    groups: dict[tuple[str, int], list[WayTime]] = {}
    for each in times:
        groups.setdefault((each.kind, each.rows), []).append(each)
    return groups.values()


def _torch_among(ways: Sequence[WayTime]) -> WayTime:
    return min((each for each in ways if each.way == TORCH), key=lambda each: each.microseconds)


def _measured(taken: WayTime, by_torch: WayTime) -> MeasuredProduct:
    return MeasuredProduct(
        kind=taken.kind,
        rows=taken.rows,
        way=taken.way,
        configuration=taken.configuration,
        microseconds=taken.microseconds,
        by_torch=by_torch.microseconds,
    )


def fastest_attention(times: Iterable[WayTime]) -> tuple[MeasuredAttention, ...]:
    """The fastest shape for every number of tokens."""
    best: dict[int, WayTime] = {}
    for each in times:
        if each.rows not in best or each.microseconds < best[each.rows].microseconds:
            best[each.rows] = each
    return tuple(
        MeasuredAttention(tokens=tokens, microseconds=each.microseconds, **each.configuration)
        for tokens, each in best.items()
    )


def without_slower_rows(products: Sequence[MeasuredProduct], together: Together) -> tuple[MeasuredProduct, ...]:
    """Products by torch alone for those numbers of rows where whole layers are not faster otherwise."""
    slower = {int(rows) for rows, times in together.items() if times["measured"] > times["torch"] * LAYERS_FASTER}
    return tuple(
        each.model_copy(update={"way": TORCH, "configuration": {}, "microseconds": each.by_torch})
        if each.rows in slower
        else each
        for each in products
    )


def overlapping_rows(together: Together, names: Iterable[str]) -> int:
    """Up to how many rows layers are faster in one of the named ways, whose launches overlap; 0 where in none."""
    most = 0
    for rows, times in sorted(together.items(), key=lambda item: int(item[0])):
        others = min(times["measured"], times["torch"])
        if min((times[name] for name in names if name in times), default=others) > others * LAYERS_FASTER:
            break
        most = int(rows)
    return most


def products_taken(
    products: Sequence[MeasuredProduct], overlapping: Mapping[str, Sequence[MeasuredProduct]], together: Together
) -> tuple[MeasuredProduct, ...]:
    """The products to be kept: up to :func:`overlapping_rows` those of the fastest launches that overlap, by their
    names; then the others.
    """
    most = overlapping_rows(together, overlapping)
    kept = []
    for rows, times in together.items():
        if int(rows) <= most:
            fastest = min((name for name in overlapping if name in times), key=times.__getitem__)
            kept += [each for each in overlapping[fastest] if each.rows == int(rows)]
    kept += [each for each in without_slower_rows(products, together) if each.rows > most]
    return tuple(kept)
