"""How a set is: what is there, what is damaged, and what belongs to no plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.plan import Plan, existing_plan
from nai_t5_core.datasets.prompt_files import read_prompts
from nai_t5_core.datasets.run import missing_shards
from nai_t5_core.datasets.shard_files import DamagedShardError, ShardFile
from nai_t5_core.weights.whole_files import alone_in, remove_unfinished


@dataclass(frozen=True)
class Status:
    """What is done of a set.

    Attributes:
        missing: numbers of the shards that are not there.
        nbytes: of the shards that are there.
        failures: by hexadecimal key, why a prompt has no embedding.
    """

    plan: Plan
    missing: list[int]
    nbytes: int
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """Prompts in shards that are there."""
        missing = set(self.missing)
        return sum(shard.prompts for number, shard in enumerate(self.plan.shards) if number not in missing)


def status_of(folder: SetFolder) -> Status:
    """What is done of the set in a folder; the headers of the shards are read.

    Raises:
        ValueError: there is no set.
    """
    plan = existing_plan(folder)
    missing = missing_shards(folder, plan)
    there = sorted(set(range(len(plan.shards))) - set(missing))
    failures: dict[str, str] = {}
    for number in there:
        failures |= ShardFile(folder.shard(number)).failures
    return Status(plan, missing, sum(folder.shard(number).stat().st_size for number in there), failures)


def verify(folder: SetFolder, told: Callable[[int, int], None] = lambda done, total: None) -> dict[int, str]:
    """Reads every byte of the shards that are there, and sets damaged ones aside, as ``NNNNN.safetensors.damaged``.

    Returns:
        What is wrong with which shard; the next run makes these again.

    Raises:
        ValueError: there is no set, or a run is making shards.
    """
    existing_plan(folder)
    if not folder.shards_folder.is_dir():
        return {}
    found: dict[int, str] = {}
    with alone_in(folder.shards_folder):
        # Another run may have ended in the meantime.
        plan = existing_plan(folder)
        numbers = [number for number in range(len(plan.shards)) if folder.shard(number).exists()]
        for done, number in enumerate(numbers, 1):
            fault = _fault(folder, plan, number)
            if fault:
                found[number] = fault
                folder.shard(number).replace(folder.damaged(number))
            told(done, len(numbers))
    return found


def _fault(folder: SetFolder, plan: Plan, number: int) -> str:
    try:
        shard = ShardFile(folder.shard(number))
    except DamagedShardError as error:
        return str(error)
    if shard.contents() != shard.sha256:
        return f"{shard.file} is damaged: its bytes are not those that were written"
    if not torch.equal(shard.keys, read_prompts(folder, number).keys):
        return f"{shard.file} holds other prompts than planned"
    keeping = plan.recipe.keeping
    if (shard.store, shard.compress, shard.d_model) != (keeping.store, keeping.compress, plan.recipe.d_model):
        return f"{shard.file} is stored in another way than planned"
    return ""


def collect_garbage(folder: SetFolder, with_failed: bool = False) -> list[Path]:
    """Removes what a set does not need: shards beyond the plan, damaged ones, and what killed runs have left.

    Args:
        with_failed: remove shards with prompts that failed, too, so that the next run tries these again.

    Returns:
        What was removed.

    Raises:
        ValueError: there is no set, or a run is at work in it.
    """
    existing_plan(folder)
    folder.shards_folder.mkdir(exist_ok=True)
    with alone_in(folder.path), alone_in(folder.shards_folder):
        # Another run may have published a longer plan in the meantime.
        chosen = list(_garbage(folder, existing_plan(folder), with_failed))
        for file in chosen:
            file.unlink()
        for place in (folder.path, folder.prompts_folder, folder.shards_folder):
            remove_unfinished(place)
    return chosen


def _garbage(folder: SetFolder, plan: Plan, with_failed: bool) -> Iterator[Path]:
    planned = len(plan.shards)
    yield from folder.shards_folder.glob("*.safetensors.damaged")
    for number in folder.numbers_in(folder.shards_folder):
        if number >= planned or (with_failed and _has_failures(folder.shard(number))):
            yield folder.shard(number)
    yield from (folder.prompts(number) for number in folder.numbers_in(folder.prompts_folder) if number >= planned)
    yield from (file for file in folder.all_samples() if file != folder.samples(plan.edition))
    if folder.ledger.exists():
        yield folder.ledger


def _has_failures(file: Path) -> bool:
    try:
        return bool(ShardFile(file).failures)
    except DamagedShardError:
        return False
