"""The watch over generation: a float16 decoder that overflows is tightened, and the texts are generated again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from nai_t5_core.float16.guard import (
    DAMAGED,
    NotFiniteError,
    describe_change,
    encode_guarded,
    refuse_damage,
    rescale_block,
    tighter_scales,
    warn_of,
)
from nai_t5_core.float16.maxima import LayerMaxima, observe
from nai_t5_core.generation.decoding import NotFiniteLogitsError
from nai_t5_core.generation.t5 import T5
from nai_t5_core.model.decoder import DecoderBlock
from nai_t5_core.model.layers import residual_dtype
from nai_t5_core.model.plain_twin import plain_twin, plain_weight
from nai_t5_core.model.precision import advice_beyond, is_finite


def generate_guarded(
    model: T5,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """``model.generate(…)``, with the promise that no logit was NaN or infinite.

    If a float16 model overflows, the scales of the layer at fault are tightened for good (see ``model.decoder_scales``
    and ``model.encoder_stack.scales``), which one :class:`nai_t5_core.float16.guard.ScaleTightenedWarning` tells, and
    the texts are generated again, from the same random numbers. Without a ``generator``, one is seeded from torch's
    own.

    Raises:
        NotFiniteError: weights are not finite, or a value that has no scale overflows; the message names it.
        ValueError, TypeError: as :meth:`nai_t5_core.generation.t5.T5.generate`.
    """
    if generator is None:
        generator = torch.Generator(model.device).manual_seed(int(torch.randint(2**62, ())))
    start = generator.get_state()

    def generate() -> Tensor:
        generator.set_state(start)
        return model.generate(input_ids, attention_mask, generator=generator, **options)

    with suppress(NotFiniteLogitsError):
        return generate()
    changes: list[str] = []
    with model.turns.change():
        while True:
            # Another thread may have mended it while this one waited.
            with suppress(NotFiniteLogitsError):
                out = generate()
                break
            # An encoder at fault says so itself.
            encode_guarded(model.encoder_stack, input_ids, attention_mask, padding="skip")
            change = _tighten_first_fault(model, generate)
            if change is not None:
                changes.append(change)
    if changes:
        warn_of(changes, "nai_t5_core.weights.scales_file.write_scales")
    return out


class _FaultFoundError(Exception):
    """A layer of the decoder gave something not finite; with what it was called."""

    def __init__(self, index: int, residual: Tensor, attends: tuple[Callable[..., Tensor], ...]) -> None:
        super().__init__()
        self.index, self.residual, self.attends = index, residual, attends


@torch.no_grad()
def _tighten_first_fault(model: T5, generate: Callable[[], Tensor]) -> str | None:
    """Generates once more under observation and tightens the first layer at fault; returns what was done.

    None where nothing is at fault any more: then it was the encoder.
    """
    try:
        with _watching(model):
            generate()
    except _FaultFoundError as fault:
        return _tighten(model, fault)
    except NotFiniteLogitsError as error:
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        raise NotFiniteError(
            f"the logits exceed {model.dtype}, though no layer does; {advice_beyond(model.dtype)}"
            if is_finite(plain_weight(model.lm_head, like))
            else f"lm_head.weight {DAMAGED}"
        ) from error
    return None


@contextmanager
def _watching(model: T5) -> Iterator[None]:
    """While it is open, the first fault in the decoder raises an error, with what is needed to mend it."""
    # A compiled decoder runs without its hooks, and that of a lone text is another one.
    eager: Any = getattr(torch.compiler, "set_stance", None)
    with ExitStack() as open_contexts:
        open_contexts.callback(setattr, model, "compiled_steps", model.compiled_steps)
        model.compiled_steps = None
        if eager is not None:
            open_contexts.enter_context(eager("force_eager"))
        for index, block in enumerate(model.decoder.block):
            for handle in _watch(block, index, model):
                open_contexts.callback(handle.remove)
        final = model.decoder.final_layer_norm.register_forward_hook(_refuse_output(model))
        open_contexts.callback(final.remove)
        yield


def _watch(block: nn.Module, index: int, model: T5) -> Iterator[Any]:
    before: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        # A copy, since the block may write its result into the residual.
        before[:] = [inputs[0].clone()]

    def look(_: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        if not is_finite(out):
            raise _FaultFoundError(index, before[0], inputs[1:-1])

    def look_at_memory(_: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        if not is_finite(out):
            _refuse_damage(model, index, inputs[0].to(residual_dtype(model.dtype)))
            raise NotFiniteError(
                f"decoder layer {index} exceeds {model.dtype} (its keys or values of the prompt), and no scale can "
                f"mend that; {advice_beyond(model.dtype)}"
            )

    yield block.register_forward_pre_hook(keep)
    yield block.register_forward_hook(look)
    cross: Any = block.layer[1]  # type: ignore[index]
    for name, child in cross.EncDecAttention.named_children():
        if name in ("k", "v", "kv"):
            yield child.register_forward_hook(look_at_memory)


def _refuse_output(model: T5) -> Callable[[nn.Module, Any, Tensor], None]:
    def look(_: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        if is_finite(out.to(model.dtype)):
            return
        norm = model.decoder.final_layer_norm
        if not is_finite(norm.weight):
            raise NotFiniteError(f"decoder.final_layer_norm.weight {DAMAGED}")
        raise NotFiniteError(f"the decoder's output itself exceeds {model.dtype}; {advice_beyond(model.dtype)}")

    return look


def _refuse_damage(model: T5, index: int, residual: Tensor) -> DecoderBlock:
    """The layer in float32, whose weights are finite; else an error that names what is not."""
    block, scales = model.decoder.block[index], model.decoder_scales.layers[index]
    assert isinstance(block, DecoderBlock)
    twin = plain_twin(block, model.layout, model.config, scales, residual.to(model.dtype))
    refuse_damage(f"decoder.block.{index}.", twin, residual)
    return twin


def _tighten(model: T5, fault: _FaultFoundError) -> str:
    index, where = fault.index, f"decoder layer {fault.index}"
    if not is_finite(fault.residual):
        raise NotFiniteError(f"shared.weight {DAMAGED}")
    # A copy, since tensors made in inference mode cannot be changed outside of it.
    residual = fault.residual.clone()
    twin = _refuse_damage(model, index, residual)
    _refuse_bias(model, index)
    seen, old = LayerMaxima.of_decoder(), model.decoder_scales.layers[index]
    observe(twin, old, residual, [_with_inputs_in(model.dtype, attend) for attend in fault.attends], seen)
    new = tighter_scales(where, old, seen, model.dtype, model.config)
    rescale_block(model.decoder.block[index], model.layout, old, new)
    model.decoder_scales = model.decoder_scales.with_layer(index, new)
    return describe_change(where, old, new, seen)


def _refuse_bias(model: T5, index: int) -> None:
    owner = index if model.decoder.bias_per_layer else 0
    block: Any = model.decoder.block[owner]
    if not is_finite(block.layer[0].SelfAttention.relative_attention_bias.weight):
        name = f"decoder.block.{owner}.layer.0.SelfAttention.relative_attention_bias.weight"
        raise NotFiniteError(f"{name} {DAMAGED}")


def _with_inputs_in(dtype: torch.dtype, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention as the model computes it, for a caller in float32: the keys that it reads beside are the model's."""

    def call(*inputs: Tensor) -> Tensor:
        return attend(*(tensor.to(dtype) for tensor in inputs)).to(inputs[0].dtype)

    return call
