"""``precompute``: the embeddings of a caption set, and what is done with the folder of one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nai_t5_core.cli.options import (
    Attention,
    DeviceOption,
    Dtype,
    DtypeOption,
    Json,
    LoraOption,
    ModelOption,
    Padding,
    Products,
    ProductsOption,
    ScalesOption,
    Subfolder,
    TokenizerOption,
    Unpack,
)
from nai_t5_core.cli.prompts import path_and_strength
from nai_t5_core.cli.shard_progress import planning_bar, shards_bar
from nai_t5_core.cli.terminal import counted, counting, err, print_json, say, size, working

if TYPE_CHECKING:
    from nai_t5_core.datasets.compute import Engine
    from nai_t5_core.datasets.encoder_choice import EncoderChoice
    from nai_t5_core.datasets.folder import SetFolder
    from nai_t5_core.datasets.plan import Plan, Planner

# Seconds between two looks for the plan of another machine.
_LOOK = 1.0


class _RunsByDefault(TyperGroup):
    """``precompute FILE …`` is ``precompute run FILE …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        is_named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if is_named or not args else ["run", *args])


app = typer.Typer(
    cls=_RunsByDefault,
    help="The embeddings of a caption set, once: nai-t5 precompute FILE… --out DIR, and then status, verify or gc DIR.",
)
Folder = Annotated[Path, typer.Argument(help="The set's folder.", show_default=False)]


@app.command()
def run(
    files: Annotated[list[Path], typer.Argument(help="Captions: .parquet, .jsonl, .csv or .txt.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The set's folder; running this again goes on where it ended.")],
    column: Annotated[str, typer.Option(help="The captions' column.")] = "caption",
    id_column: Annotated[str | None, typer.Option("--id", help="The ids' column; else rows are numbered.")] = None,
    family: Annotated[str | None, typer.Option(help="Diffusion model family: length, padding, text cleaning.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut captions to this many tokens.")] = None,
    padding: Annotated[Padding | None, typer.Option(help="What is done with pad tokens.")] = None,
    model: ModelOption = None,
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    attention: Annotated[Attention, typer.Option(help="How attention is computed.")] = Attention.auto,
    int8: Annotated[bool, typer.Option("--int8", help="Have the projections' weights in 8 bits.")] = False,
    products: ProductsOption = Products.auto,
    unpack: Unpack = False,
    compile_it: Annotated[bool, typer.Option("--compile", help="Compile the encoder; see warm-up.")] = False,
    scales: ScalesOption = None,
    lora: LoraOption = None,
    store: Annotated[str, typer.Option(help="bfloat16, int8 or float8.")] = "bfloat16",
    compress: Annotated[str, typer.Option(help="none; or zlib or zstd: lossless, and a third smaller.")] = "none",
    shard_mb: Annotated[int, typer.Option(help="Megabytes of a shard, before compression.")] = 512,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave rows without a caption out.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one for each GPU, or one.")] = None,
    token_budget: Annotated[int, typer.Option(help="Rows that are encoded at a time.")] = 8192,
    rank: Annotated[int, typer.Option(help="Which of the machines this is, from 0.")] = 0,
    world: Annotated[int, typer.Option(help="Machines that share the folder and run this command.")] = 1,
    ray: Annotated[str | None, typer.Option(help="The address of a Ray cluster, or local.")] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Plan, say what there is to do, and encode nothing.")
    ] = False,
    plan_wait: Annotated[int, typer.Option(help="Minutes that other ranks wait for the plan of rank 0.", min=0)] = 60,
    as_json: Json = False,
) -> None:
    """Encode the captions of files into a folder."""
    with working("reading the model's files"):
        from nai_t5_core.datasets.captions import Columns
        from nai_t5_core.datasets.compute import Engine
        from nai_t5_core.datasets.encoder_choice import EncoderChoice
        from nai_t5_core.datasets.recipe import Feeding, Keeping
        from nai_t5_core.datasets.run import Order
        from nai_t5_core.facts.paths import user_path

        engine = Engine(workers, rank, world, ray, token_budget)
        choice = EncoderChoice(
            model,
            dtype.value,
            device,
            subfolder,
            tokenizer,
            str(scales) if scales else "auto",
            "int8" if int8 else None,
            compile_it,
            attention.value,
            tuple(map(path_and_strength, lora or [])),
            products.value,
            unpack,
        )
        feeding = Feeding.choose(family, max_length, padding.value if padding else None)
        keeping = Keeping(store, compress, shard_mb * 1_000_000)  # type: ignore[arg-type]
        planner = Order(choice, feeding, keeping, Columns(column, id_column), skip_bad).planner(user_path(out))
    with _telling_how_to_go_on():
        plan = _plan(planner, [user_path(file) for file in files], rank, plan_wait)
        _encode(planner, plan, choice, engine, plan_only, as_json)


@contextmanager
def _telling_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say("what is complete stays, and running the same command again goes on", err, "stopped:", "yellow")
        raise


def _encode(
    planner: Planner, plan: Plan, choice: EncoderChoice, engine: Engine, plan_only: bool, as_json: bool
) -> None:
    """Makes the shards that are not there, and says what there was to do and what was done."""
    from nai_t5_core.datasets.compute import make_shards, to_make

    folder = planner.folder
    numbers = to_make(folder, plan, engine)
    _tell_plan(plan, numbers, planner.left_out)
    _tell_want_of_room(plan, numbers, folder)
    began, failures = time.monotonic(), 0
    if not plan_only:
        with shards_bar(plan, numbers) as told:
            make_shards(folder, plan, choice, numbers, engine, told)
            failures = told.failures
    seconds = time.monotonic() - began
    if as_json:
        print_json({**_summary(plan), "made": 0 if plan_only else len(numbers), "seconds": seconds})
    elif numbers and not plan_only:
        tokens = sum(plan.shards[number].tokens for number in numbers)
        rate = f"{tokens / max(seconds, 1e-9):,.0f} a second"
        say(f"made {counted(len(numbers), 'shard')}, {tokens:,} tokens in {seconds:.1f} s: {rate}")
    if failures:
        _refuse_failures(failures, folder)


def _refuse_failures(failures: int, folder: SetFolder) -> None:
    failed = "1 prompt failed and has" if failures == 1 else f"{failures:,} prompts failed and have"
    told = f"{failed} no embedding; nai-t5 precompute status {folder.path} lists them"
    say(told, err, "warning:")
    raise typer.Exit(1)


def _plan(planner: Planner, files: list[Path], rank: int, minutes: int) -> Plan:
    """The plan, made by the machine of rank 0; the others wait for it."""
    if rank == 0:
        with planning_bar() as advance:
            planner.told = advance
            return planner.plan(files)
    contents = list(planner.contents_of(files).values())
    until = time.monotonic() + minutes * 60
    say(f"waiting until rank 0 has planned these files in {planner.folder.plan}; {minutes} minutes at most", err)
    while (plan := planner.planned(contents)) is None:
        if time.monotonic() >= until:
            raise ValueError(
                f"rank 0 has not planned these files in {planner.folder.plan} within {minutes} minutes: see what it "
                "tells, whether it was given the same files and sees the same folder; or give a longer --plan-wait"
            )
        time.sleep(_LOOK)
    return plan


def _tell_plan(plan: Plan, numbers: list[int], left_out: int) -> None:
    prompts = f"{counted(plan.samples, 'sample')}, {counted(plan.prompts, 'unique prompt')}"
    if plan.cut:
        prompts += f" ({plan.cut:,} cut to {plan.recipe.feeding.max_length} tokens)"
    if left_out:
        prompts += f", {counted(left_out, 'row')} without a caption left out"
    say(f"{prompts}; {plan.tokens:,} tokens, {plan.tokens / max(plan.prompts, 1):.1f} a prompt", err)
    shards = f"{counted(len(plan.shards), 'shard')}, to be made: {len(numbers):,}"
    say(f"{size(plan.nbytes)} of {plan.recipe.keeping.store} in {shards}", err)


def _tell_want_of_room(plan: Plan, numbers: list[int], folder: SetFolder) -> None:
    """The run begins all the same: the disk may be emptied meanwhile, and what is complete stays."""
    needed = sum(plan.shards[number].rows for number in numbers) * plan.recipe.row_bytes
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        before = "" if plan.recipe.keeping.compress == "none" else " before compression"
        say(f"shards of {size(needed)}{before} are to be made, and the disk has {size(free)} free", err, "warning:")


def _summary(plan: Plan) -> dict[str, Any]:
    return {
        "samples": plan.samples,
        "prompts": plan.prompts,
        "cut": plan.cut,
        "tokens": plan.tokens,
        "rows": plan.rows,
        "bytes": plan.nbytes,
        "shards": len(plan.shards),
    }


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """What is done of a set, and which prompts failed."""
    from nai_t5_core.datasets.check import status_of
    from nai_t5_core.datasets.folder import SetFolder

    found = status_of(SetFolder(folder))
    plan = found.plan
    if as_json:
        print_json({**_summary(plan), "missing": found.missing, "disk": found.nbytes, "failures": found.failures})
        return
    done = len(plan.shards) - len(found.missing)
    prompts = f"{counted(plan.samples, 'sample')}, {counted(plan.prompts, 'unique prompt')}"
    say(f"{prompts}, of which {found.prompts:,} are encoded")
    say(f"{done:,} of {counted(len(plan.shards), 'shard')}, {size(found.nbytes)}")
    for key, reason in found.failures.items():
        say(reason, err, f"failed: {key[:16]}…", "yellow")


@app.command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Read every byte; damaged shards are set aside, and the next run makes them again."""
    from nai_t5_core.datasets.check import verify as verify_set
    from nai_t5_core.datasets.folder import SetFolder

    with counting("reading shards") as progress:
        found = verify_set(SetFolder(folder), progress)
    if as_json:
        print_json({"damaged": {str(number): fault for number, fault in found.items()}})
    else:
        for fault in found.values():
            say(f"{fault}; it was set aside, and the next run makes it again", err, "damaged:", "red")
        if not found:
            say("all shards that are there are whole")
    if found:
        raise typer.Exit(1)


@app.command()
def gc(
    folder: Folder,
    failed: Annotated[
        bool, typer.Option("--failed", help="Shards with failed prompts, too: they are tried again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove what a set does not need: damaged shards, those of no plan, and what killed runs have left."""
    from nai_t5_core.datasets.check import collect_garbage
    from nai_t5_core.datasets.folder import SetFolder

    removed = [str(file) for file in collect_garbage(SetFolder(folder), failed)]
    if as_json:
        print_json({"removed": removed})
    else:
        say(f"removed {counted(len(removed), 'file')}" if removed else "nothing to remove")
