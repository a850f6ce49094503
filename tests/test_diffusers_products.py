"""What computes an encoder of diffusers is named, as for TextEncoder: by every way to it, and refused as early."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from backend_cases import runner_names
from test_quantised_files import IDS as IDS_OF_FILE
from test_quantised_files import file_of
from toy_offloading import CPU, OFFLOADS, cpu_has_one_name, hooks_of
from toy_pipelines import Toy, make, text_encoder

from nai_t5_core.backends.choices import PRODUCTS_CHOICES, backend_of
from nai_t5_core.backends.choose import run_quantised
from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.build import prepare_kernels
from nai_t5_core.backends.kernels.calls import counted
from nai_t5_core.backends.kernels.compilers import NO_COMPILER
from nai_t5_core.backends.kernels.sets import AVX2, SETS, named
from nai_t5_core.diffusers.adapter import replace_text_encoder, restore_text_encoder
from nai_t5_core.diffusers.cached_drop_in import lazy_text_encoder
from nai_t5_core.diffusers.drop_in import NAIT5EncoderModel
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.weights.load import load_encoder

pytestmark = pytest.mark.filterwarnings("ignore")
__all__ = ["cpu_has_one_name"]  # a fixture for every test here

IDS = torch.randint(3, 4096, (3, 20), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([20, 11, 2])[:, None] > torch.arange(20)
NAMED: Any = [products for products in PRODUCTS_CHOICES if products != "auto"]
every_choice = pytest.mark.parametrize("products", NAMED)
# Of hidden states against transformers' in float32, relative to the largest.
NEAR: dict[Any, float] = {None: 1e-5, "int8": 0.03}


def skip_without(products: Any, quantize: Any = None) -> None:
    backend: Any = backend_of(products, quantize)
    missing = backend.missing(CPU, torch.float32)
    if missing is None and products != "onednn":
        missing = prepare_kernels(backend.instructions)
    if missing:
        pytest.skip(missing)


@pytest.fixture(autouse=True)
def meta_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none; diffusers asks for torch's module of it."""
    monkeypatch.setattr(torch, "meta", torch.cpu, raising=False)


def hidden(encoder: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    """Of the last of some calls, when everything is in the order that a later one puts it in; zeros at pads."""
    with torch.no_grad():
        states: Tensor = [encoder(ids, mask)[0] for _ in range(3)][-1]
    return states * mask[..., None]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max())


def _replaced(_: Path, **told: Any) -> Any:
    toy = make("pixart-sigma")
    toy.pipe.text_encoder.load_state_dict(text_encoder().state_dict())
    return replace_text_encoder(toy.pipe, padding="exact", **told).text_encoder


WAYS: dict[str, Callable[..., Any]] = {
    "replace": _replaced,
    "replace with a cache": lambda folder, **told: _replaced(folder, cache=Store(None), **told),
    "from_hf": lambda _, **told: NAIT5EncoderModel.from_hf(text_encoder(), **told),
    "from_pretrained": lambda folder, **told: NAIT5EncoderModel.from_pretrained(folder, **told),
    "lazy": lambda folder, **told: lazy_text_encoder(folder, cache=Store(None), **told),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is named computes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "int8"])
@every_choice
def test_what_is_named_computes_by_every_way(products: Any, quantize: Any, tmp_path: Path) -> None:
    skip_without(products, quantize)
    theirs = text_encoder()
    exact = hidden(theirs)
    theirs.save_pretrained(tmp_path)
    found = []
    for make_ours in WAYS.values():
        ours = make_ours(tmp_path, products=products, quantize=quantize)
        with counted() as by_kernels:
            found.append(hidden(ours))
        assert runner_names(ours.stack) == {backend_of(products, quantize).name}
        assert (by_kernels.flops > 0) == (products != "onednn")
        assert ours.products == products and backend_of(products, quantize).name in repr(ours)
    assert distance(found[0], exact) < NEAR[quantize]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("products", ["kernels", *(each.name for each in SETS)])
def test_a_quantised_file(products: Any, tmp_path: Path) -> None:
    """From the same bytes as TextEncoder."""
    skip_without(products)
    file, mask = file_of("Q8_0", tmp_path), torch.ones_like(IDS_OF_FILE)
    expected = run_quantised(load_encoder(file, torch.float32, "cpu"), products)
    lazy = lazy_text_encoder(file, cache=Store(None), dtype=torch.float32, products=products)
    loaded = NAIT5EncoderModel.from_pretrained(file, dtype=torch.float32, products=products)
    for ours in (loaded, lazy):
        with torch.no_grad():
            assert torch.equal(hidden(ours, IDS_OF_FILE, mask), expected(IDS_OF_FILE, mask))
        assert runner_names(ours.stack) == {f"{backend_of(products).name}, quantised weights"}


def test_a_quantised_file_has_onednn_when_it_is_unpacked(tmp_path: Path) -> None:
    skip_without("onednn")
    file = file_of("Q8_0", tmp_path)
    for make_ours in (NAIT5EncoderModel.from_pretrained, lambda *_, **told: lazy_text_encoder(file, **told).stack):
        with pytest.raises(ValueError, match="products='onednn' is not possible: the weights stay as they lie"):
            make_ours(file, dtype=torch.float32, products="onednn")
    ours = NAIT5EncoderModel.from_pretrained(file, dtype=torch.float32, products="onednn", unpack=True)
    assert runner_names(ours.stack) == {"oneDNN"}


@pytest.mark.parametrize("layout", ["fused", "separate"])
@every_choice
def test_a_pipeline_there_and_back(products: Any, layout: Any) -> None:
    skip_without(products)
    toy = make("pixart-sigma")
    old, image = toy.encoder, toy.run()
    if layout == "separate" and products != "onednn":
        with pytest.raises(ValueError, match=r"which layout='separate' keeps apart; use products='auto' or 'onednn'"):
            replace_text_encoder(toy.pipe, layout=layout, products=products)
        assert toy.encoder is old and torch.equal(toy.run(), image)
        return
    replace_text_encoder(toy.pipe, layout=layout, products=products)
    assert (toy.run() - image).abs().max() < 1e-4 * image.abs().max()
    # Again with the same, or with none named, leaves it alone.
    ours = toy.encoder
    for again in (products, "auto"):
        assert replace_text_encoder(toy.pipe, products=again).text_encoder is ours
        assert runner_names(ours.stack) == {backend_of(products).name}
    restore_text_encoder(toy.pipe, release=True)
    assert toy.encoder is old and (toy.run() - image).abs().max() < 1e-4 * image.abs().max()


def test_kernels_in_place_leave_a_model_what_it_was() -> None:
    """It may be cast, and computes by what was named in that dtype, too; a copy as well."""
    skip_without("avx2")
    ours = NAIT5EncoderModel.from_hf(text_encoder(), products="avx2")
    exact = hidden(ours)
    cast = copy.deepcopy(ours).to(torch.bfloat16)
    assert distance(hidden(cast), exact) < 0.03 and runner_names(cast.stack) == {"AVX2 kernels"}
    assert cast.products == "avx2" and torch.equal(hidden(ours), exact)


def test_onednn_has_weights_that_stay() -> None:
    skip_without("onednn")
    ours = NAIT5EncoderModel.from_hf(text_encoder(), products="onednn")
    with pytest.raises(ValueError, match="is prepacked or quantised for the CPU, and cannot be moved or cast"):
        ours.to(torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


def test_embeddings_are_kept_under_what_computes(tmp_path: Path) -> None:
    text_encoder().save_pretrained(tmp_path)
    store, kept = Store(None), dict[str, Tensor]()
    possible = [each.name for each in SETS if not backend_of(each.name).missing(CPU, torch.float32)]  # type: ignore[arg-type]
    for products in ("onednn", *possible):
        skip_without(products)
        for is_first in (True, False):
            lazy = lazy_text_encoder(tmp_path, cache=store, products=products)  # type: ignore[arg-type]
            with torch.no_grad():
                found = lazy(IDS, MASK)[0]
            assert lazy.is_loaded == is_first, "another set has other roundings"
            assert torch.equal(found, kept.setdefault(products, found))
    # The automatic choice rounds as the set that it is.
    by_choice = lazy_text_encoder(tmp_path, cache=store)
    automatic = runner_names(NAIT5EncoderModel.from_pretrained(tmp_path).stack) & {
        f"{named(name).title} kernels" for name in possible
    }
    with torch.no_grad():
        by_choice(IDS, MASK)
    assert by_choice.is_loaded != bool(automatic)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def _lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: AVX2.needs)


def _has_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_all(monkeypatch)
    monkeypatch.setattr(build, "_missing_compiler", lambda _: NO_COMPILER)


def _cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    _has_all(monkeypatch)
    monkeypatch.setattr(build, "_missing_compiler", lambda _: None)
    monkeypatch.setattr("nai_t5_core.diffusers.drop_in_products.prepare_kernels", lambda _: "no such instruction")


def _has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: frozenset().union(*(each.needs for each in SETS)))


# What the machine has, what is told, and what is said.
REFUSED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], str]] = {
    "unknown": (
        _has_all,
        {"products": "sse"},
        "unknown products 'sse'; allowed: auto, kernels, amx, avx512, avx2-vnni",
    ),
    "lacking": (
        _lacks,
        {"products": "avx512"},
        "products='avx512' is not possible: this processor has no AVX512.*; use products='auto' or 'onednn'$",
    ),
    "AMX": (_lacks, {"products": "amx"}, "products='amx' is not possible: this processor has no AMX .* 'onednn'$"),
    "compiler": (
        _has_no_compiler,
        {"products": "avx2"},
        "products='avx2' is not possible: .*compiler.*; use products=",
    ),
    "offload": (
        _has_all,
        {"products": "avx2", "offload": True},
        "products='avx2' and offload=True exclude each other: leave products at 'auto', or offload out",
    ),
    "dtype": (
        _has_all,
        {"products": "avx2", "dtype": torch.float64},
        r"products='avx2' is not possible: the kernels for AVX2 are for models in .*float64 on cpu; use products=",
    ),
}
# What is only found out where it is loaded.
REFUSED_LATER = {
    "build": (_cannot_build, {"products": "avx512"}, "'avx512' is not possible: no such instruction; use products='au"),
    "layout": (
        _has_all,
        {"products": "kernels", "layout": "separate"},
        "which layout='separate' keeps apart; use prod",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED, *REFUSED_LATER])
def test_a_pipeline_is_left_as_it_is(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, told, message = {**REFUSED, **REFUSED_LATER}[case]
    toy = make("pixart-sigma")
    image, encoder = toy.run(), toy.encoder
    before = {name: (tensor, tensor.clone()) for name, tensor in encoder.state_dict(keep_vars=True).items()}
    with monkeypatch.context() as changed:
        prepare(changed)
        with pytest.raises(ValueError, match=message) as raised:
            replace_text_encoder(toy.pipe, **told)
    assert "\n" not in str(raised.value)
    assert toy.encoder is encoder and torch.equal(toy.run(), image)
    for name, tensor in encoder.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


def _offloaded_elsewhere(toy: Toy) -> None:
    toy.pipe.enable_model_cpu_offload(device="meta")


def _grouped_elsewhere(toy: Toy) -> None:
    toy.pipe.enable_group_offload(torch.device("meta"), CPU, offload_type="leaf_level")


def _ours(toy: Toy) -> None:
    replace_text_encoder(toy.pipe)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            _offloaded_elsewhere,
            "products='avx2' is for what is computed on the CPU, and the pipeline's off.* on meta:0; enc",
        ),
        (
            _grouped_elsewhere,
            "products='avx2' is for what is computed on the CPU, and the pipeline's off.* on meta; enc",
        ),
        (_ours, r"products='avx2': text_encoder is ours already, and computed by others; call restore_text_encoder\("),
    ],
)
def test_what_a_pipeline_has_been_told_already(prepare: Any, message: str) -> None:
    skip_without("avx2")
    toy = make("pixart-sigma")
    prepare(toy)
    encoder, hooks = toy.encoder, hooks_of(toy.encoder)
    with pytest.raises(ValueError, match=message):
        replace_text_encoder(toy.pipe, products="avx2")
    assert toy.encoder is encoder and hooks_of(encoder) == hooks


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_on_the_cpu(offload: Any) -> None:
    skip_without("avx2")
    toy = make("pixart-sigma")
    image = toy.run()
    offload(toy.pipe)
    replace_text_encoder(toy.pipe, products="avx2")
    assert (toy.run() - image).abs().max() < 1e-4 * image.abs().max()


@pytest.mark.parametrize("load", [NAIT5EncoderModel.from_pretrained, lazy_text_encoder])
@pytest.mark.parametrize("case", REFUSED)
def test_loading_refuses_before_the_checkpoint_is_looked_for(
    case: str, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, told, message = REFUSED[case]
    prepare(monkeypatch)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "nothing", **told)


def test_a_gpu_is_no_place_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without("avx2")
    told = r"products='avx2' is for models that are .* on the CPU, .* is to be on (cuda|meta); leave products at 'auto'"
    with monkeypatch.context() as changed:
        changed.setattr("nai_t5_core.diffusers.drop_in.resolve_device", torch.device)
        with pytest.raises(ValueError, match=told):
            NAIT5EncoderModel.from_pretrained(tmp_path / "nothing", device_map="cuda", products="avx2")
    text_encoder().save_pretrained(tmp_path)
    lazy = lazy_text_encoder(tmp_path, cache=Store(None), products="avx2").to("meta")
    assert "not loaded, torch.float32, padding=exact, products=avx2" in repr(lazy)
    with pytest.raises(ValueError, match=told):
        assert lazy.stack
    assert not lazy.is_loaded
