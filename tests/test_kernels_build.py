"""When the kernels are built, what is said of it, and which processors choose them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_CONFIGS, build_stack, every_set, needs_kernels, padding_mask, random_state
from test_cli import Run, run  # noqa: F401 - a fixture
from torch import nn

from nai_t5_core.backends.choose import (
    automatic_attention,
    prepack,
    quantize_int8,
    run_in_place,
    why_not_int8,
    why_not_prepack,
)
from nai_t5_core.backends.kernels import build
from nai_t5_core.backends.kernels.build import (
    best_set,
    built_file,
    missing_for,
    missing_for_kernels,
    nearest_set,
    prepare_kernels,
    why_not_kernels,
)
from nai_t5_core.backends.kernels.compilers import NO_COMPILER, Compiler
from nai_t5_core.backends.kernels.runners import KernelsOnPanels
from nai_t5_core.backends.kernels.sets import AVX2, AVX512, CHOSEN, SETS, InstructionSet
from nai_t5_core.backends.products import INT8_ONEDNN, ONEDNN
from nai_t5_core.facts.scales import StackScales, unscaled
from nai_t5_core.model.encoder import T5EncoderStack

V1_1 = TOY_CONFIGS["v1.1"]
IDS = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(3))
MASK = padding_mask([12, 5, 1], 12)
BEST = nearest_set()
HAS_AVX512 = AVX512.needs | AVX2.needs
HAS_AMX = HAS_AVX512 | {"amx_bf16"}


def python(code: str, tmp_path: Path, compiler: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code in a process whose cache is empty, and whose compiler, if it has any, is this shell script.

    The script finds the kernels that are built already in the folder BUILT, and its output's name in OUTPUT.
    """
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    if compiler is not None:
        script = f"#!/bin/sh\nfor OUTPUT; do :; done\nPATH=/usr/bin:/bin\nBUILT={built_file(BEST).parent}\n{compiler}\n"
        (tools / "g++").write_text(script)
        (tools / "g++").chmod(0o755)
    environment = {**os.environ, "PATH": str(tools), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


COPIES = 'case "$OUTPUT" in *.o) touch "$OUTPUT";; *) cp "$BUILT/$(basename "$OUTPUT")" "$OUTPUT";; esac'
FAILS = "echo 'tiles.h:1: error: no such instruction' >&2; exit 1"
BUILDING = f"compiling the T5's kernels for {BEST.title} into"

LOOKS = """
import torch
from nai_t5_core import load_encoder
from nai_t5_core.backends.kernels.runners import KernelsOnPanels
from nai_t5_core.backends.choose import automatic_attention
from nai_t5_core.backends.kernels.build import missing_for_kernels, why_not_kernels
stack = load_encoder(None, "bfloat16", "cpu")
with torch.no_grad():
    repr(stack), str(stack), stack.describe_attention(), automatic_attention()
    missing_for_kernels(), why_not_kernels(), stack.encoder.block[0].attends_by_itself(torch.bfloat16)
print(stack.describe_attention())
"""
ENCODES = LOOKS + "print(bool(stack(torch.tensor([[5, 6, 1]])).isfinite().all()), stack.describe_attention())\n"
WITHOUT_GRADIENTS = "import torch; torch.set_grad_enabled(False)\n"


@pytest.fixture(autouse=True)
def kernels_are_there_to_be_copied() -> None:
    for instructions in SETS:
        prepare_kernels(instructions)


@needs_kernels
def test_looking_never_builds(tmp_path: Path) -> None:
    done = python(LOOKS, tmp_path, COPIES)
    assert done.stdout.split() == ["auto:", "kernels" if not why_not_kernels() else "sdpa"]
    assert BUILDING not in done.stderr and not list(tmp_path.rglob("*.so"))


@needs_kernels
def test_building_is_told(tmp_path: Path) -> None:
    code = "from nai_t5_core.backends.kernels.build import prepare_kernels; import torch; print(prepare_kernels())"
    for is_first in (True, False):
        done = python(code, tmp_path, COPIES)
        assert done.stdout.strip() == "None", done.stderr
        assert (BUILDING in done.stderr) == is_first
    assert [path.name for path in tmp_path.rglob("*.so")] == [built_file(BEST).name]


@pytest.mark.skipif(bool(why_not_kernels()), reason=f"no automatic choice takes the kernels here: {why_not_kernels()}")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, NO_COMPILER),
        (
            FAILS,
            "g++ could not compile the kernels: tiles.h:1: error: no such instruction (install g++ 11 or newer, or the "
            "package ziglang)",
        ),
    ],
)
def test_where_they_cannot_be_built_torch_computes_and_says_so(
    compiler: str | None, reason: str, tmp_path: Path
) -> None:
    done = python(WITHOUT_GRADIENTS + ENCODES, tmp_path, compiler)
    guess, result = done.stdout.splitlines()
    assert guess == ("auto: sdpa" if compiler is None else "auto: kernels")
    assert result == "True auto: sdpa"
    if compiler is not None:
        # Each set that the processor has is tried once.
        tried = [instructions for instructions in CHOSEN if missing_for(instructions) is None]
        assert done.stderr.count("the T5 goes without its kernels") == len(tried)
    assert not list(tmp_path.rglob("*.so"))
    named = (
        "from nai_t5_core import load_encoder; from nai_t5_core.backends.choose import prepack; "
        "prepack(load_encoder(None, 'float32', 'cpu'), 'kernels')"
    )
    assert f"products='kernels' is not possible: {reason}; use" in python(named, tmp_path, compiler).stderr


@pytest.mark.skipif(bool(why_not_kernels()), reason=f"no automatic choice takes the kernels here: {why_not_kernels()}")
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_that_no_compiler_is_there_is_told_once(quantize: str | None, tmp_path: Path) -> None:
    """A user who loads an encoder hears what it goes without, and what to install."""
    code = (
        "from nai_t5_core import TextEncoder\n"
        "for _ in range(2):\n"
        f"    encoder = TextEncoder.from_pretrained(None, device='cpu', dtype='bfloat16', quantize={quantize!r})\n"
        "    encoder.encode(['a cat'])\n"
        "print(encoder)\n"
    )
    done = python(code, tmp_path)
    if done.returncode:
        assert "to int8" in done.stderr and quantize  # oneDNN has no products of bytes here
        return
    assert f"oneDNN{', in 8 bits' if quantize else ''}, attention=auto: sdpa" in done.stdout
    assert done.stderr.count(f"the T5 goes without its kernels for {BEST.title}: {NO_COMPILER}") == 1, done.stderr


@pytest.mark.skipif(bool(why_not_kernels()), reason=f"no automatic choice takes the kernels here: {why_not_kernels()}")
def test_a_folder_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    """It is in the way of every set, unless that is built already."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    told = f"the folder {tmp_path / 'cache' / 'comfy-nai-t5'} cannot be written (Not a directory): make it writable, or"
    done = python(WITHOUT_GRADIENTS + ENCODES, tmp_path, COPIES)
    assert done.stdout.splitlines()[-1] == "True auto: sdpa"
    assert done.stderr.count("the T5 goes without its kernels") == done.stderr.count(told) == 1, done.stderr
    named = (
        "from nai_t5_core import load_encoder; from nai_t5_core.backends.choose import prepack; "
        f"prepack(load_encoder(None, 'float32', 'cpu'), {BEST.name!r})"
    )
    assert f"products={BEST.name!r} is not possible: {told}" in python(named, tmp_path, COPIES).stderr


@needs_kernels
def test_instructions_that_the_system_refuses_leave_it_to_the_next_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As containers and old kernels do with tiles: it is told with the remedy, and the next best set computes."""
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: SimpleNamespace(t5_is_permitted=lambda: False))
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(build, "_failures", {})
    told = f"the system does not let this process use {BEST.title}: it needs Linux 5.16 or newer, and a container that"
    obstacle = build._prepare(BEST)
    assert obstacle is not None and told in obstacle and told in caplog.text
    assert missing_for(BEST) == obstacle and best_set() not in (BEST, None)


def test_the_command_says_which_sets_can_be_built(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(build, "missing_for", lambda one: None if one in (AVX512, AVX2) else "this processor has none")
    refused = run("kernels", "build", "--products", "amx")
    assert refused.status == 2
    assert "cannot be built here: this processor has none; --products avx512 or avx2 can" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_builds(as_json: bool, tmp_path: Path) -> None:
    arguments = ["nai-t5", "kernels", "build", *(["--json"] if as_json else [])]
    code = f"import sys; sys.argv = {arguments!r}; from nai_t5_core.cli import main; main()"
    if missing_for_kernels():
        done = python(code, tmp_path)
        assert done.returncode == 2 and " cannot be built here: " in done.stderr
        return
    built = tmp_path / "cache" / built_file(BEST).parent.name / built_file(BEST).name
    for state in ("absent", "there", "damaged", "there"):
        if state == "damaged":
            built.write_bytes(built.read_bytes()[:-100])
        done = python(code, tmp_path, COPIES)
        assert done.returncode == 0, done.stderr
        is_there = state == "there"
        told = f'"was_there": {str(is_there).lower()}' if as_json else "there already" if is_there else "built in"
        assert told in done.stdout and str(built) in done.stdout
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    failed = python(code, elsewhere, FAILS)
    assert failed.returncode == 2 and "error: no such instruction" in failed.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------


def on(monkeypatch: pytest.MonkeyPatch, flags: frozenset[str]) -> None:
    monkeypatch.setattr(build, "_processor_flags", lambda: flags)


@needs_kernels
@torch.no_grad()
def test_amx_leaves_the_kernels_to_those_who_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, HAS_AVX512)
    plain, expected = build_stack(V1_1, random_state(V1_1)), prepack(build_stack(V1_1, random_state(V1_1)), "kernels")
    if why_not_prepack(plain) is not None or why_not_int8(plain) is not None:
        pytest.skip("this machine packs or quantises no such weights")
    assert plain.describe_attention() == "auto: kernels" and why_not_kernels() is None
    on(monkeypatch, HAS_AMX)
    assert missing_for_kernels() is None
    assert why_not_kernels() == "this processor has AMX, which oneDNN uses, and the kernels only where it is named"
    assert plain.describe_attention() == "auto: sdpa" and automatic_attention()["cpu"] == "sdpa"
    changes: list[Any] = [prepack, quantize_int8]
    for change in changes:
        chosen = change(build_stack(V1_1, random_state(V1_1)))
        assert not any(isinstance(block.runner, KernelsOnPanels) for block in chosen.encoder.block)
        named = change(build_stack(V1_1, random_state(V1_1)), "kernels")
        assert all(isinstance(block.runner, KernelsOnPanels) for block in named.encoder.block)
        assert not any(isinstance(module, nn.Linear) for module in named.modules())
        assert named.describe_attention() == "auto: kernels"
        if change is prepack:
            assert torch.equal(named(IDS, MASK), expected(IDS, MASK))


# What a processor may have, and the set that is chosen there.
PROCESSORS: dict[str, tuple[frozenset[str], str]] = {
    "AVX512-BF16": (HAS_AVX512, "avx512"),
    "AVX-VNNI": (AVX2.needs | {"avx_vnni"}, "avx2-vnni"),
    "AVX2": (AVX2.needs, "avx2"),
}


@needs_kernels
@pytest.mark.parametrize("processor", PROCESSORS)
@torch.no_grad()
def test_the_best_set_of_a_processor_is_chosen(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, name = PROCESSORS[processor]
    if not flags <= build._processor_flags():
        pytest.skip(f"this processor has no {processor}")
    on(monkeypatch, flags)
    found = best_set()
    assert found is not None and found.name == name and why_not_kernels() is None
    for change in (prepack, quantize_int8):
        stack = change(build_stack(V1_1, random_state(V1_1)))
        assert all(block.runner.name.startswith(f"{found.title} kernels") for block in stack.encoder.block)
    in_place = build_stack(V1_1, random_state(V1_1))
    assert {block.runner.name for block in in_place.encoder.block} == {f"{found.title} kernels"}
    assert f"{found.title} kernels" in repr(in_place)


@needs_kernels
@torch.no_grad()
def test_where_the_best_cannot_be_built_the_next_best_is(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = [instructions for instructions in CHOSEN if missing_for(instructions) is None]
    if len(usable) < 2:
        pytest.skip("this processor has one set alone")
    first, second, *_ = usable
    given = build.library

    def fails_for_the_first(instructions: InstructionSet) -> Any:
        if instructions is first:
            raise OSError("the cache cannot be written")
        return given(instructions)

    monkeypatch.setattr(build, "library", fails_for_the_first)
    monkeypatch.setattr(build, "_failures", {})
    stack = prepack(build_stack(V1_1, random_state(V1_1)))
    assert all(block.runner.name.startswith(second.title) for block in stack.encoder.block)
    named: Any = first.name
    with pytest.raises(ValueError, match=f"products='{named}' is not possible: the cache cannot be written; use prod"):
        prepack(build_stack(V1_1, random_state(V1_1)), named)


@needs_kernels
def test_a_file_that_does_not_load_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a wheel for a newer system: what else is there is loaded, or it is compiled."""
    (broken := tmp_path / "brought.so").write_bytes(b"no library")
    right = built_file(BEST)
    monkeypatch.setattr(build, "there", lambda recipe, cache: iter([broken, right]))
    assert build.library.__wrapped__(BEST)._name == str(right)
    monkeypatch.setattr(build, "there", lambda recipe, cache: iter([broken]))
    monkeypatch.setattr(build, "_built_by", lambda by, instructions: right)
    assert build.library.__wrapped__(BEST)._name == str(right)
    monkeypatch.setattr(build, "compilers", list)
    with pytest.raises(RuntimeError, match=r"those in .*brought\.so do not load .*, and there is no C\+\+ compiler"):
        build.library.__wrapped__(BEST)


# What may have become of a compiled file; the system would load a part of one, and end the process where it reads on.
DAMAGES = {
    "empty": lambda whole: b"",
    "cut off at the start": lambda whole: whole[:1000],
    "cut off in the middle": lambda whole: whole[: len(whole) // 2],
    "cut off at the end": lambda whole: whole[:-1],
    "never written to its end": lambda whole: whole[:-4096] + bytes(4096),
    "of another set": lambda whole: whole,
}


@needs_kernels
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = built_file(BEST)
    damaged = tmp_path / ("kernels-of-another-set.so" if damage == "of another set" else right.name)
    damaged.write_bytes(DAMAGES[damage](right.read_bytes()))
    monkeypatch.setattr(build, "there", lambda recipe, cache: iter([damaged]))
    monkeypatch.setattr(build, "_built_by", lambda by, instructions: right)
    assert build.library.__wrapped__(BEST)._name == str(right)
    assert f"the T5's kernels in {damaged} do not load: the file is damaged" in caplog.text
    monkeypatch.setattr(build, "compilers", list)
    with pytest.raises(
        RuntimeError, match=r"\(the file is damaged\), and there is no C\+\+ compiler to build them with"
    ):
        build.library.__wrapped__(BEST)


# Why what was just compiled does not load, and what is told.
LOADING = {
    "failed to map segment from shared object": "libraries cannot be loaded from the folder {folder} ({reason}): set "
    "XDG_CACHE_HOME to a folder that permits it",
    "undefined symbol: GOMP_parallel": "what made compiled does not load, since torch brings no OpenMP that it knows "
    "({reason}); install the package ziglang, whose kernels need none",
}


@needs_kernels
@pytest.mark.parametrize("reason", LOADING)
def test_what_was_compiled_and_does_not_load_is_told_with_the_remedy(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as in a folder of which the system loads nothing, where one set is as good as any."""

    def fails(path: str) -> None:
        raise OSError(f"{path}: {reason}")

    right = built_file(BEST)
    monkeypatch.setattr(build.ctypes, "CDLL", fails)
    monkeypatch.setattr(build, "there", lambda recipe, cache: iter(()))
    monkeypatch.setattr(build, "compilers", lambda: [Compiler("made", ("true",))])
    monkeypatch.setattr(build, "_built_by", lambda by, instructions: right)
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(build, "_failures", {})
    told = LOADING[reason].format(folder=right.parent, reason=reason)
    assert build._prepare(BEST) == told and caplog.text.count(told) == 1
    assert missing_for(BEST) == told and best_set() is not BEST


@needs_kernels
@pytest.mark.parametrize("free", [0, 1 << 40], ids=["full", "roomy"])
def test_a_full_disk_is_told_as_such(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers that find no room say so in many ways, or nothing at all; another compiler would be no help."""
    silent = Compiler("silent", ("false",))
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    expected = (
        f"the folder {tmp_path} cannot be written (No space left on device): free some space, or set XDG_CACHE_HOME to"
        if free == 0
        else "silent could not compile the kernels: it ended with status 1 (install "
    )
    with pytest.raises(RuntimeError) as refused:
        build._built_by(silent, BEST)
    assert str(refused.value).startswith(expected)
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_a_compiler_speaks_english_and_writes_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    asked = Compiler("asked", ("sh", "-c", 'echo "error: in $LC_ALL, at $TMPDIR" >&2; exit 1'))
    with pytest.raises(RuntimeError, match=f"asked could not compile the kernels: error: in C, at {tmp_path}/"):
        asked.build(BEST.recipe, tmp_path / "kernels.so")


@needs_kernels
def test_a_compiler_that_fails_leaves_it_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an old one that does not know the processor."""
    old, new, right = Compiler("old", ("false",)), Compiler("new", ("true",)), built_file(BEST)

    def made(by: Compiler, instructions: InstructionSet) -> Path:
        if by is old:
            raise RuntimeError("old could not compile the kernels")
        return right

    monkeypatch.setattr(build, "there", lambda recipe, cache: iter(()))
    monkeypatch.setattr(build, "compilers", lambda: [old, new])
    monkeypatch.setattr(build, "_built_by", made)
    assert build.library.__wrapped__(BEST)._name == str(right)
    monkeypatch.setattr(build, "compilers", lambda: [old])
    with pytest.raises(RuntimeError, match="old could not compile"):
        build.library.__wrapped__(BEST)


@needs_kernels
@torch.no_grad()
def test_scales_leave_a_float16_model_to_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels alone could hold its weights, as on AVX2."""
    on(monkeypatch, AVX2.needs)
    plain = T5EncoderStack(V1_1, dtype=torch.float16)
    first, *others = unscaled(V1_1.num_layers).layers
    scaled = T5EncoderStack(
        V1_1, dtype=torch.float16, scales=StackScales((replace(first, feed_forward_out=0.5), *others))
    )
    for change, why_not in ((prepack, why_not_prepack), (quantize_int8, why_not_int8)):
        assert why_not(plain) is None and why_not(scaled) is not None
        with pytest.raises(ValueError, match="float16"):
            change(scaled)


@pytest.mark.parametrize("change", [prepack, quantize_int8])
def test_where_only_kernels_could_and_none_can_be_built_it_is_known_before(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An automatic choice then leaves the model as it is."""
    on(monkeypatch, AVX2.needs)

    def fails(instructions: InstructionSet) -> Any:
        raise OSError("the cache cannot be written")

    monkeypatch.setattr(build, "library", fails)
    monkeypatch.setattr(build, "_failures", {})
    for backend in (ONEDNN, INT8_ONEDNN):
        monkeypatch.setattr(type(backend), "missing", lambda *_: "no oneDNN for this dtype")
    stack = build_stack(V1_1, random_state(V1_1), torch.bfloat16)
    why_not = why_not_prepack if change is prepack else why_not_int8
    assert why_not(stack) == "no oneDNN for this dtype"
    with pytest.raises(ValueError, match="no oneDNN for this dtype"):
        change(stack)


@pytest.mark.parametrize("flags", [frozenset(), frozenset({"avx2"})], ids=["none", "AVX2 alone"])
def test_without_the_instructions_naming_them_is_an_error(
    flags: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, flags)
    stack = build_stack(V1_1, random_state(V1_1))
    choices: dict[Any, str] = {"kernels": AVX2.lacking, **{each.name: each.lacking for each in SETS}}
    changes: list[Any] = [prepack, quantize_int8]
    for products, lacking in choices.items():
        for change in changes:
            with pytest.raises(ValueError, match=f"products='{products}' is not possible: {lacking}; use products="):
                change(stack, products)
        if products != "kernels":
            with pytest.raises(ValueError, match=f"products='{products}' is not possible: {lacking}; use products="):
                run_in_place(stack, products)
    with pytest.raises(ValueError, match="unknown products 'onednn' in place; allowed: auto, amx, avx512, avx2-"):
        run_in_place(stack, "onednn")
    assert prepare_kernels() is not None and missing_for_kernels() is not None


@pytest.mark.parametrize(
    ("machine", "is_x86"), [("x86_64", True), ("AMD64", True), ("aarch64", False), ("arm64", False)]
)
def test_processors_of_other_kinds_are_named(machine: str, is_x86: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """There nothing of x86 is looked for, and nothing compiled."""
    on(monkeypatch, HAS_AVX512 if is_x86 else frozenset())
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    for instructions in CHOSEN:
        missing = build._missing_instructions(instructions)
        assert (missing == f"the kernels are for x86-64, and this processor is {machine}") != is_x86


def test_avx512_without_bfloat16_is_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, AVX2.needs | {"avx512f"})
    assert "this processor has AVX512, but not its BF16 and VNNI" in str(why_not_kernels())


@every_set
@torch.no_grad()
def test_a_set_that_is_named_replaces_the_automatic_choice_in_place(instructions: InstructionSet) -> None:
    """A loaded model has that already, as one of diffusers has."""
    stack = run_in_place(run_in_place(build_stack(V1_1, random_state(V1_1))), instructions.name)  # type: ignore[arg-type]
    assert {block.runner.name for block in stack.encoder.block} == {f"{instructions.title} kernels"}
    assert stack(IDS, MASK).isfinite().all()
    # The automatic choice leaves it alone.
    assert {block.runner.name for block in run_in_place(stack).encoder.block} == {f"{instructions.title} kernels"}


@every_set
def test_each_set_has_a_file_of_its_own(instructions: InstructionSet) -> None:
    others = {built_file(other) for other in SETS if other is not instructions}
    assert built_file(instructions) not in others
