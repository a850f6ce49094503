"""Lays the bundled workflows out by the sizes that ComfyUI's page gives their nodes.

Nodes that begin at the same x are a column, in the order of their y. Columns and nodes are moved apart, and nodes
become as large as the page draws them, with what they show after a run; one that is larger in the file stays so. To
rearrange a workflow, write rough positions into its file and run this, then ``pictures.py``.

COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/arrange.py
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from comfy_page import RENDERERS, greeted, open_page
from comfy_server import WORKFLOWS, Server
from node_boxes import TITLE

# Pixels of the graph: the space between nodes and between columns, and what sizes are multiples of.
_BETWEEN_NODES, _BETWEEN_COLUMNS, _GRID = 30, 50, 10


def columns(nodes: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The nodes from left to right, and from top to bottom."""
    places = sorted({node["pos"][0] for node in nodes})
    return [sorted((node for node in nodes if node["pos"][0] == x), key=lambda node: node["pos"][1]) for x in places]


def arrange(workflow: dict[str, Any], needed: dict[int, list[float]]) -> None:
    """Gives every node of a workflow at least the size that it needs, and a place of its own."""
    x = 0
    for column in columns(workflow["nodes"]):
        y = 0
        for node in column:
            sizes = zip(node["size"], needed[node["id"]], strict=True)
            node["size"] = [math.ceil(max(pair) / _GRID) * _GRID for pair in sizes]
            node["pos"] = [x, y]
            y += node["size"][1] + TITLE + _BETWEEN_NODES
        x += max(node["size"][0] for node in column) + _BETWEEN_COLUMNS


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        greeted(Path(folder))
        server = Server(os.environ["COMFYUI_PATH"], Path(folder))
        try:
            with open_page() as page:
                page.open(server.url)
                for renderer in RENDERERS:
                    page.show_nodes_by(renderer)
                    for path in WORKFLOWS:
                        workflow = json.loads(path.read_text(encoding="utf-8"))
                        arrange(workflow, page.smallest_sizes(path))
                        path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False), encoding="utf-8")
        finally:
            server.stop()


if __name__ == "__main__":
    main()
