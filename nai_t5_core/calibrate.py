"""Finding the float16 scales of a checkpoint: its largest activations over a set of prompts, layer by layer.

Runs in float32 with one layer in memory at a time, read from the file when its turn comes, so that the largest models
fit into little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nai_t5_core.attention import Attend, DocumentAttention, distance_table, logit_scale
from nai_t5_core.config import T5Config, encoder_tensors
from nai_t5_core.encoder import EncoderBlock
from nai_t5_core.examine import Examination, ModelSource, examine, find_tokenizer_for
from nai_t5_core.formats import replacing
from nai_t5_core.layers import NoInit
from nai_t5_core.maxima import QUANTITIES, LayerMaxima, observe, scales_for
from nai_t5_core.packing import pack_batch
from nai_t5_core.precision import largest_absolute
from nai_t5_core.scales import FLOAT16_MAX, LayerScales, StackScales, scale_for

if TYPE_CHECKING:
    from rich.console import RenderableType

# Short and long, plain and odd: outliers sit on rare tokens, on repetitions, and at the end of the prompt.
PROMPTS = (
    "",
    "a",
    "cat",
    "a photo of a cat",
    "An oil painting of a lighthouse on a cliff at dusk, waves breaking below, warm light in the windows.",
    "(masterpiece, best quality:1.2), 1girl, solo, silver hair, looking at viewer <lora:detail:0.8> [sketch|ink]",
    "the the the the the the the the the the the the the the the the the the the the the the the the",
    "!!!!!!!!!!!!!!!!!!!!!!!! ???????? ........ ,,,,,,,, :::: ;;;; ---- ____ //// \\\\\\\\",
    "0 1 2 3 4 5 6 7 8 9 10 100 1000 1,000,000 3.14159265358979 -40 °C 1920x1080 f/1.8 ISO 100 24fps 4k 8k",
    "Ein Fuchs springt über den faulen Hund; le cœur a ses raisons; ¿dónde está la biblioteca?",
    "一只猫坐在窗台上，夕阳西下。 猫が窓辺に座っている。 고양이가 창가에 앉아 있다.",
    "Кошка сидит на подоконнике. القطة تجلس على النافذة. बिल्ली खिड़की पर बैठी है।",
    "😀 🐈 🌅 👩‍🚀 🏳️‍🌈 ✨ → ∑ √2 ≈ 1.41 ½ © ™",
    "def encode(self, prompts: list[str]) -> Tensor:\n    return self.stack(torch.tensor(ids), mask)\n",
    "low quality, blurry, bad anatomy, extra fingers, watermark, signature, jpeg artifacts, cropped, worst quality",
    " ".join(["A wide shot of a busy market street in the rain, neon signs reflected in the puddles."] * 24),
)
MAX_LENGTH = 512


@dataclass(frozen=True)
class Calibration:
    """What a calibration saw and chose; ``layers`` and ``scales.layers`` go together."""

    config: T5Config
    prompts: int
    tokens: int
    headroom: float
    layers: tuple[LayerMaxima, ...]
    scales: StackScales

    def scaled_maximum(self, index: int, quantity: str) -> float:
        """The largest value of a quantity after scaling; what has no scale is as it was."""
        scales = asdict(self.scales.layers[index])
        scale = scales["hidden"] if quantity == "up" else scales.get(quantity, 1.0)
        return float(self.layers[index].maxima[quantity] * scale)

    def beyond(self) -> list[str]:
        """What exceeds float16 even so, in words: quantities that no scale reaches."""
        return [
            f"layer {index}: {quantity} reaches {self.layers[index].maxima[quantity]:.3g}"
            for index in range(len(self.layers))
            for quantity in QUANTITIES
            if self.scaled_maximum(index, quantity) > FLOAT16_MAX
        ]

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for index, (seen, scales) in enumerate(zip(self.layers, self.scales.layers, strict=True)):
            subnormal, zero = seen.lost_share(scales.hidden)
            rows.append(
                {
                    "layer": index,
                    "maxima": seen.maxima,
                    "scales": asdict(scales),
                    "hidden_subnormal_share": subnormal,
                    "hidden_zero_share": zero,
                }
            )
        return {
            "kind": self.config.kind,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "headroom": self.headroom,
            "embedding_scale": self.scales.embedding,
            "layers": rows,
            "beyond_float16": self.beyond(),
        }


@torch.no_grad()
def calibrate(
    source: ModelSource = None,
    prompts: Sequence[str] = PROMPTS,
    headroom: float = 4.0,
    subfolder: str = "",
    tokenizer: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Runs the encoder in float32 over prompts and chooses the scales that leave ``headroom`` below 65504.

    Args:
        source, subfolder: as for :func:`nai_t5_core.load.load_encoder`.
        prompts: each is cut to 512 tokens.
        headroom: how many times larger than seen a value may become before float16 overflows; at least 1.
        tokenizer: a tokenizer file or folder, where the source has none.
        progress: called with (layers done, layers in all).

    Raises:
        CheckpointError: the checkpoint is unusable.
        ValueError: no tokenizer or that of another model, no prompts, or a headroom below 1.
    """
    if not headroom >= 1:
        raise ValueError(f"headroom={headroom}; it must be at least 1, which leaves no room at all")
    tokens = find_tokenizer_for(source, subfolder, tokenizer)(prompts, MAX_LENGTH)
    examination = examine(source, subfolder)
    examination.refuse_faults()
    config = examination.config.encoder_only()
    ids, mask = torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask).bool()
    if int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token id {int(ids.max())}, the model has {config.vocab_size} tokens; "
            "the tokenizer belongs to another model"
        )
    packing = pack_batch(mask, mask.shape[0], mask.shape[1], "skip")
    plan = DocumentAttention(packing.groups, logit_scale(config))

    table = examination.read("shared.weight")
    residual = table[packing.pack(ids)].float()
    largest_embedding = largest_absolute(table)
    del table
    layers, attend = [], None
    for index in range(config.num_layers):
        block = _load_block(examination, config, index)
        if attend is None or config.bias_per_layer:
            attend = _attend(block, config, plan)
        layers.append(LayerMaxima())
        residual = observe(block, LayerScales(), residual, attend, layers[-1])
        if progress is not None:
            progress(index + 1, config.num_layers)
    scales = tuple(scales_for(seen, headroom, config.can_scale_hidden) for seen in layers)
    embedding = scale_for(largest_embedding, headroom=1)
    return Calibration(config, len(prompts), packing.tokens, headroom, tuple(layers), StackScales(scales, embedding))


def _load_block(examination: Examination, config: T5Config, index: int) -> EncoderBlock:
    """One layer in float32, in the separate layout."""
    prefix = f"encoder.block.{index}."
    names = [name for name in encoder_tensors(config) if name.startswith(prefix)]
    has_bias = any("relative_attention_bias" in name for name in names)
    block = EncoderBlock.separate(config, has_bias, LayerScales(), NoInit, device="meta", dtype=torch.float32)
    block.load_state_dict({name.removeprefix(prefix): examination.read(name).float() for name in names}, assign=True)
    return block


def _attend(block: Any, config: T5Config, plan: DocumentAttention) -> Attend:
    weight: Tensor = block.layer[0].SelfAttention.relative_attention_bias.weight
    return plan.layer(distance_table(weight, config.relative_attention_max_distance))


def render(calibration: Calibration) -> RenderableType:
    """A table of maxima and scales for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    table = Table(
        title=f"largest absolute values over {calibration.tokens:,} tokens", title_justify="left", box=box.SIMPLE
    )
    headings = ("q", "k", "v", "attn", "gate", "up", "hidden", "ff")
    for heading in ("", *headings, "scales", "lost"):
        table.add_column(heading, justify="right")
    for row in calibration.to_dict()["layers"]:
        maxima = [_number(value) for value in row["maxima"].values()]
        scales = " ".join(_fraction(row["scales"][name]) for name in ("attention_out", "hidden", "feed_forward_out"))
        lost = row["hidden_subnormal_share"] + row["hidden_zero_share"]
        table.add_row(str(row["layer"]), *maxima, scales, f"{lost:.2%}")
    notes = [
        "attn, ff: what attention and feed-forward add to the residual",
        f"scales of attn, hidden, ff for headroom {calibration.headroom:g}; "
        f"of the embedding {_fraction(calibration.scales.embedding)}",
        "lost: share of the hidden values that are subnormal or zero in float16, after scaling",
        *(f"[red]exceeds float16 whatever the scales:[/red] {fault}" for fault in calibration.beyond()),
    ]
    return Group(table, *notes)


def _number(value: float) -> str:
    return f"[red]{value:,.0f}[/red]" if value > FLOAT16_MAX else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _fraction(scale: float) -> str:
    return "1" if scale == 1 else f"1/{round(1 / scale)}"


def plot(calibration: Calibration, path: Path) -> None:
    """Draws the maxima of every layer against float16's limit, before and after scaling, into a PNG file.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('the plot needs matplotlib: pip install "comfy-nai-t5[plot]"') from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(calibration.layers))
    quantities = ("attention_out", "hidden", "feed_forward_out")
    for color, quantity in zip(("tab:blue", "tab:orange", "tab:green"), quantities, strict=True):
        before = [seen.maxima[quantity] for seen in calibration.layers]
        after = [calibration.scaled_maximum(index, quantity) for index in places]
        axes.plot(
            places, before, color=color, marker="o", markersize=4, label=f"{quantity.replace('_', ' ')}, as it is"
        )
        axes.plot(places, after, color=color, linestyle="--", marker="x", markersize=5, label="… scaled")
    axes.axhline(FLOAT16_MAX, color="tab:red", linewidth=1)
    axes.annotate("float16 ends here: 65504", (0, FLOAT16_MAX), (0, 4), textcoords="offset points", color="tab:red")
    axes.set(yscale="log", xlabel="layer", ylabel="largest absolute value", title="Activations against float16's range")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", ncols=3, loc="outside lower center")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
