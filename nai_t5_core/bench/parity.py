"""How exact our encoder is: against a float64 reference, and beside other implementations on the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nai_t5_core.backends.choices import ProductsChoice, Quantisation, backend_of, refuse_missing
from nai_t5_core.backends.choose import prepack, quantize_int8, run_in_place, why_not_int8, why_not_prepack
from nai_t5_core.backends.kernels.runners import KERNELS
from nai_t5_core.bench.parity_report import OWN, Difference, LayerDifferences, ParityReport, PolicyCheck
from nai_t5_core.bench.peer_list import PEERS, build_peer
from nai_t5_core.bench.peers import State, exact_norms, own_encoder
from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import StackScales
from nai_t5_core.model.encoder import LAYOUTS, T5EncoderStack
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy
from nai_t5_core.model.precision import DTYPES

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999)
PROMPT_LENGTHS = (150, 1, 77, 30)

# Largest difference allowed, relative to the reference's largest value. The first two are well above rounding errors.
# In half precision rounding errors grow with depth, so these limits find gross faults only, such as a wrong mask.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}
TOLERANCE_INT8 = 0.5

_PREPACKED, _INT8 = f"{OWN} prepacked", f"{OWN} int8"


@dataclass(frozen=True)
class _Batch:
    """The token ids with their reference output: ``masked`` with pad keys hidden, ``unmasked`` with pads as tokens.

    ``residuals`` are the reference's at real positions with pad keys hidden, [tokens, d_model]; empty unless needed.
    """

    ids: Tensor
    mask: Tensor
    masked: Tensor
    unmasked: Tensor
    residuals: list[Tensor]

    @property
    def largest(self) -> float:
        return float(self.masked[self.mask].abs().max())

    def difference(self, name: str, dtype: str, hidden: Tensor) -> Difference:
        """The difference of an output from the reference at real positions."""
        return difference(name, dtype, hidden[self.mask], self.masked[self.mask])


@torch.no_grad()
def measure_parity(
    config: T5Config,
    state: State,
    dtypes: Sequence[torch.dtype | str] = ("float32",),
    against: Sequence[str] = ("transformers",),
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    seed: int = 0,
    reference_dtype: torch.dtype = torch.float64,
    reference_state: State | None = None,
    quantised_since: bool = False,
    scales: StackScales | None = None,
    per_layer: bool = False,
    int8: bool = False,
    progress: Callable[[str], None] | None = None,
    products: ProductsChoice = "auto",
) -> ParityReport:
    """Compares our encoder, and others, with a reference on one right-padded batch of random token ids.

    The reference is transformers in float64 with exact norms. Ours is measured in both layouts, and prepacked as in
    ``TextEncoder`` where this machine can; each with every padding policy. Everything runs on the CPU, one model after
    the other; the reference needs 8 bytes per weight.

    Args:
        state: encoder weights under Hugging Face names, such as :func:`nai_t5_core.bench.peers.hf_state` gives.
        dtypes: compute dtypes, by name or as torch dtypes.
        against: names of peers to measure beside ours; see :data:`nai_t5_core.bench.peer_list.PEERS`.
        prompt_lengths: tokens of each prompt, at least 1; the longest gives the batch its length.
        reference_dtype: float32 halves the reference's memory, but differences below about 1e-6 cannot be seen.
        reference_state: other weights for the reference and the peers, such as the original of a converted checkpoint.
        quantised_since: whether the weights are those of ``reference_state`` quantised; then the error is the user's to
            judge, and the tolerance finds gross faults only.
        scales: of our encoder in float16, as :func:`nai_t5_core.weights.load.choose_scales` finds them.
        per_layer: also compare the residual stream after every layer.
        int8: also measure our encoder in 8 bits, in the dtypes and on the machines that support it.
        progress: called with what is being done, in words.
        products: what computes ours, see :func:`nai_t5_core.backends.choose.prepack`; dtypes that those which are named
            do not compute are told in what was skipped.

    Raises:
        ValueError: transformers is not installed, an unknown dtype or peer, products that are not possible here, or no
            usable prompt lengths.
    """
    tell = progress or (lambda _: None)
    names = [dtype_name(dtype) for dtype in dtypes]
    if unknown := set(against) - set(PEERS):
        raise ValueError(f"unknown peers {sorted(unknown)}; allowed: {', '.join(PEERS)}")
    if reference_dtype not in (torch.float64, torch.float32):
        raise ValueError(f"reference_dtype={reference_dtype}; a reference must be float64 or float32")
    refuse_missing(products, torch.device("cpu"), torch.float32)
    original = state if reference_state is None else reference_state
    tell("reference")
    batch = _reference_batch(config, original, reference_dtype, prompt_lengths, seed, per_layer)
    differences, layers = list[Difference](), list[LayerDifferences]()
    policies, skipped = list[PolicyCheck](), list[str]()
    for name in names:
        tolerance = max(TOLERANCES[DTYPES[name]], TOLERANCES[reference_dtype])
        tolerance = max(tolerance, TOLERANCE_INT8) if quantised_since else tolerance
        for variant, stack in _own_variants(config, state, DTYPES[name], scales, int8, products):
            tell(f"{variant} in {name}")
            outputs = {padding: _policy_run(stack, batch, padding) for padding in PADDING_POLICIES}
            differences.append(batch.difference(variant, name, outputs["exact"][0]))
            if per_layer:
                states = stack.hidden_states(batch.ids, batch.mask, padding="exact", final_norm=False)
                layers.append(_layer_differences(variant, name, states, batch))
            # The error of 8 bits is the user's to judge; the tolerance finds gross faults only.
            bound = TOLERANCE_INT8 if variant == _INT8 else tolerance
            for padding, (found, wanted) in outputs.items():
                relative = _relative(found, wanted, batch)
                policies.append(PolicyCheck(variant, name, padding, relative, bound))
        skipped += [f"{what} in {name}: {why}" for what, why in _left_out(products, DTYPES[name], int8).items()]
        for peer_name in against:
            tell(f"{peer_name} in {name}")
            try:
                peer = build_peer(peer_name, config, original, DTYPES[name])
            except ValueError as error:
                skipped.append(f"{peer_name} in {name}: {error}")
                continue
            differences.append(batch.difference(peer_name, name, peer(batch.ids, batch.mask)))
            if per_layer:
                layers.append(_layer_differences(peer_name, name, peer.residuals(batch.ids, batch.mask), batch))
    return ParityReport(
        kind=config.kind,
        reference=f"transformers in {dtype_name(reference_dtype)} with exact norms",
        prompt_lengths=tuple(prompt_lengths),
        largest_value=batch.largest,
        differences=tuple(differences),
        layers=tuple(layers),
        policies=tuple(policies),
        skipped=tuple(skipped),
    )


def random_batch(config: T5Config, prompt_lengths: Sequence[int], length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids, pads behind them, and their mask: [batch, length] int64 and bool.

    Raises:
        ValueError: no prompts, or one that is empty or longer than ``length``.
    """
    if not prompt_lengths or min(prompt_lengths) < 1 or max(prompt_lengths) > length:
        raise ValueError(f"prompt lengths {list(prompt_lengths)}; each must be 1 … {length}, and there must be one")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (len(prompt_lengths), length), generator=generator)
    mask = torch.arange(length)[None, :] < torch.tensor(prompt_lengths)[:, None]
    return ids.masked_fill(~mask, config.pad_token_id), mask


def _reference_batch(
    config: T5Config, state: State, dtype: torch.dtype, prompt_lengths: Sequence[int], seed: int, per_layer: bool
) -> _Batch:
    ids, mask = random_batch(config, prompt_lengths, max(prompt_lengths, default=0), seed)
    reference = build_peer("transformers", config, state, dtype)
    exact_norms(reference.model)
    residuals = [residual[mask] for residual in reference.residuals(ids, mask)] if per_layer else []
    return _Batch(ids, mask, reference(ids, mask), reference(ids), residuals)


def _own_variants(
    config: T5Config, state: State, dtype: torch.dtype, scales: StackScales | None, int8: bool, products: ProductsChoice
) -> Iterator[tuple[str, T5EncoderStack]]:
    """Our encoder in both layouts and as users run it; each variant is built after the one before was freed."""
    scales = scales if dtype == torch.float16 else None
    left_out = _left_out(products, dtype, int8)
    for layout in LAYOUTS:
        stack = own_encoder(config, state, dtype, layout, scales)
        if products in KERNELS:
            run_in_place(stack, products)
        yield f"{OWN} {layout}", stack
        if layout == "separate":
            continue
        is_named = products != "auto"
        if int8 and _INT8 not in left_out and (is_named or why_not_int8(stack) is None):
            yield _INT8, quantize_int8(own_encoder(config, state, dtype), products)
        if _PREPACKED not in left_out and (is_named or why_not_prepack(stack) is None):
            yield _PREPACKED, prepack(stack, products)


def _left_out(products: ProductsChoice, dtype: torch.dtype, int8: bool) -> dict[str, str]:
    """The variants of ours that products that are named do not compute in this dtype, and why."""
    if products == "auto":
        return {}
    kinds: dict[str, Quantisation | None] = {_PREPACKED: None, **({_INT8: "int8"} if int8 else {})}
    missing = {name: backend_of(products, kind).missing(torch.device("cpu"), dtype) for name, kind in kinds.items()}
    return {name: f"products={products!r}: {reason}" for name, reason in missing.items() if reason}


def _policy_run(stack: T5EncoderStack, batch: _Batch, padding: PaddingPolicy) -> tuple[Tensor, Tensor]:
    """The output under a padding policy, and the one expected from the reference, both [batch, length, d_model]."""
    ids, mask, wanted = batch.ids, batch.mask, batch.masked
    if padding == "attend":
        wanted = batch.unmasked
    elif padding == "skip":
        wanted = wanted.masked_fill(~mask[..., None], 0)
    elif padding == "trim":
        # The longest prompts are left out, so that there is something to trim.
        counts = mask.sum(dim=1)
        shorter = counts < counts.max() if int(counts.min()) < int(counts.max()) else counts > 0
        ids, mask = ids[shorter], mask[shorter]
        length = int(counts[shorter].max())
        wanted = wanted[shorter].masked_fill(~mask[..., None], 0)[:, :length]
    return stack(ids, mask, padding=padding), wanted


def _relative(found: Tensor, wanted: Tensor, batch: _Batch) -> float:
    """Largest difference relative to the reference's largest value; infinite where the shapes differ."""
    is_alike = found.shape == wanted.shape
    return float((found.to(wanted.dtype) - wanted).abs().max()) / batch.largest if is_alike else math.inf


def difference(name: str, dtype: str, found: Tensor, expected: Tensor) -> Difference:
    """The difference of values from those expected, of the same shape."""
    errors = (found.to(expected.dtype) - expected).abs().flatten().numpy()
    quantiles = dict(zip(map(str, QUANTILES), np.quantile(errors, QUANTILES).tolist(), strict=True))
    largest = float(errors.max())
    return Difference(name, dtype, quantiles, largest, largest / float(expected.abs().max()))


def _layer_differences(name: str, dtype: str, states: Sequence[Tensor], batch: _Batch) -> LayerDifferences:
    medians, largest = list[float](), list[float]()
    for state, expected in zip(states, batch.residuals, strict=True):
        errors = (state[batch.mask].to(expected.dtype) - expected).abs() / expected.square().mean().sqrt()
        medians.append(float(errors.median()))
        largest.append(float(errors.max()))
    return LayerDifferences(name, dtype, tuple(medians), tuple(largest))


def dtype_name(dtype: torch.dtype | str) -> str:
    """``"float16"`` for a dtype or its name; raises a ValueError for one that a T5 cannot run in."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    return name
