"""A run: plan what is not planned, then make the shards that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nai_t5_core.datasets.captions import Columns
from nai_t5_core.datasets.coding import coder
from nai_t5_core.datasets.encoder_choice import EncoderChoice
from nai_t5_core.datasets.folder import SetFolder
from nai_t5_core.datasets.plan import Plan, Planner
from nai_t5_core.datasets.recipe import Feeding, Keeping, Recipe, common_of_keys, tokenizer_contents
from nai_t5_core.datasets.shard_files import DamagedShardError, ShardFile
from nai_t5_core.datasets.tokens import PromptMaker


@dataclass(frozen=True)
class Order:
    """What a set shall hold and how it is computed: all that makes its plan."""

    encoder: EncoderChoice
    feeding: Feeding
    keeping: Keeping = field(default_factory=Keeping)
    columns: Columns = field(default_factory=Columns)
    skip_bad: bool = False

    def planner(self, out: Path, processes: int | None = None) -> Planner:
        """What adds captions to the set in a folder.

        Raises:
            ValueError: the encoder's checkpoint or tokenizer is unusable.
            MissingPackageError: what is to compress is not installed.
        """
        if self.keeping.compress != "none":
            # What is not there is told now, and not by the first shard.
            coder(self.keeping.compress).code(memoryview(b""))
        settings = self.encoder.settings()
        tokenizer = self.encoder.find_tokenizer()
        recipe = Recipe(
            encoder=common_of_keys(settings.key([0]).text),
            tokenizer=tokenizer_contents(*tokenizer.serialized()),
            pad=tokenizer.pad_token_id,
            d_model=settings.config.d_model,
            feeding=self.feeding,
            keeping=self.keeping,
        )
        maker = PromptMaker(tokenizer, self.feeding, settings)
        return Planner(SetFolder(out), recipe, maker, self.columns, self.skip_bad, processes)


def missing_shards(folder: SetFolder, plan: Plan) -> list[int]:
    """Numbers of the planned shards whose file is not there, or is visibly no shard: cut off, or something else."""
    return [number for number in range(len(plan.shards)) if not _is_there(folder, number)]


def of_rank(numbers: Sequence[int], rank: int, world: int) -> list[int]:
    """The shards of one of several machines.

    Raises:
        ValueError: there is no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}; ranks are 0 to {world - 1}")
    return [number for number in numbers if number % world == rank]


def _is_there(folder: SetFolder, number: int) -> bool:
    file = folder.shard(number)
    if not file.is_file():
        return False
    try:
        ShardFile(file)
    except DamagedShardError:
        return False
    return True
