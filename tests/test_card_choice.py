"""What is done on a card: by a file that the doctor wrote, or by a table; and how makers' cards are told apart."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_toys import quantised_stack
from conftest import TOY_CONFIGS, build_stack, random_state

from nai_t5_core.backends.choose import encode_on_cuda
from nai_t5_core.backends.cuda import card_choice, device_refusals, measured_card
from nai_t5_core.backends.cuda.attention_shapes import USUAL, AttentionShape
from nai_t5_core.backends.cuda.card import COMPILED_FOR_AMD, Card, card_of
from nai_t5_core.backends.cuda.card_choice import TABLE, Choice, choice_for
from nai_t5_core.backends.cuda.device_refusals import missing_for_8_bits, missing_triton
from nai_t5_core.backends.cuda.measured_card import NEVER, MeasuredCard, measured_file, read_measured, versions
from nai_t5_core.backends.cuda.refusals import refuses_for_good
from nai_t5_core.backends.cuda.runner import CudaRunner
from nai_t5_core.backends.forecast import forecast
from nai_t5_core.model.attention_choice import FLEX_FROM_LENGTHS

H200 = Card("NVIDIA H200", "sm_90")
RTX = Card("NVIDIA GeForce RTX 4090", "sm_89")
MI300 = Card("AMD Instinct MI300X", "gfx942")
CUDA = torch.device("cuda")

FEW = {"block_columns": 64, "block_depth": 64, "parts": 1, "stages": 4, "warps": 4}
PRODUCTS = [
    {"kind": "gated", "rows": 64, "way": "few rows", "configuration": FEW, "microseconds": 40, "by_torch": 50},
    {"kind": "gated", "rows": 512, "way": "tiles", "configuration": FEW | {"block_rows": 128}, "microseconds": 90,
     "by_torch": 99},
    {"kind": "plain", "rows": 16, "way": "torch", "microseconds": 30, "by_torch": 30},
    # Of a later version, which knows more.
    {"kind": "gated", "rows": 64, "weights": "int8", "way": "int8 rows", "microseconds": 20, "by_torch": 50},
]  # fmt: skip
ATTENTION = [
    {"tokens": 1024, "queries": 128, "keys": 64, "warps": 8, "stages": 3, "microseconds": 70},
    {"tokens": 64, "queries": 16, "keys": 64, "warps": 4, "stages": 2, "microseconds": 4},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice_for.cache_clear()
    measured_card._pass_over.cache_clear()
    yield
    choice_for.cache_clear()


def found_for(card: Card, /, **others: Any) -> dict[str, Any]:
    about = {"format": 2, "card": card.name, "architecture": card.architecture, **versions()}
    return {**about, "products": PRODUCTS, "attention": ATTENTION, "flex_from_lengths": 4, **others}


def written(card: Card, /, **others: Any) -> Path:
    path = measured_file(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found_for(card, **others)))
    return path


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], gfx: str | None = None) -> None:
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1], gcnArchName=gfx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.version, "hip", None if gfx is None else "6.4")


# ---------------------------------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "gfx", "architecture", "overlaps"),
    [
        ((8, 6), None, "sm_86", False),
        ((9, 0), None, "sm_90", True),
        ((12, 0), None, "sm_120", True),
        # What torch makes of AMD's names is Hopper's capability, and higher ones.
        ((9, 0), "gfx90a:sramecc+:xnack-", "gfx90a", False),
        ((9, 4), "gfx942:sramecc+:xnack-", "gfx942", False),
        ((11, 0), "gfx1100", "gfx1100", False),
    ],
)
def test_makers_are_told_apart(
    capability: tuple[int, int], gfx: str | None, architecture: str, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "a card", capability, gfx)
    card = card_of(CUDA)
    assert card is not None and card.architecture == architecture
    assert card.can_overlap == overlaps and card.is_amd == (gfx is not None)
    assert card.capability == ((0, 0) if gfx else capability)
    choice = choice_for(card)
    assert (choice.row.products == "few rows") == (architecture == "sm_90")


def test_no_card_where_there_is_none() -> None:
    assert card_of(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert card_of(CUDA) is None


def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stack that says it is on the pretended card, as the checks of the device see it."""
    config = TOY_CONFIGS["v1.1"].encoder_only()
    stack = build_stack(config, random_state(config), torch.float16)
    monkeypatch.setattr(type(stack), "device", property(lambda self: CUDA))
    monkeypatch.setattr("nai_t5_core.backends.cuda.device_refusals.missing_triton", lambda: None)
    monkeypatch.setattr("nai_t5_core.backends.cuda.refusals._module_obstacles", lambda *_: iter(()))
    return stack


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "Triton is not installed"),
        (("__init__.py", "language/extra/cuda/utils.py"), r"older than 3\.4 .*: install torch 2\.8 or later"),
        (("__init__.py", "language/extra/cuda/gdc.py"), None),
    ],
)
def test_a_triton_that_cannot_compile_the_kernels_is_told(
    files: tuple[str, ...], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of it is imported: a folder that only holds files of these names is found as the installed one is."""
    for file in files:
        place = tmp_path / "triton" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    missing = missing_triton()
    assert missing is None if message is None else missing and re.search(message, missing)


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_launches_do_not_overlap_where_triton_cannot_compile_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.language.extra import cuda

    from nai_t5_core.backends.cuda.encoder import cuda_encoder
    from nai_t5_core.bench.doctor.own_kernels import _possible

    stack = on_a_card(monkeypatch)
    pretend(monkeypatch, "a card", (9, 0), None)
    monkeypatch.setattr(cuda, "gdc_wait", lambda _semantic=None: None)
    assert "triton-overlapping" in _possible(CUDA)
    monkeypatch.setattr(cuda, "gdc_wait", lambda _builder=None: None)  # as in Triton 3.4
    assert "triton-overlapping" not in _possible(CUDA)
    with pytest.raises(ValueError, match=r"'triton-overlapping' cannot be taken here: it needs Triton 3\.5"):
        cuda_encoder(stack, products="triton-overlapping")


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
@pytest.mark.parametrize(("driver", "reason"), [(12020, "CUDA 12.2"), (12030, None), (13000, None), (None, None)])
def test_launches_do_not_overlap_by_a_driver_whose_graphs_cannot(
    driver: int | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.language.extra import cuda

    monkeypatch.setattr(cuda, "gdc_wait", lambda _semantic=None: None)
    monkeypatch.setattr(device_refusals, "cuda_of_driver", lambda: driver)
    missing = device_refusals.missing_to_overlap()
    assert missing is None if reason is None else missing is not None and reason in missing
    assert choice_for(H200).overlapping_rows == (64 if reason is None else 0)


def test_the_driver_is_asked_for_its_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def version_of(answer: int, result: int = 0) -> Any:
        def ask(version: Any) -> int:
            version._obj.value = answer
            return result

        return SimpleNamespace(cuDriverGetVersion=ask)

    libraries = {"libcuda.so.1": version_of(12080)}

    def load(name: str) -> Any:
        if name not in libraries:
            raise OSError(name)
        return libraries[name]

    monkeypatch.setattr(device_refusals.ctypes, "CDLL", load)
    ask = device_refusals.cuda_of_driver.__wrapped__
    assert ask() == 12080
    libraries["libcuda.so.1"] = version_of(0, result=3)
    assert ask() is None
    libraries.clear()
    assert ask() is None
    libraries["nvcuda.dll"] = version_of(12020)
    assert ask() == 12020


@pytest.mark.parametrize(
    ("capability", "gfx", "message"),
    [
        ((7, 5), None, r"compute capability \(7, 5\); at least \(8, 0\)"),
        ((10, 3), "gfx1030", "gfx1030; of AMD's they were compiled for gfx90a, gfx942, gfx1100"),
        ((9, 0), "gfx90a", None),
        ((8, 0), None, None),
    ],
)
def test_cards_that_are_too_old_are_refused(
    capability: tuple[int, int], gfx: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = on_a_card(monkeypatch)
    pretend(monkeypatch, "a card", capability, gfx)
    reason = refuses_for_good(stack)
    assert (reason is None) == (message is None)
    assert reason is None or re.search(str(message), reason)


@torch.no_grad()
def test_cards_of_amd_are_left_to_torch_until_the_doctor_has_tried_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = on_a_card(monkeypatch)
    pretend(monkeypatch, MI300.name, (9, 4), "gfx942")
    encode_on_cuda(stack)
    assert "never run on AMD's cards; nai-t5 doctor tries them" in stack.describe_attention()
    assert forecast(stack.config, CUDA, torch.float16) == "cuda, torch"
    assert CudaRunner(products="torch").refusal(stack) is None, "what is named is used"
    written(MI300, products=[])
    choice_for.cache_clear()
    assert stack.describe_attention() == "auto: kernels for CUDA, as measured on this card"
    assert forecast(stack.config, CUDA, torch.float16).startswith("cuda, kernels where they can, products measured")


@pytest.mark.parametrize(
    ("card", "capability", "reason"),
    [
        (H200, (9, 0), None),
        (MI300, (9, 4), "the kernels for weights in 8 bits were compiled for NVIDIA's cards only"),
    ],
)
def test_weights_in_8_bits_are_for_cards_of_nvidia(
    card: Card, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = quantised_stack("int8").cpu()
    monkeypatch.setattr(type(stack), "device", property(lambda self: CUDA))
    monkeypatch.setattr("nai_t5_core.backends.cuda.device_refusals.missing_triton", lambda: None)
    pretend(monkeypatch, card.name, capability, card.architecture if card.is_amd else None)
    assert refuses_for_good(stack) == reason
    assert missing_for_8_bits(CUDA, torch.float16) == reason


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def test_what_was_measured_and_what_is_an_estimate() -> None:
    assert {name for name, row in TABLE.items() if row.measured_on} == {"sm_90"}
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", *COMPILED_FOR_AMD} == set(TABLE)
    assert "as measured on an H200; nai-t5 doctor measures" in choice_for(H200).origin
    assert choice_for(RTX).origin == "an estimate for sm_89; nai-t5 doctor measures this card"
    assert choice_for(Card("unknown", "sm_150")).origin.startswith("an estimate for sm_150")


def test_what_is_chosen_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = on_a_card(monkeypatch)
    pretend(monkeypatch, RTX.name, (8, 9))
    with caplog.at_level(logging.INFO, logger=card_choice.__name__), torch.no_grad():
        encode_on_cuda(stack)
        assert f"auto: kernels for CUDA, {choice_for(RTX).origin}" in repr(stack)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert RTX.name in caplog.text and "an estimate for sm_89" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_decides() -> None:
    written(RTX)
    choice = choice_for(RTX)
    assert choice.origin == "as measured on this card" and choice.flex_from_lengths == 4
    shapes = choice.attention_for(64)
    assert [shapes(tokens).queries for tokens in (1, 64, 65, 1024, 5000)] == [16, 16, 128, 128, 128]
    assert shapes(1000) == AttentionShape(128, 64, 8, 3)
    assert choice.attention_for(128) == USUAL, "measured with heads of 64"
    assert choice_for(H200).measured is None, "another card's"


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_products_of_a_file() -> None:
    from nai_t5_core.backends.cuda.chosen_products import plain_products_of, products_of
    from nai_t5_core.backends.cuda.products import HOPPER, Configuration, TritonProducts
    from nai_t5_core.backends.cuda.tiles import Tile, TiledProducts
    from nai_t5_core.backends.cuda.torch_products import TorchProducts

    written(RTX)
    products: Any = plain_products_of(choice_for(RTX))
    assert isinstance(products, TiledProducts)
    assert products.tiles == {("gated", 512): Tile(128, 64, 64, 1, 4, 4)}
    assert products.configurations["gated", 64][0] == Configuration(64, 64)
    assert not any(found for key, found in products.configurations.items() if key != ("gated", 64))
    table: Any = plain_products_of(choice_for(H200))
    assert type(table) is TritonProducts and table.configurations is HOPPER
    assert type(plain_products_of(choice_for(Card("another", "sm_89")))) is TorchProducts
    whole: Any = products_of(choice_for(RTX))
    assert isinstance(whole.others, TiledProducts) and whole.converts_float8
    assert not products_of(choice_for(Card("an older one", "sm_86"))).converts_float8  # type: ignore[attr-defined]


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_launches_overlap_as_a_file_or_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.language.extra import cuda

    from nai_t5_core.backends.cuda.encoder import products_for

    monkeypatch.setattr(cuda, "gdc_wait", lambda _semantic=None: None)

    def overlaps(choice: Any, card: Card, in_bytes: bool = False) -> list[int]:
        return [rows for rows in (16, 32, 64, 128, 512) if products_for(choice, card).overlaps(rows, in_bytes)]

    assert overlaps("auto", H200) == [16, 32, 64] and overlaps("triton-overlapping", H200) == [16, 32, 64, 128]
    assert overlaps("auto", H200, in_bytes=True) == []
    assert not products_for("auto", H200, may_overlap=False).overlaps(16, False)
    assert overlaps("triton-overlapping", H200, in_bytes=True) == [16, 32, 64, 128]
    assert overlaps("torch", H200) == overlaps("triton", H200) == overlaps("auto", RTX) == []
    written(H200, overlapping_rows=32)
    choice_for.cache_clear()
    assert overlaps("auto", H200) == [16, 32]
    written(RTX, overlapping_rows=32)
    choice_for.cache_clear()
    assert overlaps("auto", RTX) == [], "the card cannot"
    monkeypatch.setattr(cuda, "gdc_wait", lambda _builder=None: None)  # as in Triton 3.4
    assert overlaps("auto", H200) == []


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_inputs_in_8_bits_of_a_file() -> None:
    from nai_t5_core.backends.cuda.byte_products import ByteProducts
    from nai_t5_core.backends.cuda.eight_bit_products import AskedEightBitProducts
    from nai_t5_core.backends.cuda.encoder import products_for
    from nai_t5_core.backends.cuda.int8_products import ESTIMATED_FOR_INT8

    written(RTX, int8={"inputs_from": 512})
    found: Any = products_for("auto", RTX)
    assert type(found) is AskedEightBitProducts and found.least_rows == 512 and found.converts_float8
    assert found.int8_configurations == ESTIMATED_FOR_INT8, "what was not measured"
    table: Any = products_for("auto", H200)
    assert type(table) is AskedEightBitProducts and table.least_rows == 256, "measured on another card of its kind"
    written(H200)
    choice_for.cache_clear()
    assert choice_for(H200).measured is not None
    assert choice_for(H200).int8_inputs_from == 256, "what the file does not tell is the table's"
    written(H200, int8={"inputs_from": NEVER})
    choice_for.cache_clear()
    assert choice_for(H200).int8_inputs_from is None and type(products_for("auto", H200)) is ByteProducts
    assert type(products_for("auto", Card("another", "sm_89"))) is ByteProducts, "not measured"
    assert type(products_for("triton", RTX)) is type(products_for("triton", H200)) is ByteProducts, "named"


@pytest.mark.skipif(missing_triton() is not None, reason=str(missing_triton()))
def test_few_rows_of_int8_are_multiplied_as_a_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.language.extra import cuda

    from nai_t5_core.backends.cuda.encoder import products_for
    from nai_t5_core.backends.cuda.int8_products import ESTIMATED_FOR_INT8
    from nai_t5_core.backends.cuda.products import Configuration

    monkeypatch.setattr(cuda, "gdc_wait", lambda _semantic=None: None)
    how = {"block_columns": 128, "block_depth": 256, "parts": 1, "stages": 3, "warps": 8}
    times = {"microseconds": 1.0, "by_torch": 2.0}
    product = {"kind": "plain", "rows": 64, "way": "few rows", "configuration": how, **times}
    for card, overlapping in ((H200, [1, 16]), (RTX, [])):
        written(card, products=[], int8={"products": [product], "inputs_from": 16, "overlapping_rows": 16})
        found: Any = products_for("auto", card)
        assert found.least_rows == 16
        assert found.int8_configurations["plain", 64] == (Configuration(**how), *ESTIMATED_FOR_INT8["plain", 64])
        assert [rows for rows in (1, 16, 17, 64) if found.overlaps(rows, True, True)] == overlapping
        assert not any(found.overlaps(rows, True, False) for rows in (1, 64)), "of weights alone nothing was measured"
        resting: Any = products_for("auto", card, may_overlap=False)
        assert not resting.overlaps(1, True, True) and resting.least_rows == 16
    assert choice_for(RTX).rounding == "measured: torch", "products in 16 bits are those of torch"


def test_inputs_in_8_bits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = on_a_card(monkeypatch)
    pretend(monkeypatch, RTX.name, (8, 9))
    written(RTX, int8={"inputs_from": 512})
    encode_on_cuda(stack)
    assert "8 bits" not in stack.describe_attention(), "its weights are in 16 bits"
    monkeypatch.setattr("nai_t5_core.backends.cuda.runner.is_in_8_bits", lambda _: True)
    told = "auto: kernels for CUDA, inputs in 8 bits from 512 tokens on, as measured on this card"
    assert stack.describe_attention() == told
    words = forecast(stack.config, CUDA, torch.float16)
    in_8_bits = forecast(stack.config, CUDA, torch.float16, quantize="int8")
    assert "inputs" not in words and ", inputs in 8 bits from 512 tokens" in in_8_bits


BROKEN: dict[str, Any] = {
    "no JSON": "{",
    "no object": "[]",
    "nothing": "",
    "an unknown format": {"format": 1},
    "an unknown field": {"colour": "green"},
    "a number that is none": {"flex_from_lengths": "many"},
    "a product without its blocks": {"products": [{**PRODUCTS[0], "configuration": {}}]},
    "a block that no card has": {"products": [{**PRODUCTS[0], "configuration": {**FEW, "warps": 4096}}]},
    "a product in uneven blocks": {"products": [{**PRODUCTS[0], "configuration": {**FEW, "block_columns": 48}}]},
    "blocks that no product has": {"products": [{**PRODUCTS[0], "configuration": {**FEW, "block_columns": 8}}]},
    "parts that nothing adds up": {"products": [{**PRODUCTS[0], "configuration": {**FEW, "parts": 2}}]},
    "attention in uneven blocks": {"attention": [{**ATTENTION[0], "queries": 48}]},
    "no rows": {"int8": {"inputs_from": 0}},
    "another card": {"card": "NVIDIA H100"},
    "another torch": {"torch": "1.0"},
    "another Triton": {"triton": "1.0"},
    "other kernels": {"kernels": "0"},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_is_broken_foreign_or_outdated_is_passed_over_with_one_sentence(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    what = BROKEN[fault]
    path = written(RTX, **(what if isinstance(what, dict) else {}))
    if isinstance(what, str):
        path.write_text(what)
    with caplog.at_level(logging.WARNING):
        assert read_measured(RTX) is None and read_measured(RTX) is None
    assert choice_for(RTX).measured is None
    assert len(caplog.records) == 1
    told = caplog.records[0].getMessage()
    assert str(path) in told and "nai-t5 doctor measures anew" in told and "\n" not in told


def test_a_file_that_cannot_be_read_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    measured_file(RTX).mkdir(parents=True)
    assert read_measured(RTX) is None and "cannot be read" in caplog.text


def test_files_of_two_cards_are_two() -> None:
    names = {measured_file(card).name for card in (H200, RTX, MI300, Card("NVIDIA H200", "sm_91"))}
    assert len(names) == 4 and all(
        name.replace("-", "").replace(".json", "").replace("_", "").isalnum() for name in names
    )


# ---------------------------------------------------------------------------------------------------------------------
# The key of kept embeddings
# ---------------------------------------------------------------------------------------------------------------------


def test_what_rounds_otherwise_is_in_the_words_and_what_does_not_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TOY_CONFIGS["v1.1"].encoder_only()

    def words(capability: tuple[int, int], name: str = "a card") -> str:
        choice_for.cache_clear()
        pretend(monkeypatch, name, capability)
        return forecast(config, CUDA, torch.float16)

    assert words((8, 0)) == words((8, 9), RTX.name)
    assert words((9, 0)) != words((8, 9), RTX.name)
    table = words((8, 9), RTX.name)
    written(RTX)
    measured = words((8, 9), RTX.name)
    assert measured != table
    # The same ways in other blocks sum in another order, in float32, as cuBLAS does from version to version.
    written(RTX, products=[{**PRODUCTS[0], "configuration": {**FEW, "stages": 3}}, *PRODUCTS[1:]])
    assert words((8, 9), RTX.name) == measured
    written(RTX, products=PRODUCTS[1:])
    assert words((8, 9), RTX.name) not in (measured, table)
    written(RTX, flex_from_lengths=8)
    assert words((8, 9), RTX.name) not in (measured, table)
    written(RTX, flex_from_lengths=None)
    assert words((8, 9), RTX.name) not in (measured, table)


def test_a_process_keeps_its_choice() -> None:
    before = choice_for(RTX)
    written(RTX)
    assert choice_for(RTX) is before and before.flex_from_lengths == FLEX_FROM_LENGTHS


def test_a_measurement_is_read_as_it_was_written() -> None:
    measured = MeasuredCard.model_validate(found_for(RTX))
    path = measured_file(RTX)
    path.parent.mkdir(parents=True)
    path.write_text(measured.model_dump_json(indent=1))
    assert read_measured(RTX) == measured
    assert Choice(RTX, TABLE["sm_89"], measured).rounding == "measured: gated 64 few rows, gated 512 tiles"
