"""One of several processes that share models; ``test_sharding`` starts them and looks at what the first one saves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import TOY_CONFIGS, build_stack, padding_mask, random_state
from torch import Tensor

from nai_t5_core.backends.sharding import shard, whole
from nai_t5_core.bench.peers import own_t5
from nai_t5_core.facts.config import T5Config
from nai_t5_core.model.encoder import LAYOUTS
from nai_t5_core.training.config import read_config
from nai_t5_core.training.loop import train
from nai_t5_core.training.processes import joined
from nai_t5_core.training.weights import checkpoint_blocks

PROMPTS, LENGTH, TEXT = 4, 9, 6
# A tied head and one bias table; a head of its own, gates, and a table in every layer.
KINDS = ("v1.0", "umt5")


def toy_rows(config: T5Config) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask [prompts, length], labels [prompts, text length]; as many labels in the even rows as in the odd."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config.vocab_size, (PROMPTS, LENGTH), generator=generator)
    labels = torch.randint(3, config.vocab_size, (PROMPTS, TEXT), generator=generator)
    labels[0, 4:] = labels[1, 4:] = -100
    return ids, padding_mask([9, 4, 6, 2], LENGTH), labels


def gathered(values: Tensor) -> Tensor:
    """The rows of all processes in their order, where each has every so many-th."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def shared_models(kind: str) -> dict[str, Any]:
    """What a sharded encoder and a sharded T5 give, in both layouts."""
    config, rank, count = TOY_CONFIGS[kind], dist.get_rank(), dist.get_world_size()
    state, found = random_state(config), dict[str, Any]()
    ids, mask, labels = toy_rows(config)
    mine = slice(rank, None, count)
    for layout in LAYOUTS:
        stack = shard(build_stack(config, state, layout=layout))
        with torch.no_grad():
            found[f"encoder {layout}"] = gathered(stack(ids[mine], mask[mine]))
            half = shard(build_stack(config, state, torch.bfloat16, layout))
            found[f"bfloat16 {layout}"] = gathered(half(ids[mine], mask[mine]))
            found[f"layers {layout}"] = gathered(stack.hidden_states(ids[mine], mask[mine])[1])

        model = own_t5(config, state, torch.float32, layout).requires_grad_(True)
        if layout == "separate":
            checkpoint_blocks(model)
        shard(model)
        # Before any call, which is where only the methods' own gathering helps.
        found[f"streamed {layout}"] = torch.stack(list(model.stream(ids, mask, max_new_tokens=5)), dim=1)
        found[f"texts {layout}"] = model.generate(ids, mask, num_beams=2, max_new_tokens=5)
        loss = model(ids[mine], mask[mine], labels=labels[mine]).loss
        assert loss is not None
        loss.backward()
        found[f"loss {layout}"] = gathered(loss.detach()[None]).mean()
        found[f"gradients {layout}"] = {name: whole(weight.grad) for name, weight in model.named_parameters()}
        parts = [weight.to_local().numel() for weight in model.parameters()]
        found[f"own share {layout}"] = sum(parts) / sum(weight.numel() for weight in model.parameters())
    return found


def main(folder: Path, configs: list[str]) -> None:
    found: dict[str, Any] = {kind: shared_models(kind) for kind in KINDS}
    found["reports"] = {}
    for name in configs:
        config = read_config(folder / name)
        try:
            found["reports"][name] = [vars(report) for report in train(config).reports]
        except ValueError as error:
            found["reports"][name] = str(error)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    with joined("cpu"):
        main(Path(sys.argv[1]), sys.argv[2:])
