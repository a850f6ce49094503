"""An encoder with a cache gives what it gives without one, whatever was encoded or changed before."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from checkpoints import embedded_taken_apart
from conftest import needs_kernels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_loras import toy_lora

from nai_t5_core.backends.choose import why_not_int8
from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.sets import InstructionSet
from nai_t5_core.backends.quantised.packing import PackedKind
from nai_t5_core.facts.families import family_names
from nai_t5_core.float16.guard import ScaleTightenedWarning
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.model.packing import PADDING_POLICIES, PaddingPolicy
from nai_t5_core.prompts import late, loading, stack_encoding
from nai_t5_core.prompts.cache import noted_scales
from nai_t5_core.prompts.cache.store import Store
from nai_t5_core.prompts.text_encoder import PromptEmbeddings, TextEncoder
from nai_t5_core.prompts.textual_inversion import add_embeddings
from nai_t5_core.weights.convert_quantised import convert_quantised
from nai_t5_core.weights.formats import CheckpointError

PROMPTS = ["a cat", "", "two dogs play with a ball in the park, soft light, 35mm film", "a fox", "a cat"]
D_MODEL = 128


def load(cache: Any = False, **options: Any) -> TextEncoder:
    return TextEncoder.from_pretrained(
        **{"dtype": "float32", "device": "cpu", "optimize": False, "cache": cache, **options}
    )


@pytest.fixture(scope="module")
def plain() -> TextEncoder:
    return load()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the ids of every pass through an encoder."""
    seen: list[tuple[int, ...]] = []
    encode = stack_encoding.encode_guarded

    def counted(stack: Any, ids: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(tuple(ids.shape))
        return encode(stack, ids, *rest, **options)

    monkeypatch.setattr(stack_encoding, "encode_guarded", counted)
    return seen


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """To be used where an encoder must do with what is kept."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(loading, "load", refuse)
    yield


def assert_same(found: PromptEmbeddings, expected: PromptEmbeddings, exactly: bool = True) -> None:
    assert found.hidden_states.dtype == expected.hidden_states.dtype
    tolerance = 0 if exactly else 1e-5
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=0, atol=tolerance)
    assert torch.equal(found.attention_mask, expected.attention_mask)
    assert (found.token_counts, found.truncated) == (expected.token_counts, expected.truncated)
    assert found.cut_text == expected.cut_text


# ---------------------------------------------------------------------------------------------------------------------
# What comes back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", family_names())
def test_every_family_comes_back_without_the_weights(
    name: str, plain: TextEncoder, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder that another encoder has filled."""
    expected = plain.encode(PROMPTS[:3], name)
    first = load(store)
    assert_same(first.encode(PROMPTS[:3], name), expected, exactly=False)
    assert first.is_loaded
    store.wait()
    store.memory.clear()
    monkeypatch.setattr(loading, "load", None)
    again = load(store)
    assert_same(again.encode(PROMPTS[:3], name), expected, exactly=False)
    assert not again.is_loaded and store.counts.from_disk == store.counts.misses > 0


@pytest.mark.parametrize("padding", PADDING_POLICIES)
@pytest.mark.parametrize("extra_pad", [0, 1, 3])
@pytest.mark.parametrize("length", [None, 9, 40])
def test_every_padding_comes_back(
    padding: PaddingPolicy, extra_pad: int, length: int | None, plain: TextEncoder, store: Store
) -> None:
    options: dict[str, Any] = {"padding": padding, "max_length": length, "pad_to": "max_length" if length else None}
    if padding in ("skip", "trim"):
        options["extra_pad"] = extra_pad
    expected = plain.encode(PROMPTS, **options)
    encoder = load(store)
    for _ in range(2):
        assert_same(encoder.encode(PROMPTS, **options), expected, exactly=False)
    assert store.counts.misses == 4  # one of the five prompts is there twice


def test_a_plain_encoder_is_always_loaded(plain: TextEncoder) -> None:
    assert plain.is_loaded and plain.report is not None


def test_nothing_is_loaded_until_it_is_needed(store: Store) -> None:
    encoder = load(store)
    assert encoder.count(PROMPTS)[:2] == [3, 1]
    assert not encoder.is_loaded and encoder.report is None
    assert "not loaded" in repr(encoder) and "0 hits, 0 misses" in repr(encoder)
    assert encoder.stack.config.d_model == D_MODEL
    assert encoder.is_loaded and encoder.report is not None and "T5 v1.1" in repr(encoder)


def test_only_what_is_missing_is_encoded_in_one_pass_and_in_order(
    plain: TextEncoder, store: Store, passes: list[tuple[int, ...]]
) -> None:
    encoder = load(store)
    encoder.encode(["a fox", "a cat"], padding="trim")
    assert passes == [(2, 3)]
    found = encoder.encode(PROMPTS, padding="trim")
    assert [shape[0] for shape in passes] == [2, 2]  # the empty prompt and the long one
    assert_same(found, plain.encode(PROMPTS, padding="trim"), exactly=False)
    encoder.encode(list(reversed(PROMPTS)), padding="trim")
    assert len(passes) == 3  # of which one is the plain encoder's


def test_a_prompt_that_comes_twice_is_encoded_once(store: Store, passes: list[tuple[int, ...]]) -> None:
    encoder = load(store)
    out = encoder.encode(["a cat"] * 7 + ["a fox"], padding="skip")
    assert passes == [(2, 3)]
    assert all(torch.equal(states, out.hidden_states[0]) for states in out.hidden_states[:7])


def test_pads_that_are_computed_serve_who_needs_fewer(store: Store, passes: list[tuple[int, ...]]) -> None:
    encoder = load(store)
    encoder.encode(["a cat"], padding="exact", max_length=20, pad_to="max_length")
    for padding, length in (("exact", 12), ("skip", 20), ("trim", 20)):
        encoder.encode(["a cat"], padding=padding, max_length=length, pad_to="max_length")  # type: ignore[arg-type]
    assert len(passes) == 1
    encoder.encode(["a cat"], padding="exact", max_length=30, pad_to="max_length")
    assert len(passes) == 2


def test_results_are_the_callers_own(store: Store) -> None:
    encoder = load(store)
    first = encoder.encode(["a cat"]).hidden_states
    expected = first.clone()
    for _ in range(3):
        first.zero_()
        first = encoder.encode(["a cat"]).hidden_states
        assert torch.equal(first, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Texts: what is fed decides
# ---------------------------------------------------------------------------------------------------------------------

SAME_IDS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "white space": (("a  cat ", {}), ("a cat", {})),
    "cleaned": (("A CAT", {"family": "deepfloyd-if"}), ("a cat", {"family": "deepfloyd-if"})),
    "a limit that does not cut": (("a cat", {}), ("a cat", {"max_length": 10})),
    "cut to the same": (("a cat on a mat", {"max_length": 3}), ("a cat", {})),
    "pads that are not read": (("a cat", {"padding": "exact", "max_length": 9, "pad_to": "max_length"}), ("a cat", {})),
    "skipped pads": (("a cat", {"padding": "skip", "max_length": 9, "pad_to": "max_length"}), ("a cat", {})),
    "no pads to read": (("a cat", {"padding": "attend"}), ("a cat", {})),
}
OTHER_IDS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "another text": (("a cat", {}), ("a cats", {})),
    "case": (("A cat", {}), ("a cat", {})),
    "not cleaned": (("A CAT", {}), ("A CAT", {"family": "deepfloyd-if"})),
    "a limit that cuts": (("a cat on a mat", {"max_length": 3}), ("a cat on a mat", {})),
    "pads that are read": (("a cat", {"padding": "attend", "max_length": 9, "pad_to": "max_length"}), ("a cat", {})),
    "more of them": (
        ("a cat", {"padding": "attend", "max_length": 9, "pad_to": "max_length"}),
        ("a cat", {"padding": "attend", "max_length": 10, "pad_to": "max_length"}),
    ),
}


@pytest.mark.parametrize("case", [*SAME_IDS, *OTHER_IDS])
def test_what_is_fed_decides(case: str, store: Store, passes: list[tuple[int, ...]]) -> None:
    one, two = {**SAME_IDS, **OTHER_IDS}[case]
    encoder = load(store)
    for text, options in (one, two):
        encoder.encode([text], **options)
    assert len(passes) == (1 if case in SAME_IDS else 2)


def test_another_piece_of_the_tokenizer_matters_where_it_is_used(tmp_path: Path, store: Store) -> None:
    """The same weights with a tokenizer that has one word for another."""
    model = embedded_taken_apart(tmp_path / "one")
    other = shutil.copytree(model, tmp_path / "two")
    spiece = (model / "spiece.model").read_bytes()
    assert spiece.count(b"\xe2\x96\x81cat\x15") == 1  # piece, then its score
    (other / "spiece.model").write_bytes(spiece.replace(b"\xe2\x96\x81cat\x15", b"\xe2\x96\x81caq\x15"))
    one, two = (load(store, source=folder) for folder in (model, other))
    assert one.tokenizer.encode("a cat") != two.tokenizer.encode("a cat")
    assert one.tokenizer.encode("a dog") == two.tokenizer.encode("a dog")
    one.encode(["a cat", "a dog"], padding="trim")
    two.encode(["a dog"])
    assert not two.is_loaded
    assert_same(two.encode(["a cat"]), load(source=other).encode(["a cat"]), exactly=False)
    assert two.is_loaded


# ---------------------------------------------------------------------------------------------------------------------
# Changes of a loaded encoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Loras, LiveLoras])
def test_loras_that_come_and_go(kind: Any, store: Store, passes: list[tuple[int, ...]]) -> None:
    encoder, reference = load(store), load()
    style = toy_lora(encoder.stack.config, seed=1, name="style")
    other = toy_lora(encoder.stack.config, seed=2, name="other")
    loras, expected = kind(encoder), kind(reference)
    steps: list[Callable[[Any], Any]] = [
        lambda loras: None,
        lambda loras: loras.add(style, 0.8),
        lambda loras: loras.set_strength("style", 0.4),
        lambda loras: loras.add(other, 1.0),
        lambda loras: loras.remove("style"),
        lambda loras: loras.set_strength("other", 0.0),
        lambda loras: loras.clear(),
    ]
    seen = []
    for step in steps:
        step(loras), step(expected)
        found = encoder.encode(PROMPTS, padding="trim")
        assert_same(found, reference.encode(PROMPTS, padding="trim"), exactly=False)
        seen.append(found.hidden_states)
    by_cache = len(passes) - len(steps)
    assert by_cache == 5  # without LoRA it is kept: also with one of strength 0
    assert all(not torch.equal(seen[0], states) for states in seen[1:5])


@pytest.mark.parametrize("kind", [Loras, LiveLoras])
def test_loras_that_come_while_another_thread_encodes(
    kind: Any, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever asks in the middle of a change gets what is after it, and the cache goes on."""
    encoder, reference = load(store), load()
    loras, style = kind(encoder), toy_lora(encoder.stack.config, seed=1, name="style")
    encoder.encode(["a cat"])
    found: list[PromptEmbeddings] = []
    other = Thread(target=lambda: found.append(encoder.encode(["a cat"])))
    really = loras._apply

    def half_told(*arguments: Any) -> None:
        really(*arguments)
        other.start()
        other.join(0.3)

    monkeypatch.setattr(loras, "_apply", half_told)
    loras.add(style, 0.8)
    other.join()
    kind(reference).add(style, 0.8)
    expected = reference.encode(["a cat"])
    hits = store.counts.hits
    assert_same(encoder.encode(["a cat"]), expected)
    assert_same(found[0], expected)
    assert store.counts.hits == hits + 1 and caplog.messages == []


@pytest.mark.parametrize("strengths", [[0.8], [0.4], [0.8, 1.0]])
def test_loras_of_loading_are_in_the_key(strengths: list[float], store: Store, plain: TextEncoder) -> None:
    config = plain.stack.config
    loras = [(toy_lora(config, seed=number), strength) for number, strength in enumerate(strengths)]
    load(store).encode(["a cat"])
    with_loras = load(store, loras=loras)
    assert_same(with_loras.encode(["a cat"]), load(loras=loras).encode(["a cat"]))
    assert with_loras.is_loaded
    again = load(store, loras=[*loras, (toy_lora(config, seed=9), 0.0)])
    assert_same(again.encode(["a cat"]), with_loras.encode(["a cat"]))
    assert not again.is_loaded


def test_merged_while_loading_and_after_it_are_the_same(store: Store, plain: TextEncoder) -> None:
    lora = toy_lora(plain.stack.config)
    load(store, loras=[(lora, 0.7)]).encode(["a cat"])
    encoder = load(store)
    loras = Loras(encoder)
    loras.add(lora, 0.7)
    hits = store.counts.hits
    encoder.encode(["a cat"])
    assert store.counts.hits == hits + 1


@pytest.mark.parametrize("kind", [None, "int8", "q8_0"])
def test_words_of_textual_inversion(
    kind: PackedKind | None, tmp_path: Path, store: Store, passes: list[tuple[int, ...]]
) -> None:
    """Also where the table of embeddings is quantised."""
    source = None if kind is None else convert_quantised(None, tmp_path / "t5.safetensors", kind, encoder_only=True).out
    prompts = ["a photo of <mine>", "a cat"]
    results = []
    load(store, source=source).encode(["a cat"])
    for seed in (1, 2, 1):
        encoder, reference = load(store, source=source), load(source=source)
        for one in (encoder, reference):
            vectors = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(seed))
            add_embeddings(one, vectors, "<mine>")
        found = encoder.encode(prompts, padding="trim")
        assert_same(found, reference.encode(prompts, padding="trim"), exactly=False)
        results.append(found.hidden_states[0])
    assert not torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    # The prompt without the word is kept whatever the word is; the third time, both are.
    assert passes == [(1, 3), (1, 6), (2, 6), (1, 6), (2, 6), (2, 6)]


def _write(encoder: TextEncoder) -> None:
    weight: Any = encoder.stack.encoder.block[1].layer[0].SelfAttention.o.weight
    with torch.no_grad():
        weight.mul_(1.5)


def _replace_weight(encoder: TextEncoder) -> None:
    projection: Any = encoder.stack.encoder.block[1].layer[0].SelfAttention.o
    projection.weight = nn.Parameter(projection.weight.detach() * 1.5)


def _replace_module(encoder: TextEncoder) -> None:
    attention: Any = encoder.stack.encoder.block[1].layer[0].SelfAttention
    attention.o = nn.Linear(D_MODEL, D_MODEL, bias=False)


def _hook(encoder: TextEncoder) -> None:
    feed_forward: Any = encoder.stack.encoder.block[0].layer[1]
    feed_forward.register_forward_hook(lambda module, inputs, out: out * 1.5)


def _load_others(encoder: TextEncoder) -> None:
    state = {name: tensor * 1.1 for name, tensor in encoder.stack.state_dict().items()}
    encoder.stack.load_state_dict(state)


def _cast(encoder: TextEncoder) -> None:
    encoder.stack.to(torch.float64)


UNKNOWN = [_write, _replace_weight, _replace_module, _hook, _load_others, _cast]


@pytest.mark.parametrize("change", UNKNOWN)
@pytest.mark.parametrize("before", ["", "LoRA before", "LoRA after"])
def test_a_change_that_is_not_told_ends_the_cache(
    change: Callable[[TextEncoder], None], before: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load(store)
    encoder.encode(["a cat"])
    lora = toy_lora(encoder.stack.config, targets=("q",))
    loras = Loras(encoder)
    if before == "LoRA before":
        loras.add(lora)
        encoder.encode(["a cat"])
    change(encoder)
    if before == "LoRA after":
        loras.add(lora)
    kept = len(store.memory)
    for _ in range(2):
        found = encoder.encode(["a cat"]).hidden_states
        expected = TextEncoder(encoder.stack, encoder.tokenizer).encode(["a cat"]).hidden_states
        assert torch.equal(found, expected)
    assert len(store.memory) == kept
    assert [message for message in caplog.messages if "does not know" in message] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scales are noted for the next process."""
    monkeypatch.setattr(noted_scales, "cache_folder", lambda: tmp_path / "notes")
    return tmp_path / "notes"


def test_scales_that_were_tightened_are_in_the_key(tmp_path: Path, store: Store, notes: Path) -> None:
    """What was computed with the scales from before is not given out for those after, nor the other way."""
    options = {"source": _overflowing(tmp_path / "model"), "dtype": "float16"}
    encoder = load(store, **options)
    with pytest.warns(ScaleTightenedWarning):
        first = encoder.encode(["a cat"])
    kept = encoder.encode(["a cat"])
    assert_same(kept, first)
    hits = store.counts.hits
    assert_same(encoder.encode(["a cat"]), kept)
    assert store.counts.hits == hits + 1
    told = load(store, scales=encoder.stack.scales, **options)
    assert_same(told.encode(["a cat"]), kept)
    assert not told.is_loaded
    for note in notes.rglob("*.json"):
        note.write_text("{}")
    again = load(store, **options)
    with pytest.warns(ScaleTightenedWarning):
        again.encode(["a cat"])


def test_the_next_process_begins_with_scales_that_were_tightened(tmp_path: Path, store: Store, notes: Path) -> None:
    options = {"source": _overflowing(tmp_path / "model"), "dtype": "float16"}
    encoder = load(store, **options)
    with pytest.warns(ScaleTightenedWarning):
        encoder.encode(["a cat"])
    kept = encoder.encode(["a cat"])
    again = load(store, **options)
    assert_same(again.encode(["a cat"]), kept)
    assert not again.is_loaded and len(list(notes.rglob("*.json"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScaleTightenedWarning)
        assert_same(again.encode(["a dog"]), encoder.encode(["a dog"]))
    assert again.stack.scales == encoder.stack.scales


def _overflowing(folder: Path) -> Path:
    """The embedded model with a feed-forward beyond float16."""
    model = embedded_taken_apart(folder)
    state = load_file(model / "model.safetensors")
    for name in state:
        if name.endswith(("block.1.layer.1.DenseReluDense.wo.weight", "block.1.layer.1.DenseReluDense.wi_1.weight")):
            state[name] = state[name] * 500
    save_file(state, model / "model.safetensors")
    return model


@pytest.mark.filterwarnings("ignore:float16 is exact enough")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"layout": "separate"}, {"quantize": "int8"}], ids=str)
def test_dtypes_and_backends_do_not_mix(dtype: str, options: dict[str, Any], store: Store) -> None:
    def one(cache: Any, **others: Any) -> TextEncoder:
        return load(cache, **{"dtype": dtype, **options, **others})

    if "quantize" in options and (dtype == "float16" or why_not_int8(load(dtype=dtype).stack)):
        pytest.skip("no 8 bits here")
    for other in ("float32", "bfloat16", "float16"):
        if other != dtype:
            load(store, dtype=other).encode(["a cat"])
    load(store, dtype=dtype, **({"layout": "separate"} if options.get("layout") != "separate" else {})).encode(
        ["a cat"]
    )
    expected = one(False).encode(["a cat"])
    first = one(store)
    assert_same(first.encode(["a cat"]), expected)
    assert first.is_loaded
    again = one(store)
    assert_same(again.encode(["a cat"]), expected)
    assert not again.is_loaded


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_that_was_changed_meanwhile_is_not_loaded_for_its_old_key(tmp_path: Path, store: Store) -> None:
    model = embedded_taken_apart(tmp_path / "model")
    load(store, source=model).encode(["a cat"])
    encoder = load(store, source=model)
    other = embedded_taken_apart(tmp_path / "other") / "model.safetensors"
    shutil.copy(other, model / "model.safetensors")
    encoder.encode(["a cat"])  # kept, and right for the weights that were there
    with pytest.raises(CheckpointError, match="changed after the cache had looked at it; make the encoder again"):
        encoder.encode(["a dog"])
    assert_same(load(store, source=model).encode(["a dog"]), load(source=other.parent).encode(["a dog"]))


def test_a_file_that_was_changed_while_it_was_hashed_is_not_loaded(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = embedded_taken_apart(tmp_path / "model")
    really = late.settings_for

    def changing(*arguments: Any, **options: Any) -> Any:
        found = really(*arguments, **options)
        embedded_taken_apart(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", model / "model.safetensors")
        return found

    monkeypatch.setattr(late, "settings_for", changing)
    encoder = load(store, source=model)
    with pytest.raises(CheckpointError, match="changed after the cache had looked at it"):
        encoder.encode(["a cat"])
    assert len(store.memory) == 0


def test_another_file_that_came_into_the_folder_is_not_loaded(tmp_path: Path, store: Store) -> None:
    """For the key of the one that was there."""
    model = embedded_taken_apart(tmp_path / "model")
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(tmp_path / "later.safetensors")
    torch.save(state, model / "pytorch_model.bin")
    encoder = load(store, source=model)
    (tmp_path / "later.safetensors").rename(model / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed after the cache had looked at it"):
        encoder.encode(["a cat"])


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cache": 3}, "cache=3; give True"),
        ({"cache": None}, "cache=None; give True"),
        ({"layout": "round"}, "unknown layout"),
        ({"attention": "none"}, "unknown attention"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"quantize": "int2"}, "quantize='int2'"),
        ({"quantize": "int8", "compile": True}, "exclude each other"),
        ({"source": "/nowhere/t5.safetensors"}, "does not exist"),
        ({"scales": "/nowhere/scales.json"}, "scales.json"),
        ({"loras": [("/nowhere/lora.safetensors", 1.0)]}, "does not exist"),
        ({"token_budget": 0}, "token_budget"),
        ({"tokenizer": "/nowhere/spiece.model"}, "spiece.model"),
    ],
    ids=str,
)
def test_what_loading_refuses_is_refused_before_it(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=told):
        load(**{"cache": tmp_path, **options})


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_lora_for_another_t5_is_refused_before_loading(tmp_path: Path, plain: TextEncoder) -> None:
    config = plain.stack.config.model_copy(update={"d_model": 64})
    with pytest.raises(ValueError, match="is for another T5"):
        load(tmp_path, loras=[(toy_lora(config), 1.0)])


def test_weights_without_a_tokenizer_are_refused_before_loading(tmp_path: Path) -> None:
    model = embedded_taken_apart(tmp_path / "model")
    (model / "spiece.model").unlink()
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        load(tmp_path / "store", source=model)


def test_a_folder_that_is_a_file_costs_nothing(tmp_path: Path, plain: TextEncoder) -> None:
    (tmp_path / "file").write_text("in the way")
    encoder = load(tmp_path / "file")
    for _ in range(2):
        assert_same(encoder.encode(PROMPTS), plain.encode(PROMPTS), exactly=False)


def test_threads_load_once(store: Store, plain: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, loads, results = load(store), [], {}
    really = loading.load
    monkeypatch.setattr(loading, "load", lambda *given: loads.append(1) or really(*given))
    threads = [
        Thread(target=lambda number=number: results.update({number: encoder.encode(PROMPTS, padding="trim")}))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = plain.encode(PROMPTS, padding="trim")
    assert len(loads) == 1 and len(results) == 6
    for found in results.values():
        assert_same(found, expected, exactly=False)


def test_a_warning_of_loading_is_given_once_at_most(store: Store) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        load(store).encode(["a cat"])
    assert caught == []


@needs_kernels
@pytest.mark.parametrize("is_quantised", [False, True])
def test_kernels_that_cannot_be_built_are_not_in_the_key(
    is_quantised: bool, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch computed in their place is not given where they can be: the first miss finds out, and is not kept."""
    source = tmp_path / "quantised.safetensors" if is_quantised else None
    if source is not None:
        convert_quantised(None, source, "int8")

    def fails(instructions: InstructionSet) -> Any:
        raise RuntimeError("the compiler failed")

    with monkeypatch.context() as without:
        without.setattr(build, "library", fails)
        without.setattr(build, "_failures", {})
        encoder = load(store, source=source)
        expected: Any = encoder._encoding
        before = expected.settings
        found = [encoder.encode(["a cat"]).hidden_states for _ in range(3)]
        assert expected.settings != before and "kernels" in before.backend
        assert (store.counts.misses, store.counts.hits) == (2, 1) and torch.equal(found[0], found[2])
    again = load(store, source=source)
    again.encode(["a cat"])
    assert store.counts.misses == 3
