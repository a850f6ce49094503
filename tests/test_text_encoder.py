"""The public object: prompts in, embeddings and masks out, whatever the batch, the family and the memory allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, every_set, random_state, write_hf_folder

from nai_t5_core.backends.choose import why_not_prepack
from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.build import why_not_kernels
from nai_t5_core.backends.kernels.sets import AVX2, InstructionSet
from nai_t5_core.facts.families import family, family_names
from nai_t5_core.facts.text_cleaning import clean_text
from nai_t5_core.model.fixed_weights import has_fixed_weights
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.tokenizer import ByteTokenizer
from nai_t5_core.weights.examine import find_tokenizer_for
from nai_t5_core.weights.load import load_encoder

PROMPTS = ['A "red" cat', "", "two dogs play with a ball in the park, soft light, 35mm film", "a fox"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    """The embedded model, as it comes from the file."""
    return TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)


def with_budget(encoder: TextEncoder, budget: int) -> TextEncoder:
    return TextEncoder(encoder.stack, encoder.tokenizer, token_budget=budget)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, masks, families
# ---------------------------------------------------------------------------------------------------------------------


def test_plain_call(encoder: TextEncoder) -> None:
    """Without a family: padded to the longest, never cut, pads masked."""
    out = encoder.encode(PROMPTS)
    counts = encoder.count(PROMPTS)
    assert out.token_counts == counts and counts[1] == 1
    assert out.hidden_states.shape == (4, max(counts), 128)
    assert (out.hidden_states.dtype, out.attention_mask.dtype) == (torch.float32, torch.bool)
    assert out.attention_mask.sum(dim=1).tolist() == counts
    assert (out.truncated, out.cut_text) == ([False] * 4, [""] * 4)
    tokens = encoder.tokenizer(PROMPTS)
    with torch.no_grad():
        expected = encoder.stack(torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask))
    assert torch.equal(out.hidden_states, expected)


@pytest.mark.parametrize("name", family_names())
def test_family(encoder: TextEncoder, name: str) -> None:
    """Length, mask and every row that the family's transformer reads."""
    row = family(name)
    out = encoder.encode(PROMPTS, family=name)
    texts = [clean_text(prompt, row.text_cleaning) for prompt in PROMPTS]
    counts = encoder.count(texts)
    limit = row.call_length or row.max_length
    length = limit if row.pad_to == "max_length" else max(counts)
    assert out.hidden_states.shape == (4, length, 128)
    assert out.token_counts == counts
    assert out.attention_mask.sum(dim=1).tolist() == [count + row.extra_pad for count in counts]

    tokens = encoder.tokenizer(texts, limit, pad_to=length)
    ids, mask = torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask)
    with torch.no_grad():
        expected = encoder.stack(ids, mask if row.encoder_mask or row.padding == "skip" else None)
    if row.padding == "skip":
        assert not out.hidden_states[~mask.bool()].any()
    read = torch.ones_like(mask).bool() if row.padding in ("attend", "exact") else mask.bool()
    torch.testing.assert_close(out.hidden_states[read], expected[read], rtol=1e-5, atol=1e-5)


def test_arguments_override_the_family(encoder: TextEncoder) -> None:
    assert encoder.encode(PROMPTS, "flux", max_length=32).hidden_states.shape == (4, 32, 128)
    assert encoder.encode(PROMPTS, "flux", padding="trim").hidden_states.shape[1] == max(encoder.count(PROMPTS))
    assert encoder.encode(PROMPTS, "flux", pad_to="longest").hidden_states.shape[1] == max(encoder.count(PROMPTS))
    assert encoder.encode(["a fox"], "chroma", extra_pad=0).attention_mask.sum() == encoder.count(["a fox"])[0]


def test_extra_pad_is_in_the_mask_and_computed(encoder: TextEncoder) -> None:
    plain = encoder.encode(PROMPTS, max_length=32, pad_to="max_length", padding="exact")
    extra = encoder.encode(PROMPTS, max_length=32, pad_to="max_length", padding="skip", extra_pad=2)
    assert extra.attention_mask.sum(dim=1).tolist() == [count + 2 for count in plain.token_counts]
    mask = extra.attention_mask
    torch.testing.assert_close(extra.hidden_states[mask], plain.hidden_states[mask], rtol=1e-5, atol=1e-5)
    assert not extra.hidden_states[~mask].any()


def test_truncation_is_told(encoder: TextEncoder) -> None:
    out = encoder.encode(["a red cat on a wooden table", "a fox"], max_length=4)
    assert out.token_counts == [4, 3]
    assert out.truncated == [True, False]
    assert out.cut_text == ["on a wooden table", ""]
    assert out.hidden_states.shape == (2, 4, 128)
    kept = encoder.encode(["a red cat"])
    torch.testing.assert_close(out.hidden_states[0], kept.hidden_states[0], rtol=1e-5, atol=1e-5)


def test_unpadded(encoder: TextEncoder) -> None:
    """Each prompt as if it were alone."""
    parts = encoder.encode(PROMPTS, max_length=64, pad_to="max_length", padding="skip").unpadded()
    assert [tuple(part.shape) for part in parts] == [(count, 128) for count in encoder.count(PROMPTS)]
    for prompt, part in zip(PROMPTS, parts, strict=True):
        torch.testing.assert_close(part, encoder.encode([prompt]).hidden_states[0], rtol=1e-5, atol=1e-5)


def test_output_device(encoder: TextEncoder) -> None:
    """The meta device stands for any other than the model's."""
    out = encoder.encode(PROMPTS, output_device="meta")
    assert (out.hidden_states.device.type, out.attention_mask.device.type) == ("meta", "meta")
    assert encoder.encode(PROMPTS).hidden_states.device.type == "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# Batches in parts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_to", ["longest", "max_length"])
@pytest.mark.parametrize("padding", PADDING_POLICIES)
def test_parts_give_what_one_pass_gives(encoder: TextEncoder, padding: PaddingPolicy, pad_to: str) -> None:
    prompts = [*PROMPTS, *PROMPTS[::-1], "a"]
    options = {"padding": padding, "pad_to": pad_to, "max_length": 24, "extra_pad": 1}
    whole = encoder.encode(prompts, **options)  # type: ignore[arg-type]
    for budget in (1, 25, 60):
        parts = with_budget(encoder, budget).encode(prompts, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(parts.hidden_states, whole.hidden_states, rtol=1e-5, atol=1e-5)
        assert torch.equal(parts.attention_mask, whole.attention_mask)
        assert parts.token_counts == whole.token_counts


def test_parts_keep_to_the_budget(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = encoder.stack.encoder.forward

    def counting(embeddings: torch.Tensor, *arguments: object) -> torch.Tensor:
        rows.append(len(embeddings))
        return real(embeddings, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder.stack.encoder, "forward", counting)
    with_budget(encoder, 64).encode(["a fox"] * 100, max_length=16, pad_to="max_length", padding="exact")
    assert rows == [64] * 25
    rows.clear()
    with_budget(encoder, 64).encode(["a fox"] * 100, max_length=16, pad_to="max_length", padding="skip")
    assert rows == [63, 63, 63, 63, 48], "only real tokens count where pads are not computed"


def test_a_hundred_prompts(encoder: TextEncoder) -> None:
    prompts = [f"{number} cats and {'dogs ' * (number % 7)}" for number in range(100)]
    out = encoder.encode(prompts, family="pixart-sigma")
    assert out.hidden_states.shape == (100, 300, 128)
    for index in (0, 41, 99):
        alone = encoder.encode([prompts[index]], family="pixart-sigma")
        torch.testing.assert_close(out.hidden_states[index], alone.hidden_states[0], rtol=1e-5, atol=1e-5)


def test_order_is_kept(encoder: TextEncoder) -> None:
    forwards = encoder.encode(PROMPTS, padding="skip")
    backwards = encoder.encode(PROMPTS[::-1], padding="skip")
    torch.testing.assert_close(backwards.hidden_states.flip(0), forwards.hidden_states, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The same again, and afterwards
# ---------------------------------------------------------------------------------------------------------------------


def test_repeated_calls_are_equal_and_independent(encoder: TextEncoder) -> None:
    """ComfyUI edits embeddings in place, so no call may hand out what another one holds."""
    first = encoder.encode(PROMPTS)
    copy = first.hidden_states.clone()
    first.hidden_states.zero_()
    assert torch.equal(encoder.encode(PROMPTS).hidden_states, copy)


def test_results_work_in_autograd(encoder: TextEncoder) -> None:
    """They are ordinary tensors, not those of inference mode, which no gradient may pass."""
    hidden = encoder.encode(PROMPTS).hidden_states
    assert not hidden.is_inference() and not hidden.requires_grad
    weight = torch.zeros(128, requires_grad=True)
    (hidden @ weight).sum().backward()
    assert weight.grad is not None and torch.isfinite(weight.grad).all() and weight.grad.any()


def test_prepacked_is_the_same() -> None:
    packed = TextEncoder.from_pretrained(dtype="float32", device="cpu")
    if why_not_prepack(load_encoder(dtype="float32", device="cpu")) is not None:
        pytest.skip("this machine's oneDNN packs nothing")
    plain = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)
    assert has_fixed_weights(packed.stack) and not has_fixed_weights(plain.stack)
    for padding in PADDING_POLICIES:
        ours, expected = (encoder.encode(PROMPTS, padding=padding).hidden_states for encoder in (packed, plain))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_from_pretrained_with_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    byt5 = TOY_CONFIGS["byt5"]
    folder = write_hf_folder(tmp_path / "byt5", byt5, random_state(byt5))
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    # A tokenizer.json that is damaged is not even looked at.
    (folder / "tokenizer.json").write_text("{")
    encoder = TextEncoder.from_pretrained(folder, "float32", "cpu", tokenizer=config)
    assert isinstance(encoder.tokenizer, ByteTokenizer)
    assert encoder.encode(["é"]).token_counts == [3]
    computed = "attention=auto: sdpa" if why_not_kernels() else "kernels, to be in panels, attention=auto: kernels"
    assert repr(encoder).startswith("TextEncoder(ByT5, d_model 64, torch.float32, cpu, ")
    assert repr(encoder).endswith(f"{computed})")


@every_set
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_instruction_set_by_name(instructions: InstructionSet, quantize: Any) -> None:
    encoder = TextEncoder.from_pretrained(device="cpu", products=instructions.name, quantize=quantize)
    assert all(block.runner.name.startswith(f"{instructions.title} kernels") for block in encoder.stack.encoder.block)
    assert f", {instructions.title} kernels" in repr(encoder)
    assert encoder.encode(["a cat"]).hidden_states.isfinite().all()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"products": "sse"}, "unknown products 'sse'; allowed: auto, kernels, amx, avx512, avx2-vnni, avx2, onednn"),
        ({"products": "avx2", "device": "meta"}, "products='avx2' is for models that are .* is to be on meta; leave"),
        ({"products": "avx2", "compile": True}, "products='avx2' is for models that are .*, and not compiled"),
        ({"products": "avx2", "optimize": False}, "products='avx2' is for models that are prepacked or quantised"),
    ],
)
def test_products_that_do_not_fit_are_refused(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # before anything is looked for
        TextEncoder.from_pretrained("no such file", **{"device": "cpu", **told})


@pytest.mark.parametrize("cached", [False, True])
def test_a_set_that_the_processor_lacks_is_refused_as_early(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: AVX2.needs)
    told = "products='amx' is not possible: this processor has no AMX .*; use products='auto' or 'onednn'"
    with pytest.raises(ValueError, match=told):
        TextEncoder.from_pretrained("no such file", device="cpu", products="amx", cache=tmp_path if cached else False)


def test_from_parts() -> None:
    config = TOY_CONFIGS["byt5"]
    encoder = TextEncoder(build_stack(config, random_state(config)), ByteTokenizer())
    assert encoder.encode(["ab", "c"]).hidden_states.shape == (2, 3, 64)
    assert encoder.report is None


def test_report_comes_along(encoder: TextEncoder) -> None:
    assert encoder.report is not None and encoder.report.layout == "fused"
    assert find_tokenizer_for(None).serialized() == encoder.tokenizer.serialized()


@pytest.mark.parametrize("pad_to", ["longest", "max_length"])
def test_extra_pad_has_room_behind_the_longest_prompt(pad_to: str) -> None:
    """Its row is the same in any batch, and no prompt exceeds the limit for it."""
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu")
    long, short = "a red fox on a green hill", "a cat"
    settings = {"max_length": 12, "padding": "skip", "pad_to": pad_to, "extra_pad": 1}
    both, alone = encoder.encode([short, long], **settings), encoder.encode([long], **settings)
    count = both.token_counts[1]
    assert both.attention_mask.sum(dim=1).tolist() == [tokens + 1 for tokens in both.token_counts]
    assert torch.allclose(both.hidden_states[1, : count + 1], alone.hidden_states[0, : count + 1], atol=1e-5)
    assert both.hidden_states[1, count].abs().max() > 0
    full = encoder.encode([long * 9], **settings)
    assert full.hidden_states.shape[1] == 12
