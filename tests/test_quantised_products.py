"""A projection by itself whose weights the kernels read as they lie: values, shapes, and when torch has to compute."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIGS, every_set, needs_kernels, random_state
from test_quantised_files import CONFIG, IDS, MASK, file_of
from test_quantised_kernels import DEPTH, FACTORS, WEIGHTS, assert_same_bits, every_dtype, forms, made, unread
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_loras import toy_lora

from nai_t5_core import load_encoder
from nai_t5_core.backends.choose import run_quantised
from nai_t5_core.backends.kernels.build import best_set
from nai_t5_core.backends.kernels.calls import counted, product
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.kinds import WEIGHT, Plain, QuantisedWeight
from nai_t5_core.backends.quantised.packing import pack
from nai_t5_core.backends.quantised.projections import QuantisedLinear
from nai_t5_core.backends.quantised.runner import QuantisedBackend
from nai_t5_core.backends.quantised.scaled import SCALE
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.prompts.cache.settings import settings_of

# Of a sum in float32 that is rounded once, relative to the largest.
ONE_ROUNDING = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4.5e-3}


def draw(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def linear_of(
    *parts: QuantisedForm, instructions: InstructionSet | None = None, dtype: torch.dtype = torch.float32
) -> QuantisedLinear:
    found = QuantisedLinear(parts, dtype)
    found.product.use(instructions)
    return found


def plain(parts: tuple[QuantisedForm, ...], dtype: torch.dtype) -> Tensor:
    return torch.cat([form.plain(dtype) for form in parts])


def q8_0(**changes: Any) -> QuantisedForm:
    return QuantisedForm(WEIGHTS["Q8_0"], **changes)


@contextmanager
def by(kernels: bool) -> Iterator[None]:
    """Checks that the kernels compute here, or that they do not."""
    with counted() as ours:
        yield
    assert (ours.flops > 0) == kernels


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@every_set
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 2, 1), (7, 66, 37), (130, 300, 64), (13, 1024, 100)])
def test_a_product_of_plain_weights(rows: int, depth: int, columns: int, instructions: InstructionSet) -> None:
    for dtype in dict.fromkeys(instructions.stored.values()):
        weight, x = draw(columns, depth).to(dtype), draw(rows, depth, seed=1).to(dtype)
        ours = KernelWeight.plain(weight, dtype, instructions=instructions)
        exact = x.double() @ weight.double().T
        for each in (ours, ours.in_panels()):
            found = product(x, each)
            assert found.dtype == dtype and error(found, exact) < ONE_ROUNDING[dtype]
        assert product(x[:0], ours).shape == (0, columns)
    gated = KernelWeight.plain(draw(4, 8), torch.float32, True, instructions=instructions)
    with pytest.raises(ValueError, match="this one is gated"):
        product(draw(2, 8), gated)
    with pytest.raises(ValueError, match=r"torch.float32 tensor \[2, 8\] on the CPU; got torch.float64"):
        product(draw(2, 8).double(), KernelWeight.plain(draw(4, 8), torch.float32, instructions=instructions))


@every_dtype
@pytest.mark.parametrize("factors", FACTORS)
def test_a_projection_is_that_of_the_unpacked_weight(
    factors: str, instructions: InstructionSet, dtype: torch.dtype
) -> None:
    """Of every kind by itself, and of all joined; rows are the same to the bit whatever stands beside them."""
    found = forms(factors)
    # Some numbers of float8 exceed float16.
    some = {name: form for name, form in found.items() if bool(form.plain(dtype).isfinite().all())}
    assert len(some) > len(found) - 4
    x = (draw(101, DEPTH) * 0.01).to(dtype)
    for parts in [*((form,) for form in some.values()), tuple(some.values())]:
        linear = linear_of(*parts, instructions=instructions, dtype=dtype)
        with by(kernels=True), torch.no_grad():
            out = linear(x)
        assert out.dtype == dtype
        assert error(out, x.double() @ plain(parts, dtype).double().T) < ONE_ROUNDING[dtype]
        for rows in (slice(0, 1), slice(40, 53), slice(100, 101)):
            assert_same_bits(linear(x[rows]), out[rows])


@every_dtype
def test_inputs_of_every_shape(instructions: InstructionSet, dtype: torch.dtype) -> None:
    linear = linear_of(q8_0(), q8_0(scale=0.5), instructions=instructions, dtype=dtype)
    rows = draw(24, DEPTH).to(dtype)
    out = linear(rows)
    wide = torch.cat((rows, rows), dim=1)
    given: dict[str, tuple[Tensor, Tensor]] = {
        "one row": (rows[5], out[5]),
        "a batch": (rows.view(2, 3, 4, DEPTH), out.view(2, 3, 4, -1)),
        "columns of a wider tensor": (wide[:, DEPTH:], out),
        "every other row": (rows[::2], out[::2]),
        "turned": (rows.T.contiguous().T, out),
        "one row, many times": (rows[:1].expand(7, -1), out[:1].expand(7, -1)),
        "no rows": (rows[:0], out[:0]),
        "no rows of a batch": (rows[:0].view(4, 0, DEPTH), out[:0].view(4, 0, linear.out_features)),
        "a parameter": (nn.Parameter(rows, requires_grad=False), out),
    }
    for name, (x, expected) in given.items():
        found = linear(x)
        assert found.shape == expected.shape, name
        assert_same_bits(found, expected.contiguous())
    for wrong in (rows[:, :-2], rows.reshape(48, -1), rows[0, 0]):
        with pytest.raises((RuntimeError, IndexError)):
            linear(wrong)


@every_dtype
def test_what_float16_cannot_hold_is_infinite(instructions: InstructionSet, dtype: torch.dtype) -> None:
    """As by torch, so that the guard finds it."""
    linear = linear_of(q8_0(), instructions=instructions, dtype=dtype)
    x = (draw(3, DEPTH) * 400).to(dtype)
    exact = x.double() @ plain(linear.forms, dtype).double().T
    assert float(exact.abs().max()) > 1e5
    near_the_edge = (exact.abs() - 65520).abs() < 1
    assert torch.equal(linear(x).isinf() | near_the_edge, exact.to(dtype).isinf() | near_the_edge)
    x[1] = torch.nan
    assert linear(x)[1].isnan().all() and not linear(x)[::2].isnan().any()


@needs_kernels
def test_defaults_of_torch_change_nothing() -> None:
    """Neither the device of new tensors nor their dtype, whose numbers C++ would misread."""
    x, expected = draw(3, DEPTH), linear_of(q8_0(scale=0.5))(draw(3, DEPTH))
    with torch.device("meta"):
        assert_same_bits(linear_of(q8_0(scale=0.5))(x), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_bits(linear_of(q8_0(scale=0.5))(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
def test_threads_share_a_projection() -> None:
    linear, x = linear_of(q8_0()), draw(64, DEPTH)
    expected = linear(x)
    linear.product.forget()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rows: linear(x[:rows]), list(range(1, 65))))
    for rows, out in enumerate(found, 1):
        assert_same_bits(out, expected[:rows].contiguous())


# ---------------------------------------------------------------------------------------------------------------------
# When torch computes
# ---------------------------------------------------------------------------------------------------------------------


@needs_kernels
def test_what_the_kernels_do_not_know_is_torchs() -> None:
    x, other = draw(5, DEPTH), QuantisedForm(unread(WEIGHTS["Q8_0"]))
    narrow = QuantisedWeight(Plain(torch.float32), (4, 7), {WEIGHT: draw(4, 7)})
    best = best_set()
    assert best is not None
    cases: list[tuple[QuantisedLinear, Tensor]] = [
        (linear_of(other), x),
        (linear_of(q8_0(), other), x),
        (linear_of(QuantisedForm(narrow)), draw(5, 7)),
        (linear_of(q8_0()), x.double()),
        *([] if torch.float16 in best.stored else [(linear_of(q8_0()), x.half())]),
    ]
    for linear, given in cases:
        with by(kernels=False):
            found = linear(given)
        assert error(found, given.double() @ plain(linear.forms, given.dtype).double().T) < 2e-3


@needs_kernels
def test_what_is_multiplied_into_a_weight_may_change() -> None:
    columns, x = torch.ones(DEPTH), draw(5, DEPTH)
    linear = linear_of(q8_0(columns=columns))
    before = linear(x)
    columns.mul_(2)
    with by(kernels=True):
        assert torch.equal(linear(x), before * 2)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.linear.default)
        return function(*args, **kwargs or {})


def counting(linear: nn.Module, x: Tensor) -> Tensor:
    with Counting() as mode:
        out: Tensor = linear(x)
    assert mode.products
    return out


def traced(linear: Any, x: Tensor) -> Tensor:
    """Called with another input than it was traced with. Of bytes, torch cannot trace how numbers are made."""
    numbers = plain(linear.forms, torch.float32)
    linear = linear_of(QuantisedForm(QuantisedWeight(Plain(torch.float32), tuple(numbers.shape), {WEIGHT: numbers})))
    out: Tensor = torch.jit.trace(linear, x.flip(0), check_trace=False)(x)
    return out


def recorded(linear: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = linear(x.clone().requires_grad_())
    out.sum().backward()
    return out.detach()


WATCHED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a dispatch mode": counting,
    "compiled": lambda linear, x: torch.compile(linear, backend="eager", fullgraph=True)(x),
    "exported": lambda linear, x: torch.export.export(linear, (x.flip(0),)).module()(x),
    "traced": traced,
    "gradients": recorded,
    "vmap": lambda linear, x: torch.vmap(linear)(x),
    "jvp": lambda linear, x: torch.func.jvp(linear, (x,), (torch.ones_like(x),))[0],
}


@needs_kernels
@pytest.mark.parametrize("how", WATCHED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torch_computes_what_it_has_to_see(how: str) -> None:
    linear, x = linear_of(q8_0()), draw(6, DEPTH)
    exact = F.linear(x, plain(linear.forms, torch.float32))
    with by(kernels=True):
        linear(x)
    with by(kernels=False):
        found = WATCHED[how](linear, x)
    assert error(found, exact) < 1e-5
    with by(kernels=True):
        linear(x)


@needs_kernels
def test_gradients_are_those_of_the_weight() -> None:
    linear, x = linear_of(q8_0()), draw(6, DEPTH).requires_grad_()
    factors = draw(6, linear.out_features, seed=2)
    (linear(x) * factors).sum().backward()
    assert x.grad is not None
    assert error(x.grad, factors @ plain(linear.forms, torch.float32)) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# What was told of a weight
# ---------------------------------------------------------------------------------------------------------------------


@needs_kernels
def test_what_changes_is_told_anew() -> None:
    scale = torch.rand(37, 1) + 0.1
    weight = replace(WEIGHTS["torch.int8, by rows"], parts={**WEIGHTS["torch.int8, by rows"].parts, SCALE: scale})
    linear, x = linear_of(QuantisedForm(weight)), draw(3, DEPTH)
    before = linear(x)
    told = linear.product._told
    linear(x)
    assert linear.product._told is told, "once for as long as nothing changes"
    assert told is not None and told.weight is not None
    assert told.weight.pieces[0].values.data_ptr() == weight.parts[WEIGHT].data_ptr(), "the bytes as they lie"
    assert not told.weight.is_in_panels
    scale *= 2
    torch.testing.assert_close(linear(x), before * 2)
    linear.multiply_rows(0.5, 0)
    torch.testing.assert_close(linear(x), before)
    linear.forms = (q8_0(),)
    torch.testing.assert_close(linear(x), F.linear(x, q8_0().plain(torch.float32)), rtol=1e-4, atol=1e-4)
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    linear.product.forget()
    assert linear.product._told is None
    linear(x)
    linear.to("meta")
    assert linear.product._told is None, "bytes that were moved are let go"


@needs_kernels
def test_copies_have_their_own() -> None:
    linear, x = linear_of(q8_0()), draw(3, DEPTH)
    expected = linear(x)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    copies = [copy.deepcopy(linear), torch.load(file, weights_only=False)]
    del linear
    for each in copies:
        with by(kernels=True):
            assert torch.equal(each(x), expected)
        told = each.product._told
        assert told.weight.pieces[0].values.data_ptr() == each.forms[0].weight.parts[WEIGHT].data_ptr()


# ---------------------------------------------------------------------------------------------------------------------
# In models
# ---------------------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("layout", ["fused", "separate"])
@pytest.mark.parametrize("kind", ["Q8_0", "int8, rotated"])
def test_beside_a_live_lora(
    kind: str, layout: Any, instructions: InstructionSet, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The kernels that were named compute the products beside it, and the values are those of unpacked weights."""
    file, lora, products = file_of(kind, tmp_path), toy_lora(CONFIG), instructions.name
    stack = run_quantised(load_encoder(file, dtype, "cpu", layout), products)  # type: ignore[arg-type]
    meant = load_encoder(file, "float64", "cpu", layout, unpack=True)
    with torch.no_grad():
        without = stack(IDS, MASK)
        live, exact = LiveLoras(stack), LiveLoras(meant)
        live.add(lora, 0.7)
        exact.add(lora, 0.7)
        with by(kernels=True):
            found = stack(IDS, MASK)
        told = [part.product._told for part in stack.modules() if isinstance(part, QuantisedLinear)]
        assert all(each.weight.instructions is instructions for each in told if each is not None) and any(told)
        rows, expected = MASK.bool(), meant(IDS, MASK)
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
        assert error(found[rows], expected[rows]) < tolerance < error(without[rows], expected[rows])
        live.clear()
        assert torch.equal(stack(IDS, MASK), without)


@needs_kernels
def test_a_decoder() -> None:
    """Its products are by the kernels, too."""
    config = TOY_CONFIGS["v1.1"].model_copy(update={"num_layers": 1, "num_decoder_layers": 2})
    models = {name: own_t5(config, random_state(config), torch.float32, "fused") for name in ("ours", "torch")}
    texts = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(2))
    for name, model in models.items():
        for block in model.decoder.block:
            QuantisedBackend(lambda weight: pack(weight, "int8")).bind(block, torch.float32)
        if name == "torch":
            for part in model.modules():
                if isinstance(part, QuantisedLinear):
                    part.product = lambda *_: None  # type: ignore[assignment]
    logits = {}
    for name, model in models.items():
        with torch.no_grad():
            read = model.read(IDS, MASK)
            with by(kernels=name == "ours"):
                logits[name] = model.logits(model.decode(texts, read[:2] if isinstance(read, Tensor) else read))
    assert error(logits["ours"], logits["torch"]) < 1e-5


@needs_kernels
def test_they_are_in_the_key(tmp_path: Path) -> None:
    """Of kinds that they read, also where whole blocks are torch's."""
    best = best_set()
    assert best is not None
    words = f"{best.title} kernels for all that they read"
    assert settings_of(file_of("Q8_0", made(tmp_path / "q8")), "float32", "cpu").backend.endswith(words)
    others = settings_of(file_of("float8 fnuz, by rows", made(tmp_path / "fnuz")), "float32", "cpu").backend
    assert "kernels" not in others.partition("beside")[0]
