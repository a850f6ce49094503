"""Newer ComfyUI's dynamic memory, its default on NVIDIA, on a CPU: see ``dynamic_memory.py``.

The kernels for CUDA run in Triton's interpreter, where that is chosen: ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import write_file
from comfy_toys import PILE, UMT5, V1_0, V1_1, conditioning, error, stock, toy_family, toy_file, toy_lora, toy_state
from dynamic_memory import (
    CARD,
    PAGE,
    Library,
    PagedLibrary,
    as_of_files,
    replace_library,
    require_dynamic_memory,
    use_dynamic_memory,
)

from comfy_nai_t5.choices import Settings
from nai_t5_core.facts.config import T5Config
from nai_t5_core.float16.guard import ScaleTightenedWarning

require_dynamic_memory()

# So large that ComfyUI brings the weights in as they are used, and so small that this takes no time.
_LARGER = {"d_model": 128, "d_kv": 32, "d_ff": 192, "num_layers": 2}
FAMILIES = {
    "pixart": V1_1.model_copy(update=_LARGER),
    "mochi": V1_1.model_copy(update=_LARGER),
    "cosmos": V1_0.model_copy(update=_LARGER),
    "stable_audio": V1_0.model_copy(update=_LARGER),
    "wan": UMT5.model_copy(update=_LARGER),
    "auraflow": PILE.model_copy(update=_LARGER),
}
TEXT = "a (cat:1.2) on a mat"
JOINED = "fused layout in ComfyUI's dynamic memory"
# Of float16 and of float32 activations.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3}
ATTENTION, DENSE = "encoder.block.{}.layer.0.SelfAttention.{}", "encoder.block.{}.layer.1.DenseReluDense.{}"
EVERYWHERE = (
    *(ATTENTION.format(1, name) for name in "qkvo"),
    *(DENSE.format(0, name) for name in ("wi_0", "wi_1", "wo")),
    ATTENTION.format(0, "k"),
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[PagedLibrary]:
    """Dynamic memory, empty and with room for all."""
    found = PagedLibrary()
    use_dynamic_memory(monkeypatch, found)
    yield found
    assert found.pinned == 0


@pytest.fixture(params=["torch", "kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes between the products; the kernels compute in float16 alone."""
    if request.param == "kernels":
        refusals = pytest.importorskip("nai_t5_core.backends.cuda.device_refusals")
        if refusals.missing_triton() or not refusals.is_interpreted():
            pytest.skip("the kernels run here in Triton's interpreter: pip install triton, and set TRITON_INTERPRET=1")
        monkeypatch.setattr("comfy_nai_t5.stack.refuses_cuda_layers", lambda *_: None)
    return str(request.param)


@pytest.fixture(params=["float32", "float16"])
def settings(request: pytest.FixtureRequest, way: str) -> Settings:
    """Where it is an error if a layer is not joined."""
    if way == "kernels" and request.param == "float32":
        pytest.skip("the kernels for CUDA compute in half precision")
    return Settings(request.param, layout="fused")


class Pair:
    """A file in dynamic memory, by ComfyUI's modules and by ours, and what ComfyUI makes of it without that memory."""

    def __init__(
        self,
        folder: Path,
        family: str,
        settings: Settings,
        dtype: torch.dtype = torch.float32,
        config: T5Config | None = None,
    ) -> None:
        from comfy_nai_t5.checkpoint import read_checkpoint
        from comfy_nai_t5.loaders import stock_clip

        state = toy_state(config or FAMILIES[family])
        state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}
        path = write_file(folder / "toy.safetensors", state)
        options: dict[str, Any] = {"load_device": CARD, "offload_device": torch.device("cpu")}
        self.plain = stock_clip(read_checkpoint(path), toy_family(family), disable_dynamic=True)
        self.theirs = stock_clip(read_checkpoint(path), toy_family(family), **options)
        as_of_files(self.theirs.cond_stage_model)
        self.ours = ours_of(self.theirs, settings)
        self.tolerance = TOLERANCES[settings.dtype]

    @property
    def t5(self) -> Any:
        return t5_of(self.theirs)

    def compare(self, change: Callable[[Any], Any] = lambda clip: clip) -> torch.Tensor:
        """Ours against stock, both changed alike; returns what stock makes."""
        expected = encoded(change(self.plain))
        changed = change(self.ours)
        for _ in range(3):  # weights are brought in, are found to be side by side, and are known to be
            assert error(encoded(changed), expected) < self.tolerance
        return expected


def encoded(clip: Any) -> torch.Tensor:
    """What a CLIP makes of the text; after it, and after an error too, no page is pinned."""
    from comfy_aimdo import control

    try:
        hidden: torch.Tensor = conditioning(clip, TEXT)["cond"]
    finally:
        assert control.lib.pinned == 0
    return hidden


def ours_of(theirs: Any, settings: Settings) -> Any:
    from comfy_nai_t5.clip import with_our_t5

    return with_our_t5(theirs, settings)


def t5_of(clip: Any) -> Any:
    from comfy_nai_t5.clip import t5_models

    (owner,) = t5_models(clip.cond_stage_model).values()
    return owner.transformer


def with_lora(clip: Any, lora: dict[str, torch.Tensor], strength: float) -> Any:
    import comfy.sd

    return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]


def slot_of(clip: Any) -> str:
    from comfy_nai_t5.clip import t5_models

    (slot,) = t5_models(clip.cond_stage_model)
    return slot


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, settings: Settings, library: PagedLibrary, tmp_path: Path) -> None:
    from comfy_nai_t5.clip import describe

    pair = Pair(tmp_path, family, settings)
    pair.compare()
    assert JOINED in describe(pair.ours)
    assert t5_of(pair.ours).stack.told.startswith(JOINED)


@pytest.mark.parametrize("family", ["pixart", "cosmos"])
def test_a_layer_asks_for_pages_four_times(family: str, library: PagedLibrary, tmp_path: Path) -> None:
    """For q, k and v, for o, for gate and up or the only one, and for wo."""
    pair = Pair(tmp_path, family, Settings("float32", layout="fused"))
    pair.compare()
    library.faults.clear()
    encoded(pair.ours)
    del library.faults[pair.t5.shared.weight.nbytes]
    assert library.faults.total() == 4 * FAMILIES[family].num_layers


def test_a_page_stays_while_it_has_pins(library: PagedLibrary) -> None:
    """As with comfy-aimdo: each fault pins its pages once more."""
    from comfy_aimdo import model_vbar

    memory = model_vbar.ModelVBAR(4 * PAGE, 0)
    place = memory.alloc(PAGE)
    for _ in range(2):
        assert model_vbar.vbar_fault(place) is not None
    model_vbar.vbar_unpin(place)
    assert memory.free_memory(4 * PAGE) == 0
    assert (library.there, library.pinned) == (1, 1)
    model_vbar.vbar_unpin(place)
    assert (library.there, library.pinned) == (0, 0)
    with pytest.raises(AssertionError, match="page 0 is given back more often than it was found"):
        model_vbar.vbar_unpin(place)


@pytest.mark.parametrize("before", ["taken back", "there", "known to be there"])
def test_nothing_is_pinned_after_a_fault_that_fails(before: str, library: PagedLibrary, tmp_path: Path) -> None:
    """Whichever of an encode it is."""
    settings = Settings("float32", layout="fused")
    pair = Pair(tmp_path, "pixart", settings)
    pair.compare()

    def prepared() -> Any:
        ours = ours_of(pair.theirs, settings)
        if before == "taken back":
            ours.patcher.partially_unload(None, library.there * PAGE)
        if before == "known to be there":
            encoded(ours)
        library.faults.clear()
        return ours

    encoded(prepared())
    asked = library.faults.total()
    # Groups are asked for, and each weight of what is not known to be there; where the first was taken back, all are
    # brought in one by one.
    per_layer = {"taken back": 2 * 2 + 7, "there": 4 + 5, "known to be there": 4}[before]
    assert asked - library.faults[pair.t5.shared.weight.nbytes] == per_layer * FAMILIES["pixart"].num_layers
    for left in range(asked):
        ours = prepared()
        library.faults_left = left
        with pytest.raises(RuntimeError, match="Fault failed: 2"):
            encoded(ours)
        library.faults_left = None
    pair.compare()


@pytest.mark.parametrize("function", ["comfy_nai_t5.pages._product", "comfy_aimdo.torch.aimdo_to_tensor"])
def test_nothing_is_pinned_after_an_error_of_a_product(
    function: str, library: PagedLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("not in this test")

    settings = Settings("float32", layout="fused")
    pair = Pair(tmp_path, "pixart", settings)
    expected = pair.compare()
    ours = ours_of(pair.theirs, settings)
    with monkeypatch.context() as patched:
        patched.setattr(function, fail)
        with pytest.raises(RuntimeError, match="not in this test"):
            encoded(ours)
    assert error(encoded(ours), expected) < pair.tolerance


def test_no_more_memory_than_stock_takes(library: PagedLibrary, tmp_path: Path) -> None:
    settings = Settings("float32", layout="fused")
    pair = Pair(tmp_path, "pixart", settings)
    encoded(pair.theirs)
    by_stock = library.there
    pair.compare()
    assert library.there == by_stock
    assert pair.theirs.patcher.loaded_size() == pair.ours.patcher.loaded_size()
    assert len(library.ranges) == 1


def test_the_comparison_on_a_card(library: PagedLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card that is slow when stock computes, and gives 3 MB for everything."""
    import timing_card

    def toy(path: Path, family: str) -> Any:
        from comfy_nai_t5.checkpoint import read_checkpoint
        from comfy_nai_t5.loaders import stock_clip

        options: dict[str, Any] = {"load_device": CARD, "offload_device": torch.device("cpu")}
        clip = stock_clip(read_checkpoint(path), toy_family(family), **options)
        as_of_files(clip.cond_stage_model)
        return clip

    monkeypatch.setattr(timing_card, "start_dynamic_memory", lambda: None)
    monkeypatch.setattr(timing_card, "stock", toy)
    monkeypatch.setattr(timing_card, "toy_lora", lambda t5, keys, prefix: toy_lora(t5, EVERYWHERE, prefix))
    answers = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1,
        "max_memory_allocated": 3000001,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    # Two readings of the clock for each encode; by stock, by modules, joined.
    ticks = iter([tick for _ in range(4) for seconds in (0.5, 0.4, 0.2) for tick in (0.0, seconds)])
    monkeypatch.setattr(timing_card, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    *rows, nothing, reached = timing_card.time_on_card(FAMILIES["pixart"], tmp_path, 1)
    assert len(rows) == 2 * 2 * 3 and nothing == ""
    assert all(row.count("|") == len(timing_card.HEAD) + 1 for row in rows)
    assert rows[0].startswith("| short | stock | 500.00 ms | 1.00× | 0.0e+00 | ") and "| 3 MB |" in rows[0]
    assert rows[-1].startswith("| long, with a LoRA | joined | 200.00 ms | 2.50× | ") and JOINED in rows[-1]
    assert "it is 2.50 times as fast at least, and takes 3 MB beside the weights where stock takes 3." in reached


@pytest.mark.parametrize("keys", [EVERYWHERE, *((key,) for key in EVERYWHERE[:6])], ids=lambda keys: keys[-1])
def test_lora(keys: tuple[str, ...], settings: Settings, library: PagedLibrary, tmp_path: Path) -> None:
    pair = Pair(tmp_path, "pixart", settings)
    lora = toy_lora(pair.t5, keys, slot_of(pair.theirs))
    before = pair.compare()
    changed = pair.compare(lambda clip: with_lora(clip, lora, 0.8))
    assert error(changed, before) > 1e-3
    # In other strengths, and without it again, from the same weights.
    pair.compare(lambda clip: with_lora(clip, lora, -0.5))
    pair.compare()


def test_lora_on_a_float16_file(library: PagedLibrary, way: str, tmp_path: Path) -> None:
    """ComfyUI rounds what it keeps in pages to the file's dtype."""
    pair = Pair(tmp_path, "pixart", Settings("float16", layout="fused"), torch.float16)
    lora = toy_lora(pair.t5, EVERYWHERE, slot_of(pair.theirs))
    pair.tolerance = 5e-3
    pair.compare(lambda clip: with_lora(clip, lora, 0.8))


def test_a_float8_file(library: PagedLibrary, settings: Settings, tmp_path: Path) -> None:
    """Without scales: pages hold what the file holds, and weights are cast together, for one product."""
    config = V1_1.model_copy(update={"d_model": 256, "d_kv": 32, "d_ff": 256, "num_layers": 2})
    pair = Pair(tmp_path, "pixart", settings, torch.float8_e4m3fn, config)
    pair.compare()
    assert t5_of(pair.ours).stack.told.startswith(JOINED)
    weights = sum(module.weight.nbytes for module in pair.t5.modules() if "_v" in vars(module))
    assert library.there <= -(-weights // PAGE)
    lora = toy_lora(pair.t5, EVERYWHERE, slot_of(pair.theirs))
    encoded(with_lora(pair.ours, lora, 0.8))
    assert library.there <= -(-weights // PAGE)


def test_weights_that_are_taken_back_come_again(library: PagedLibrary, settings: Settings, tmp_path: Path) -> None:
    pair = Pair(tmp_path, "pixart", settings)
    pair.compare()
    for share in (0.3, 0.9, 1):
        pair.ours.patcher.partially_unload(None, int(share * library.there * PAGE))
        pair.compare()
    pair.ours.patcher.detach()
    assert library.there == 0
    pair.compare()


@pytest.mark.parametrize("share", [0.15, 0.5, 0.98])
def test_less_room_than_the_weights_need(
    share: float, settings: Settings, library: PagedLibrary, tmp_path: Path
) -> None:
    pair = Pair(tmp_path, "pixart", settings)
    pair.compare()
    most = int(library.there * share)
    pair.ours.patcher.partially_unload(None, library.there * PAGE)
    library.most = most
    pair.compare()
    assert 0 < library.there <= most


def test_stock_and_ours_in_turn(library: PagedLibrary, settings: Settings, tmp_path: Path) -> None:
    """They share modules: what one has brought in serves the other, and where it lies changes but once."""
    pair = Pair(tmp_path, "pixart", settings)
    expected = encoded(pair.theirs)
    pair.compare()
    places = [module._v for module in pair.t5.modules() if "_v" in vars(module)]
    for _ in range(2):
        assert error(encoded(pair.theirs), expected) < 1e-6
        pair.compare()
    assert [module._v for module in pair.t5.modules() if "_v" in vars(module)] == places
    assert places[0][0].offset <= sum(size for *_, size in places) + 1024


def test_modules_with_hooks_are_called(library: PagedLibrary, tmp_path: Path) -> None:
    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    seen: list[int] = []
    hook = pair.t5.encoder.block[1].layer[0].SelfAttention.k.register_forward_hook(lambda *_: seen.append(1))
    pair.compare()
    assert len(seen) == 3
    told = t5_of(pair.ours).stack.told
    assert told == f"{JOINED} but for 1 of 2 layers: other software has hooked into its modules"
    hook.remove()
    pair.compare()
    assert t5_of(pair.ours).stack.told == JOINED


def test_separate_is_what_it_was(library: PagedLibrary, tmp_path: Path) -> None:
    pair = Pair(tmp_path, "pixart", Settings("float32", layout="separate"))
    pair.compare()
    library.faults.clear()
    encoded(pair.ours)
    del library.faults[pair.t5.shared.weight.nbytes]
    assert library.faults.total() == 7 * 2


def test_float16_beyond_its_range(library: PagedLibrary, way: str, tmp_path: Path) -> None:
    """Scales are tightened once; they act on what goes into products, and so the weights stay where they lie."""
    pair = Pair(tmp_path, "pixart", Settings("float16", layout="fused"))
    for clip in (pair.plain, pair.theirs):
        t5_of(clip).encoder.block[1].layer[1].DenseReluDense.wo.weight.data.mul_(1e5)
    with pytest.warns(ScaleTightenedWarning):
        pair.compare()
    pair.compare()
    assert t5_of(pair.ours).stack.scales.layers[1].feed_forward_out < 1
    assert "vbar_free" not in library.freed


def test_weights_that_cannot_lie_side_by_side(library: PagedLibrary, tmp_path: Path) -> None:
    """Weights of no whole kilobytes would have something between them."""
    config = V1_1.model_copy(update={"d_model": 100, "d_kv": 20, "d_ff": 180, "num_layers": 2})
    pair = Pair(tmp_path, "pixart", Settings("float32"), config=config)
    pair.compare()
    told = t5_of(pair.ours).stack.told
    assert told == "separate layout: its weights cannot lie side by side in ComfyUI's dynamic memory"
    with pytest.raises(ValueError, match=r"cannot run in the fused layout.*dynamic memory"):
        encoded(ours_of(pair.theirs, Settings("float32", layout="fused")))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_layout_is_told(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comfy_nai_t5.clip import describe

    theirs = stock(toy_file(tmp_path, FAMILIES["mochi"]), "mochi")
    ours = ours_of(theirs, Settings("float32", compile=compiled))
    monkeypatch.setattr(ours.patcher, "is_dynamic", lambda: True, raising=False)
    reason = "; not compiled, which needs every layer joined, and its weights to stay where they are"
    assert describe(ours).endswith(JOINED + (reason if compiled else ""))


def test_the_guard_frees_nothing_that_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying a module would copy its handles of memory, which is freed with the copy."""
    from comfy_aimdo.host_buffer import HostBuffer
    from comfy_aimdo.model_vbar import ModelVBAR

    library = Library()
    replace_library(monkeypatch, library)
    theirs = stock(toy_file(tmp_path, V1_1), "mochi")
    memory = ModelVBAR(1 << 30, 0)
    pinned = {"weights": (HostBuffer(0, 0, 0), [], [-1], [0], [0], {})}
    for module in theirs.cond_stage_model.modules():
        if isinstance(module, torch.nn.Linear):
            module._v, module._pin_state = memory.alloc(4096), pinned
    dense = theirs.cond_stage_model.t5xxl.transformer.encoder.block[1].layer[1].DenseReluDense
    dense.wo.weight.data.mul_(1e5)
    ours = ours_of(theirs, Settings("float16"))
    with pytest.warns(ScaleTightenedWarning):
        assert conditioning(ours, "a cat")["cond"].isfinite().all()
    gc.collect()
    assert library.freed == []
    del ours, theirs, module, dense, memory, pinned
    gc.collect()
    assert "vbar_free" in library.freed, "what is in use no longer has to be freed"


# ---------------------------------------------------------------------------------------------------------------------
# When a model is prepared
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(library: PagedLibrary, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The patchers by which ComfyUI has prepared a model, one after the other."""
    from comfy.model_patcher import ModelPatcherDynamic

    by: list[Any] = []
    load = ModelPatcherDynamic.load

    def noted(patcher: Any, *arguments: Any, **options: Any) -> Any:
        by.append(patcher)
        return load(patcher, *arguments, **options)

    monkeypatch.setattr(ModelPatcherDynamic, "load", noted)
    return by


def test_a_model_is_prepared_once(prepared: list[Any], library: PagedLibrary, tmp_path: Path) -> None:
    """Stock prepares it before every encode."""
    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    pair.compare()
    assert prepared == [pair.ours.patcher]
    for _ in range(2):
        encoded(pair.theirs)
    assert prepared == [pair.ours.patcher, pair.theirs.patcher, pair.theirs.patcher]


def test_what_comfyui_sets_for_every_use_is_set(prepared: list[Any], library: PagedLibrary, tmp_path: Path) -> None:
    """Pins are active, and all pages may be brought in."""
    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    pins = pair.ours.patcher.model.dynamic_pins[CARD]
    pins["active"], pins["failed"] = False, True  # as after a prompt, and after memory that could not be pinned
    pair.ours.patcher.partially_unload(None, PAGE)
    (pages,) = library.ranges
    assert pages.watermark < len(pages.are_there)
    encoded(pair.ours)
    assert len(prepared) == 1 and pins["active"] and not pins["failed"]
    assert pages.watermark == len(pages.are_there)


def test_patches_and_other_users_have_it_prepared_anew(prepared: list[Any], tmp_path: Path) -> None:
    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    lora = toy_lora(pair.t5, EVERYWHERE, slot_of(pair.theirs))
    changed = with_lora(pair.ours, lora, 0.8)
    assert type(changed.patcher) is type(pair.ours.patcher)
    expected = encoded(with_lora(pair.plain, lora, 0.8))
    for clip, known in ((changed, True), (pair.ours, False), (changed, False), (pair.theirs, False)):
        before = len(prepared)
        found = [encoded(clip) for _ in range(2)]
        assert prepared[before:] == [clip.patcher] * (2 if clip is pair.theirs else 1), known
        assert error(found[0], found[1]) < 1e-6
        assert (error(found[1], expected) < pair.tolerance) == (clip is changed)
    before = len(prepared)
    pair.compare()
    assert prepared[before:] == [pair.ours.patcher]


@pytest.mark.parametrize("change", ["part of it", "all", "detached", "another place", "another weight"])
def test_what_is_no_longer_there_has_it_prepared_anew(change: str, prepared: list[Any], tmp_path: Path) -> None:
    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    linear: Any = pair.t5.encoder.block[0].layer[0].SelfAttention.o
    if change == "part of it":
        pair.ours.patcher.partially_unload(None, PAGE)  # pages come again by themselves
    elif change == "all":
        pair.ours.patcher.partially_unload(None, 1e32)
    elif change == "detached":
        pair.ours.patcher.detach()
    elif change == "another place":
        del linear._v
        linear._v_signature = None
    else:
        linear.weight = type(linear.weight)(linear.weight.detach().clone(), requires_grad=False)
    pair.compare()
    assert len(prepared) == (1 if change == "part of it" else 2)


def test_hooks_and_those_who_want_to_know_have_it_prepared_every_time(prepared: list[Any], tmp_path: Path) -> None:
    from comfy.patcher_extension import CallbacksMP

    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    told: list[Any] = []
    pair.ours.patcher.add_callback(CallbacksMP.ON_LOAD, lambda *given: told.append(given))
    for _ in range(3):
        encoded(pair.ours)
    assert len(prepared) == 4 and len(told) == 3
    pair.ours.patcher.callbacks[CallbacksMP.ON_LOAD].clear()
    pair.ours.patcher.add_callback(CallbacksMP.ON_APPLY_HOOKS, lambda *given: told.append(given))
    encoded(pair.ours)
    assert len(prepared) == 5 and len(told) == 4
    pair.ours.patcher.callbacks[CallbacksMP.ON_APPLY_HOOKS].clear()
    handle = pair.t5.encoder.block[0].register_forward_hook(lambda *_: None)
    for _ in range(3):
        encoded(pair.ours)
    assert len(prepared) == 8
    handle.remove()
    for _ in range(3):
        encoded(pair.ours)
    assert len(prepared) == 8


@pytest.mark.parametrize("layout", ["fused", "separate"])
def test_after_an_error_it_is_prepared_anew(
    layout: str, prepared: list[Any], library: PagedLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the patching of a weight fails: it may lie there unpatched, known as one that is there."""
    import comfy.lora

    calculate_weight = comfy.lora.calculate_weight
    left: Any = iter(())

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(left, None) == 0:
            raise torch.OutOfMemoryError("there is no room for this patch")
        return calculate_weight(*arguments, **options)

    monkeypatch.setattr(comfy.lora, "calculate_weight", failing)
    pair = Pair(tmp_path, "pixart", Settings("float32", layout=layout))
    lora = toy_lora(pair.t5, EVERYWHERE, slot_of(pair.theirs))
    expected = encoded(with_lora(pair.plain, lora, 0.8))
    clip = with_lora(pair.ours, lora, 0.8)
    for number in range(len(EVERYWHERE)):
        clip.patcher.detach()
        left = iter(range(number, -1, -1))
        with pytest.raises(torch.OutOfMemoryError):
            conditioning(clip, TEXT)
        for pages in library.ranges:  # what ComfyUI leaves pinned in this case
            pages.pins = [0] * len(pages.pins)
        before = len(prepared)
        assert error(encoded(clip), expected) < pair.tolerance
        assert error(encoded(clip), expected) < pair.tolerance
        assert prepared[before:] == [clip.patcher]


def test_who_does_not_say_that_it_has_served_has_it_prepared_every_time(prepared: list[Any], tmp_path: Path) -> None:
    pair = Pair(tmp_path, "pixart", Settings("float32"))
    for _ in range(3):
        pair.ours.load_model()
    assert len(prepared) == 3


@pytest.mark.parametrize("change", ["a patch", "its load"])
def test_what_comfyui_does_not_count_as_a_change_is_one(
    change: str, prepared: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.model_patcher import ModelPatcherDynamic

    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    if change == "a patch":
        changed = with_lora(pair.ours, toy_lora(pair.t5, EVERYWHERE[:1], slot_of(pair.theirs)), 0.8)
        pair.ours.patcher.patches.update(changed.patcher.patches)
    else:
        load = ModelPatcherDynamic.load
        monkeypatch.setattr(ModelPatcherDynamic, "load", lambda *given, **how: load(*given, **how))
    encoded(pair.ours)
    assert len(prepared) == 2


def test_no_weight_is_kept_alive(tmp_path: Path, library: PagedLibrary) -> None:
    """Copies of small weights on the card, of a patcher after which another has prepared the model."""
    pair = Pair(tmp_path, "pixart", Settings("float32"))
    pair.compare()
    norms = [weakref.ref(block.layer[0].layer_norm.weight) for block in pair.t5.encoder.block]
    clone = pair.ours.clone()
    encoded(clone)
    clone.patcher.detach()
    gc.collect()
    assert [norm() for norm in norms] == [None, None]


def test_patchers_of_others_stay_what_they_are(tmp_path: Path) -> None:
    from comfy.model_patcher import ModelPatcherDynamic

    from comfy_nai_t5.steady_patcher import SteadyPatcher, become_steady

    class Another(ModelPatcherDynamic):  # type: ignore[misc]
        pass

    theirs = stock(toy_file(tmp_path, FAMILIES["pixart"]), "pixart")
    before = type(theirs.patcher)
    become_steady(theirs.patcher)
    assert type(theirs.patcher) is before, "it is not in dynamic memory"
    assert not isinstance(ours_of(theirs, Settings("float32")).patcher, SteadyPatcher)
    other = SimpleNamespace(is_dynamic=lambda: True)
    become_steady(other)
    another = object.__new__(Another)
    become_steady(another)
    assert type(other) is SimpleNamespace and type(another) is Another
