"""The pack in ComfyUI's page, as a user meets it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_page import CHROMIUM, RENDERERS, Page, greeted, open_page
from comfy_server import ROOT, WORKFLOWS, Server
from node_boxes import overlapping

COMFYUI = os.environ.get("COMFYUI_PATH")
if not COMFYUI:
    pytest.skip("COMFYUI_PATH is not set: give a ComfyUI checkout to run these", allow_module_level=True)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright (no browser of its own)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    greeted(base)
    running = Server(COMFYUI, base)
    yield running
    running.stop()


@pytest.fixture
def page(server: Server) -> Iterator[Page]:
    with open_page() as opened:
        opened.open(server.url)
        yield opened
        assert opened.faults_of_ours() == []


@pytest.mark.parametrize("name", ["Load T5 (NAI)", "T5 Token Count"])
def test_a_node_is_found_and_placed(name: str, page: Page) -> None:
    page.find_and_place(name)
    assert page.node_types() == [{"Load T5 (NAI)": "NAILoadT5", "T5 Token Count": "NAIT5TokenCount"}[name]]
    assert page.missing_nodes() == []


def test_a_template_is_opened_and_runs(page: Page, server: Server, tmp_path: Path) -> None:
    page.browse_templates()
    for path in WORKFLOWS:
        page.see(path.stem, "attached")
    page.open_template("t5_try_it")
    assert {"NAILoadT5", "NAIT5Encode", "NAIT5TokenCount", "NAIT5PrecisionReport"} <= set(page.node_types())
    assert page.missing_nodes() == []
    page.run()
    page.fit()
    page.picture(tmp_path / "ran.png")
    assert (server.base / "output" / "t5_embeddings" / "fox.safetensors").is_file()


def test_errors_of_a_run_are_seen(page: Page) -> None:
    """That a run which fails is no success to these tests."""
    page.show_workflow(ROOT / "example_workflows" / "t5_try_it.json")
    loader = "app.graph.nodes.find(node => node.type == 'NAILoadT5').widgets.find(widget => widget.name == 'family')"
    # The first is refused before any node runs, or in one where an older server does not look.
    messages = {"no such family": "not in list|unknown family", "wan": "Wan was trained with"}
    for family, message in messages.items():
        page.page.evaluate(f"{loader}.value = {family!r}")
        with pytest.raises(AssertionError, match=message):
            page.run()
    page.faults.clear()  # those errors, which the page tells in its console as well


def test_every_bundled_workflow_opens(page: Page) -> None:
    for path in WORKFLOWS:
        page.show_workflow(path)
        assert page.missing_nodes() == [], path.stem
        assert (ROOT / "example_workflows" / f"{path.stem}.jpg").is_file()


@pytest.fixture(params=RENDERERS)
def drawn(request: pytest.FixtureRequest, page: Page) -> Page:
    """The page, with nodes drawn in each way that it has."""
    if request.param == "modern" and not page.has_modern_nodes():
        pytest.skip("this front end's nodes as elements of the page are an experiment")
    page.show_nodes_by(request.param)
    return page


def test_nodes_have_the_room_that_they_need(drawn: Page) -> None:
    for path in WORKFLOWS:
        needed = drawn.smallest_sizes(path)
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            (width, height), (least_width, least_height) = node["size"], needed[node["id"]]
            assert width >= least_width and height >= least_height, (path.stem, node["type"], needed[node["id"]])


def test_no_node_lies_over_another_after_a_run(drawn: Page) -> None:
    drawn.show_workflow(ROOT / "example_workflows" / "t5_try_it.json")
    drawn.run()
    assert overlapping(drawn.nodes()) == []
