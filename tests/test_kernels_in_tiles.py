"""AMX's kernels with emulated tiles, since few processors have them: what they compute, and nothing of their speed."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_kinds import turned

from nai_t5_core.backends.kernels import interface
from nai_t5_core.backends.kernels.build import missing_for
from nai_t5_core.backends.kernels.calls import add_product, encode_block, normed_product
from nai_t5_core.backends.kernels.compilers import AMX as REAL
from nai_t5_core.backends.kernels.compilers import AVX512 as VECTORS
from nai_t5_core.backends.kernels.compilers import FOLDER, GXX
from nai_t5_core.backends.kernels.pieces import TURNED
from nai_t5_core.backends.kernels.sets import AMX, AVX512, InstructionSet
from nai_t5_core.backends.kernels.weights import KernelWeight
from nai_t5_core.backends.quantised.forms import QuantisedForm
from nai_t5_core.backends.quantised.pieces import piece_of

HERE = Path(__file__).parent
EMULATED = replace(REAL, flags=(*VECTORS.flags, "-include", str(HERE / "emulated_tiles.h")))
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_for(AVX512)), reason=f"beside tiles there is AVX512: {missing_for(AVX512)}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiles")


@pytest.fixture(scope="module")
def emulated(folder: Path) -> Path:
    built = folder / "emulated.so"
    GXX.build(EMULATED, built)
    return built


@pytest.fixture
def by_tiles(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for AMX are those with emulated tiles."""
    real, tiles = interface.library, ctypes.CDLL(str(emulated))
    assert tiles.t5_is_permitted()
    interface._loaded.cache_clear()
    monkeypatch.setattr(interface, "library", lambda one: tiles if one is AMX else real(one))
    monkeypatch.setattr(interface, "_loaded", interface._loaded.__wrapped__)


def compiled(program: str, target: Path, *more: str) -> Path:
    sources = [str(HERE / program), *map(str, EMULATED.units)]
    flags = ("-O1", "-g", "-std=c++17", "-fopenmp", "-DWITH_BFLOAT16", *EMULATED.arguments)
    command = ["g++", *flags, *sources, *more, "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def test_beside_plain_loops(folder: Path) -> None:
    made = compiled("kernels_beside_reference.cpp", folder / "reference")
    done = subprocess.run([str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("all good\n"), done.stdout[-2000:]


def test_at_edges(folder: Path) -> None:
    made = compiled("kernels_at_edges.cpp", folder / "edges", *SANITIZERS)
    for memory in ("heap", "pages"):
        done = subprocess.run([str(made), "3", "100", memory, "both"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "100 calls\n"), done.stderr[:3000]


def weight(columns: int, depth: int, dtype: torch.dtype, instructions: InstructionSet, is_gated: bool) -> KernelWeight:
    numbers = torch.randn(columns, depth, generator=torch.Generator().manual_seed(columns + depth)) * 0.1
    if dtype == torch.int8:
        scales = numbers.abs().amax(1) / 127
        bytes_ = (numbers / scales[:, None]).round().to(torch.int8)
        return KernelWeight.plain(bytes_, torch.bfloat16, is_gated, scales, instructions).in_panels()
    return KernelWeight.plain(numbers.to(dtype), dtype, is_gated, instructions=instructions)


def block(dtype: torch.dtype, instructions: InstructionSet, rows: Tensor) -> Tensor:
    """The rows after a block, as one document."""
    heads, width, hidden = 4, rows.shape[1], 208
    shapes = [(3 * 64, width, False), (width, 64, False), (2 * hidden, width, True), (width, hidden, False)]
    weights = [weight(columns, depth, dtype, instructions, gated) for columns, depth, gated in shapes]
    documents, table = (
        torch.tensor([[0, len(rows), 0, len(rows)]]),
        torch.linspace(-1, 1, heads * 33).reshape(heads, 33),
    )
    out, norm = rows.clone(), torch.linspace(0.5, 1.5, width)
    encode_block(out, weights, (norm, norm), heads, 1e-6, "gelu_new", documents, table, 1.0)
    return out


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 100])
def test_a_block_is_that_of_vectors(tokens: int, dtype: torch.dtype) -> None:
    """Sums of bytes are exact, so that both are the same to the bit; those of bfloat16 differ by their order."""
    rows = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens))
    found, expected = (block(dtype, instructions, rows) for instructions in (AMX, AVX512))
    if dtype == torch.bfloat16:
        torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 2e-3)
    else:
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("depth", [4, 60, 64, 100, 520])
def test_rows_are_the_same_whatever_is_beside_them(depth: int, dtype: torch.dtype) -> None:
    """In tiles of one row and of thirty-two, and whether the weight is put in panels before or in the call."""
    rows = torch.randn(70, depth, generator=torch.Generator().manual_seed(depth))
    one = weight(80, depth, dtype, AMX, is_gated=True)
    other = weight(depth, 40, dtype, AMX, is_gated=False)

    def through(some: Tensor, *weights: KernelWeight) -> Tensor:
        out = some.clone()
        add_product(normed_product(out, None, 1e-6, weights[0], "gelu_new"), weights[1], out)
        return out

    together = through(rows, one, other)
    for first, last in ((0, 1), (3, 20), (7, 40), (69, 70)):
        assert torch.equal(through(rows[first:last], one, other), together[first:last])
    assert torch.equal(through(rows, one.in_panels(), other.in_panels()), together)


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("group", TURNED)
def test_a_rotation_is_undone(group: int) -> None:
    """In a register of its own, and in one that has columns of two pieces."""
    for rows in (64, 21):
        form = QuantisedForm(turned(group, rows, 768), torch.linspace(-2, 2, 768))
        found = KernelWeight.of_pieces([piece_of(form)] * 2, torch.bfloat16, torch.bfloat16, False, AMX)
        meant = form.plain(torch.bfloat16)
        assert torch.equal(found.in_panels().original(), torch.cat((meant, meant)))
        x = torch.randn(150, 768, generator=torch.Generator().manual_seed(1))
        out = normed_product(x, None, 1e-6, found, "silu")
        assert torch.equal(out[:7], normed_product(x[:7], None, 1e-6, found.in_panels(), "silu"))


def test_the_real_instructions_are_what_is_compiled(folder: Path) -> None:
    """For a processor that has them; here they would be illegal."""
    built = folder / "real.so"
    GXX.build(REAL, built)
    found = subprocess.run(["objdump", "-d", str(built)], check=True, capture_output=True, text=True).stdout
    for instruction in ("tdpbf16ps", "tdpbusd", "ldtilecfg", "tilerelease", "tileloadd", "tilestored"):
        assert instruction in found
    assert (FOLDER / "amx" / "tile_unit.h").exists()
