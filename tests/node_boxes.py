"""The places that nodes of a workflow take."""

from __future__ import annotations

from itertools import combinations
from typing import Any

# Height of the bar above a node, which its position and its size leave out.
TITLE = 30

Box = tuple[float, float, float, float]


def box(node: dict[str, Any]) -> Box:
    """Left, top, right and bottom of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def overlapping(nodes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The types of all pairs of nodes of which one lies over the other."""
    pairs = ((one, other, box(one), box(other)) for one, other in combinations(nodes, 2))
    return [
        (one["type"], other["type"])
        for one, other, a, b in pairs
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]
