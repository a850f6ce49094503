"""Parts of the report that show where the time of an encode on a card goes: its launches, and its products alone."""

from __future__ import annotations

from typing import Any

from nai_t5_core.bench.doctor.section import Section

_LONGEST = 4


def where_time_goes(found: dict[str, Any]) -> Section:
    """What one encode has the device do, by batch and by what encodes it, see
    :func:`nai_t5_core.bench.doctor.speed.count_launches`.
    """
    rows, lines = [], []
    for name, each in found.items():
        copies = sum(each["copies"].values())
        times = f"{each['device_us'] / 1e3:.2f} ms", f"{each['span_us'] / 1e3:.2f} ms"
        rows.append((name, str(each["kernels"]), f"{each['kernels_per_layer']:.1f}", str(copies), *times))
        longest = list(each["slowest_us"].items())[:_LONGEST]
        lines.append(f"{name}: " + ", ".join(f"{us / 1e3:.2f} ms {kernel}" for kernel, us in longest))
    lines.append(
        "What a call takes beyond the time from the first to the last, it takes on the host, before and after."
    )
    head = ("batch", "kernels", "a layer", "copies", "in kernels", "from the first to the last")
    return Section("Where the time of an encode goes", head, tuple(rows), tuple(lines))


def by_products(found: dict[str, Any]) -> Section:
    """Torch's products of all layers, see :func:`nai_t5_core.bench.doctor.speed.measure_products`."""
    shapes = list(next(iter(found["rows"].values()))["us"])
    rows = [
        (f"{count} rows", *(f"{each['us'][shape]:.1f} µs" for shape in shapes), f"{each['encoder_ms']:.2f} ms")
        for count, each in found["rows"].items()
    ]
    return Section(f"Products by torch, in {found['dtype']}", ("", *shapes, "all layers"), tuple(rows))


def by_products_in_8_bits(found: dict[str, Any]) -> Section:
    """Each product of a layer in each way, the fastest first, see
    :func:`nai_t5_core.bench.doctor.own_kernels.time_byte_products`.
    """
    rows = [(name, ways[0], "; ".join(ways[1:])) for name, ways in found["times"].items()]
    return Section("Products from weights in 8 bits", ("product", "fastest", "others"), tuple(rows))
