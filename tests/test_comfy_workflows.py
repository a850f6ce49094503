"""What the files of the bundled workflows say of nodes, links and places; tests/comfyui has the page's view of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from node_boxes import box, overlapping

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
OURS = set(re.findall(r'node_id="(\w+)"', (ROOT / "comfy_nai_t5" / "nodes.py").read_text(encoding="utf-8")))
# The window that a workflow is fitted into at first: a notebook's, without the bars of the page.
WINDOW = (1600, 800)

Workflow = dict[str, Any]


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> Workflow:
    return dict(json.loads(request.param.read_text(encoding="utf-8")))


def test_links_and_slots_agree(workflow: Workflow) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) == workflow["last_node_id"]
    assert len(links) == len(workflow["links"]) and max(links) == workflow["last_link_id"]
    for number, source, output, target, place, kind in links.values():
        given, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][place]
        assert number in given["links"] and taken["link"] == number
        assert given["type"] == kind and taken["type"] in (kind, "*")
    given_out = sorted(number for node in nodes.values() for slot in node["outputs"] for number in slot["links"] or ())
    taken_in = sorted(slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None)
    assert given_out == taken_in == sorted(links)


def test_node_types_are_known(workflow: Workflow) -> None:
    ours = {node["type"] for node in workflow["nodes"] if node["type"].startswith("NAI")}
    assert ours and ours <= OURS


def test_no_node_lies_over_another(workflow: Workflow) -> None:
    assert overlapping(workflow["nodes"]) == []


def test_an_overlap_is_seen() -> None:
    """By the title alone, too."""
    upper = {"type": "upper", "pos": [0, 0], "size": [100, 100]}
    assert overlapping([upper, {"type": "lower", "pos": [90, 129], "size": [100, 100]}]) == [("upper", "lower")]
    assert overlapping([upper, {"type": "lower", "pos": [90, 130], "size": [100, 100]}]) == []


def test_data_flows_to_the_right(workflow: Workflow) -> None:
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    for _, source, _, target, _, kind in workflow["links"]:
        assert boxes[source][2] < boxes[target][0], f"{kind} from node {source} to node {target}"


def test_the_window_is_used(workflow: Workflow) -> None:
    """A workflow is about as wide as a window for its height, and readable when all of it is shown."""
    left, top, right, bottom = zip(*map(box, workflow["nodes"]), strict=True)
    width, height = max(right) - min(left), max(bottom) - min(top)
    assert 1.5 < width / height < 3.2
    assert min(WINDOW[0] / width, WINDOW[1] / height) > 0.75


def test_the_note_says_what_the_embedded_model_is() -> None:
    (path,) = (path for path in WORKFLOWS if path.stem == "t5_try_it")
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    (note,) = (node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    assert "trained on a grammar of captions" in note and "of no use to an image model" in note
    assert "random" not in note


def test_notes_name_the_files_that_are_loaded(workflow: Workflow) -> None:
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    values = [value for node in workflow["nodes"] if node["type"] != "MarkdownNote" for value in node["widgets_values"]]
    files = {value for value in values if str(value).endswith(".safetensors")}
    assert set(re.findall(r"`([^`/]+\.safetensors)`", note)) == files
