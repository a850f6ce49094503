"""What each kind of quantised weight takes, loses and costs: size, quantiles of the error, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.choices import ProductsChoice
from nai_t5_core.backends.choose import prepack, run_quantised, why_not_prepack
from nai_t5_core.backends.quantised.four_bits import LARGEST, TABLE, FourBits
from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import WEIGHT, QuantisedWeight
from nai_t5_core.backends.quantised.packing import pack
from nai_t5_core.backends.quantised.pieces import is_read
from nai_t5_core.backends.quantised.projections import QuantisedForm, QuantisedLinear
from nai_t5_core.backends.quantised.runner import QuantisedBackend
from nai_t5_core.backends.quantised.scaled import SCALE, Scaled
from nai_t5_core.bench.peers import random_state
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit

QUANTILES = (0.5, 0.9, 0.99, 0.999)
Packing = Callable[[Tensor], QuantisedWeight]

# The values of NF4: quantiles of the normal distribution, as bitsandbytes has them.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class KindRow:
    """A kind. ``errors`` are quantiles of the differences from float32 and the largest, relative to the largest value.

    ``errors_with_outliers`` are those of a model that has large channels, as trained ones have. ``milliseconds`` are of
    an encode of as many tokens as ``tokens`` says, and ``ratios`` these times by those of the prepacked model without
    any kind, which took turns with it. ``by`` is what computes it.
    """

    kind: str
    bits: float
    errors: tuple[float, ...]
    errors_with_outliers: tuple[float, ...]
    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]
    ratios: tuple[float, ...]
    by: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_kinds(
    config: T5Config,
    dtype: torch.dtype = torch.bfloat16,
    tokens: Sequence[int] = (32, 128, 512),
    repeats: int = 3,
    kinds: Sequence[str] | None = None,
    products: ProductsChoice = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> list[KindRow]:
    """Measures an encoder of random weights on the CPU, in every kind that can be packed here.

    Errors are of float32 products, so that nothing but the kind rounds; times are of products in ``dtype``. The first
    row is the model without any kind, in ``dtype``, prepacked where that is possible; every kind is timed in turn with
    it.

    Args:
        products: see :func:`nai_t5_core.backends.choose.prepack`; kinds that the kernels do not read are computed by
            torch whatever is named.

    Raises:
        ValueError: an unknown kind, or products that are not possible here.
    """
    packings = {name: packing for name, packing in _packings() if kinds is None or name in kinds}
    if kinds is not None and (unknown := set(kinds) - set(packings)):
        raise ValueError(f"unknown kinds {sorted(unknown)}; allowed: {', '.join(name for name, _ in _packings())}")
    states = [random_state(config, outliers=outliers) for outliers in (False, True)]
    ids = torch.randint(3, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    exact = [_stack(config, state, torch.float32)(ids) for state in states]
    plain = _computed(_stack(config, states[0], dtype), products)
    rows: list[KindRow] = []
    for name, packing in [("", None), *packings.items()]:
        progress(name or str(dtype))
        errors = []
        for state, meant in zip(states, exact, strict=True):
            stack = _stack(config, state, torch.float32 if packing else dtype, packing)
            errors.append(_errors(stack(ids), meant))
        stacks = [plain]
        if packing is not None:
            stacks.append(_computed(_stack(config, states[0], dtype, packing), products))
        times = [_milliseconds(stacks, config, count, repeats) for count in tokens]
        runner: Any = stacks[-1].encoder.block[0].runner
        rows.append(
            KindRow(
                name or str(dtype).removeprefix("torch."),
                _bits(stacks[-1], dtype),
                errors=errors[0],
                errors_with_outliers=errors[1],
                tokens=tuple(tokens),
                milliseconds=tuple(found[-1] for found in times),
                ratios=tuple(found[-1] / found[0] for found in times),
                by="torch" if runner is None else runner.name,
            )
        )
    return rows


def markdown(rows: Sequence[KindRow]) -> str:
    """A table."""
    quantiles = [f"{quantile:g}" for quantile in QUANTILES]
    times = [f"{count} tokens, ms (×)" for count in rows[0].tokens]
    head = ["kind", "bits", *quantiles, "largest", "largest, with outliers", *times]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        errors = [f"{error:.1e}" for error in (*row.errors, row.errors_with_outliers[-1])]
        lines.append(" | ".join([row.kind, f"{row.bits:.2f}", *errors, *_times(row)]))
    table = "\n".join(f"| {line} |" for line in lines)
    computed = "\n".join(f"- {by}: {', '.join(row.kind for row in rows if row.by == by)}" for by in _ways(rows))
    return f"{table}\n\nComputed by\n\n{computed}\n"


def _times(row: KindRow) -> list[str]:
    return [f"{time:.0f} ({ratio:.2f})" for time, ratio in zip(row.milliseconds, row.ratios, strict=True)]


def _ways(rows: Sequence[KindRow]) -> list[str]:
    return list(dict.fromkeys(row.by for row in rows))


def _stack(
    config: T5Config, state: dict[str, Tensor], dtype: torch.dtype, packing: Packing | None = None
) -> T5EncoderStack:
    """In the separate layout, whose weights are those of files."""
    stack = T5EncoderStack(config, "separate", NoInit, device="meta", dtype=dtype)
    rounded = {name: tensor if "layer_norm" in name else tensor.to(dtype) for name, tensor in state.items()}
    stack.load_state_dict(rounded, assign=True)
    block: Any
    for block in stack.encoder.block if packing is not None else ():
        assert packing is not None
        QuantisedBackend(packing).bind(block, dtype)
    return stack.eval()


def _errors(found: Tensor, meant: Tensor) -> tuple[float, ...]:
    errors = (found.float() - meant).abs().flatten().sort().values / meant.abs().max()
    places = [min(len(errors) - 1, int(quantile * len(errors))) for quantile in QUANTILES]
    return tuple(float(errors[place]) for place in [*places, -1])


def _computed(stack: T5EncoderStack, products: ProductsChoice) -> T5EncoderStack:
    """The same stack, computed by ``products`` where its weights can be."""
    forms = _forms(stack)
    if forms and all(is_read(form.weight.kind) for form in forms):
        run_quantised(stack, products)
    elif not forms and (products != "auto" or why_not_prepack(stack) is None):
        prepack(stack, products)
    return stack


def _milliseconds(stacks: Sequence[T5EncoderStack], config: T5Config, count: int, repeats: int) -> list[float]:
    """Medians of stacks that take turns."""
    ids = torch.randint(3, config.vocab_size, (1, count))
    taken: list[list[float]] = [[] for _ in stacks]
    for number in range(repeats + 2):  # the second call puts prepacked weights in panels
        for stack, times in zip(stacks, taken, strict=True):
            began = time.perf_counter()
            stack(ids)
            times += [time.perf_counter() - began] if number > 1 else []
    return [1e3 * statistics.median(times) for times in taken]


def _bits(stack: T5EncoderStack, dtype: torch.dtype) -> float:
    """Of a weight of a projection."""
    held = [form.weight for form in _forms(stack)]
    if not held:
        return 8.0 * dtype.itemsize
    return 8 * sum(weight.nbytes for weight in held) / sum(weight.shape[0] * weight.shape[1] for weight in held)


def _forms(stack: T5EncoderStack) -> list[QuantisedForm]:
    return [form for part in stack.modules() if isinstance(part, QuantisedLinear) for form in part.forms]


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def _packings() -> Iterator[tuple[str, Packing]]:
    yield "int8", partial(pack, kind="int8")
    yield "Q8_0", partial(pack, kind="q8_0")
    for name in ("Q5_1", "Q5_0"):
        yield name, partial(_by_gguf, name=name)
    yield "Q4_K", partial(pack, kind="q4_k")
    for name in ("Q4_1", "Q4_0"):
        yield name, partial(_by_gguf, name=name)
    yield "NF4", _nf4
    yield "float8_e4m3fn", partial(pack, kind="float8")
    yield "float8_e5m2", _e5m2


def _by_gguf(weight: Tensor, name: str) -> QuantisedWeight:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    content = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType[name]).copy())
    return QuantisedWeight(GGML_KINDS[name], (weight.shape[0], weight.shape[1]), {WEIGHT: content})


def _nf4(weight: Tensor) -> QuantisedWeight:
    rows, columns = weight.shape
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    table = torch.tensor(_NF4)
    codes = torch.bucketize(blocks / largest, (table[1:] + table[:-1]) / 2).to(torch.uint8).reshape(rows, -1)
    parts = {WEIGHT: codes[:, ::2] << 4 | codes[:, 1::2], LARGEST: largest.reshape(rows, -1), TABLE: table}
    return QuantisedWeight(FourBits("NF4 of bitsandbytes", 64), (rows, columns), parts)


def _e5m2(weight: Tensor) -> QuantisedWeight:
    dtype = torch.float8_e5m2
    scale = weight.abs().max() / torch.finfo(dtype).max
    parts = {WEIGHT: (weight / scale).to(dtype), SCALE: scale}
    return QuantisedWeight(Scaled("float8_e5m2", dtype), (weight.shape[0], weight.shape[1]), parts)
