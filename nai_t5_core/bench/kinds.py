"""What each kind of quantised weight takes, loses and costs: size, quantiles of the error, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nai_t5_core.backends.choices import ProductsChoice
from nai_t5_core.backends.choose import prepack, run_quantised, why_not_prepack
from nai_t5_core.backends.quantised.pieces import is_read
from nai_t5_core.backends.quantised.projections import QuantisedForm, QuantisedLinear
from nai_t5_core.backends.quantised.runner import QuantisedBackend
from nai_t5_core.bench.kinds_packing import PACKINGS, Packing, possible_kinds, refuse_impossible
from nai_t5_core.bench.peers import random_state
from nai_t5_core.bench.speed.tables import Table
from nai_t5_core.facts.config import T5Config, encoder_tensors
from nai_t5_core.lora.changes import LowRankChange
from nai_t5_core.lora.files import Lora
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.model.encoder import T5EncoderStack
from nai_t5_core.model.layers import NoInit

QUANTILES = (0.5, 0.9, 0.99, 0.999)


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
    lora_rank: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[KindRow]:
    """Measures an encoder of random weights on the CPU, in every kind that can be packed here.

    Errors are of float32 products, so that nothing but the kind rounds; times are of products in ``dtype``. The first
    row is the model without any kind, in ``dtype``, prepacked where that is possible; every kind is timed in turn with
    it.

    Args:
        kinds: of :data:`nai_t5_core.bench.kinds_packing.PACKINGS`; all that can be packed here if None.
        products: see :func:`nai_t5_core.backends.choose.prepack`; kinds that the kernels do not read are computed by
            torch whatever is named.
        lora_rank: of a live LoRA on every projection, beside which times are taken, and errors are not; 0 for none.

    Raises:
        ValueError: an unknown kind, one that a package is missing for, or products that are not possible here.
    """
    chosen = possible_kinds() if kinds is None else kinds
    if unknown := [kind for kind in chosen if kind not in PACKINGS]:
        raise ValueError(f"unknown kinds {unknown}; allowed: {', '.join(PACKINGS)}")
    refuse_impossible(chosen)
    packings = {name: PACKINGS[name] for name in PACKINGS if name in chosen}
    states = [random_state(config, outliers=outliers) for outliers in (False, True)]
    ids = torch.randint(3, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    exact = [_stack(config, state, torch.float32)(ids) for state in states]
    plain = _with_lora(_computed(_stack(config, states[0], dtype), products), lora_rank)
    rows: list[KindRow] = []
    for name, packing in [("", None), *packings.items()]:
        progress(name or str(dtype))
        errors = []
        for state, meant in zip(states, exact, strict=True):
            stack = _stack(config, state, torch.float32 if packing else dtype, packing)
            errors.append(_errors(stack(ids), meant))
        stacks = [plain]
        if packing is not None:
            stacks.append(_with_lora(_computed(_stack(config, states[0], dtype, packing), products), lora_rank))
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


def kinds_table(rows: Sequence[KindRow]) -> tuple[Table, list[str]]:
    """Bits, errors and times, and what computes which kinds."""
    quantiles = [f"{quantile:g}" for quantile in QUANTILES]
    times = [f"{count} tokens, ms (×)" for count in rows[0].tokens]
    headings = ("kind", "bits", *quantiles, "largest", "largest, with outliers", *times)
    cells = [
        (
            row.kind,
            f"{row.bits:.2f}",
            *(f"{error:.1e}" for error in (*row.errors, row.errors_with_outliers[-1])),
            *(f"{time:.0f} ({ratio:.2f})" for time, ratio in zip(row.milliseconds, row.ratios, strict=True)),
        )
        for row in rows
    ]
    ways = dict.fromkeys(row.by for row in rows)
    notes = [f"by {by}: {', '.join(row.kind for row in rows if row.by == by)}" for by in ways]
    return Table(
        "Kinds of weights: errors relative to the largest value, and times of one encode", headings, cells
    ), notes


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


def _with_lora(stack: T5EncoderStack, rank: int) -> T5EncoderStack:
    """The same stack, with a live LoRA of this rank on every projection, if it is not 0."""
    changes = {
        name: LowRankChange(torch.randn(shape[0], rank) * 0.01, torch.randn(rank, shape[1]) * 0.01, 1.0)
        for name, shape in encoder_tensors(stack.config).items()
        if rank and len(shape) == 2 and name != "shared.weight" and "relative_attention_bias" not in name
    }
    if changes:
        LiveLoras(stack).add(Lora(f"rank {rank}", changes))
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
