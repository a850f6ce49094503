"""What a calibration found, as data, as tables for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nai_t5_core.facts.config import T5Config
from nai_t5_core.facts.scales import FLOAT16_MAX, StackScales
from nai_t5_core.float16.maxima import LayerMaxima
from nai_t5_core.weights.whole_files import replacing

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

# The quantities that have a scale, in the order of their computation, with their colours in the plot.
_SCALED = {
    "attention_out": "tab:blue",
    "cross_attention_out": "tab:purple",
    "hidden": "tab:orange",
    "feed_forward_out": "tab:green",
}
_HEADINGS = {
    "attention_out": "attn",
    "cross_q": "cross q",
    "cross_k": "cross k",
    "cross_v": "cross v",
    "cross_attention_out": "cross",
    "feed_forward_out": "ff",
}


@dataclass(frozen=True)
class StackMaxima:
    """What was seen in an encoder or a decoder, and chosen for it; ``layers`` and ``scales.layers`` go together."""

    layers: tuple[LayerMaxima, ...]
    scales: StackScales

    def scaled_maximum(self, index: int, quantity: str) -> float:
        """The largest value of a quantity after scaling; what has no scale is as it was."""
        scales = asdict(self.scales.layers[index])
        scale = scales["hidden"] if quantity == "up" else scales.get(quantity, 1.0)
        return float(self.layers[index].maxima[quantity] * scale)

    def beyond(self) -> Iterator[str]:
        """What exceeds float16 even so, in words: quantities that no scale reaches."""
        for index, seen in enumerate(self.layers):
            for quantity, largest in seen.maxima.items():
                if self.scaled_maximum(index, quantity) > FLOAT16_MAX:
                    yield f"layer {index}: {quantity} reaches {largest:.3g}"

    def rows(self) -> list[dict[str, Any]]:
        """Plain values of every layer, for JSON."""
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
        return rows


@dataclass(frozen=True)
class Calibration:
    """What a calibration saw and chose, in the encoder and, where it was asked for, in the decoder."""

    config: T5Config
    prompts: int
    tokens: int
    headroom: float
    encoder: StackMaxima
    decoder: StackMaxima | None = None

    @property
    def scales(self) -> StackScales:
        """The encoder's, and the embedding's."""
        return self.encoder.scales

    @property
    def decoder_scales(self) -> StackScales | None:
        return None if self.decoder is None else self.decoder.scales

    def beyond(self) -> list[str]:
        """What exceeds float16 whatever the scales, in words."""
        in_decoder = () if self.decoder is None else self.decoder.beyond()
        return [*self.encoder.beyond(), *(f"decoder {fault}" for fault in in_decoder)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.config.kind,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "headroom": self.headroom,
            "embedding_scale": self.scales.embedding,
            "layers": self.encoder.rows(),
            **({} if self.decoder is None else {"decoder_layers": self.decoder.rows()}),
            "beyond_float16": self.beyond(),
        }


def render(calibration: Calibration) -> RenderableType:
    """Tables of maxima and scales for a terminal."""
    from rich.console import Group
    from rich.text import Text

    title = f"largest absolute values over {calibration.tokens:,} tokens"
    tables: list[RenderableType] = [_table(calibration.encoder, title)]
    if calibration.decoder is not None:
        tables.append(_table(calibration.decoder, "the same in the decoder"))
    crossing = ", cross" if calibration.decoder is not None else ""
    notes: list[RenderableType] = [
        f"attn{crossing}, ff: what attention and feed-forward add to the residual",
        f"scales of attn{crossing}, hidden, ff for headroom {calibration.headroom:g}; "
        f"of the embedding {_fraction(calibration.scales.embedding)}",
        "lost: share of the hidden values that are subnormal or zero in float16, after scaling",
        *(Text.assemble(("exceeds float16 whatever the scales: ", "red"), fault) for fault in calibration.beyond()),
    ]
    return Group(*tables, *notes)


def _table(stack: StackMaxima, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    quantities = stack.layers[0].maxima
    for heading in ("", *(_HEADINGS.get(name, name) for name in quantities), "scales", "lost"):
        table.add_column(heading, justify="right")
    for row in stack.rows():
        maxima = [_number(value) for value in row["maxima"].values()]
        scales = " ".join(_fraction(row["scales"][name]) for name in _SCALED if name in quantities)
        lost = row["hidden_subnormal_share"] + row["hidden_zero_share"]
        table.add_row(str(row["layer"]), *maxima, scales, f"{lost:.2%}")
    return table


def _number(value: float) -> Text:
    from rich.text import Text

    shown = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
    return Text(shown, "red" if value > FLOAT16_MAX else "")


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
    stacks = {"Encoder": calibration.encoder}
    if calibration.decoder is not None:
        stacks["Decoder"] = calibration.decoder
    figure = Figure(figsize=(3 + 6 * len(stacks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(stacks), squeeze=False, sharey=True)[0]
    for axes, (name, stack) in zip(panels, stacks.items(), strict=True):
        _draw(axes, stack)
        axes.set(xlabel="layer", title=f"{name}: activations against float16's range")
    panels[0].set(yscale="log", ylabel="largest absolute value")
    # The last panel has the lines of all.
    figure.legend(*panels[-1].get_legend_handles_labels(), fontsize="small", ncols=3, loc="outside lower center")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _draw(axes: Any, stack: StackMaxima) -> None:
    places = range(len(stack.layers))
    for quantity, color in _SCALED.items():
        if quantity not in stack.layers[0].maxima:
            continue
        before = [seen.maxima[quantity] for seen in stack.layers]
        after = [stack.scaled_maximum(index, quantity) for index in places]
        label = f"{quantity.replace('_', ' ')}, as it is"
        axes.plot(places, before, color=color, marker="o", markersize=4, label=label)
        axes.plot(places, after, color=color, linestyle="--", marker="x", markersize=5, label="… scaled")
    axes.axhline(FLOAT16_MAX, color="tab:red", linewidth=1)
    axes.annotate("float16 ends here: 65504", (0, FLOAT16_MAX), (0, 4), textcoords="offset points", color="tab:red")
    axes.grid(alpha=0.3)
