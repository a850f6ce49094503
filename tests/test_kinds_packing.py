"""Weights that are packed for the table of kinds: near the numbers that they are packed of."""

from __future__ import annotations

import sys

import pytest
import torch

from nai_t5_core.backends.quantised.four_bits import FourBits
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.bench import kinds as bench_kinds
from nai_t5_core.bench import kinds_packing
from nai_t5_core.bench.kinds import measure_kinds
from nai_t5_core.bench.kinds_packing import BY_LLAMA_CPP, PACKINGS, possible_kinds
from nai_t5_core.facts.config import named_config

pytest.importorskip("gguf", reason="packs some of the kinds")

# Half a step of each, as a share of the root mean square, for numbers of a normal distribution.
ERRORS = {
    **dict.fromkeys(("int8", "int8-rotated", "Q8_0"), 0.01),
    **dict.fromkeys(("Q6_K", "MXFP8", "float8_e4m3fn", "float8-blocks"), 0.035),
    **dict.fromkeys(("Q5_K", "Q5_1", "Q5_0", "float8_e5m2"), 0.06),
    **dict.fromkeys(("Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "NF4", "NF4-nested", "NVFP4"), 0.1),
    "FP4": 0.15,
    "Q3_K": 0.18,
    "Q2_K": 0.32,
}


@pytest.mark.parametrize("kind", PACKINGS)
def test_numbers_come_back(kind: str) -> None:
    if kind in BY_LLAMA_CPP:
        pytest.importorskip("llama_cpp", reason="packs this kind")
    weight = torch.randn(200, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    packed = PACKINGS[kind](weight)
    layout = {name: (tuple(part.shape), part.dtype) for name, part in packed.parts.items()}
    is_as_in_a_file = not isinstance(packed.kind, FourBits)  # whose numbers are in one column there
    assert not is_as_in_a_file or packed.kind.fault(layout, (200, 512)) is None
    assert packed.fault() is None
    error = float((packed.plain() - weight).square().mean().sqrt() / weight.square().mean().sqrt())
    assert 0.4 * ERRORS[kind] < error < ERRORS[kind]


@pytest.mark.parametrize(("absent", "kind"), [("gguf", "Q5_0"), ("gguf", "Q2_K"), ("llama_cpp", "Q2_K")])
def test_a_kind_that_cannot_be_packed_is_refused_first(absent: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setattr(kinds_packing, "find_spec", lambda name: None if name == absent else name)
    monkeypatch.setattr(bench_kinds, "random_state", lambda *_, **__: pytest.fail("work began"))
    if absent == "gguf":
        monkeypatch.setitem(sys.modules, "llama_cpp", sys)
    assert kind not in possible_kinds() and {"int8", "Q8_0", "Q4_K", "NF4"} < set(possible_kinds())
    with pytest.raises(ValueError, match=absent.replace("_", "-") + " cannot be imported"):
        measure_kinds(named_config("t5-v1_1-small"), torch.float32, kinds=["Q8_0", kind])


def test_all_of_gguf_are_packed() -> None:
    assert set(GGML_KINDS) < set(PACKINGS)
    assert set(possible_kinds()) | set(BY_LLAMA_CPP) == set(PACKINGS)
