"""Tensor names of the files that people have, to the Hugging Face names that everything here speaks.

Tables and pure functions; nothing is read. Unknown names are listed and ignored ones have a reason, so that a load
never drops a tensor in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from nai_t5_core.weights.formats import CheckpointError


@dataclass(frozen=True)
class Naming:
    """How a kind of file spells the modules of a T5 encoder.

    Attributes:
        name: whose spelling it is.
        first_query: the module of the first layer's queries, with all that stands before the T5's names as ``prefix``.
        beside: a module that such a file has as well; other models have one of the same name as the first.
        without: a module that no such file has; one that is spelled alike has it.
        modules: beginnings of names, and the Hugging Face names that stand for them.
        tokenizer: the folder beside such a file that has its tokenizer.
    """

    name: str
    first_query: re.Pattern[str]
    beside: str = ""
    without: str = ""
    modules: tuple[tuple[re.Pattern[str], str], ...] = ()
    tokenizer: str = ""

    def prefixes(self, names: Collection[str]) -> set[str]:
        """What stands before each T5 of this spelling among the names of a file."""
        found = {match["prefix"] for name in names if (match := self.first_query.match(name))}

        def has(beginning: str) -> bool:
            return any(name.startswith(beginning) for name in names)

        fitting = {prefix for prefix in found if has(prefix + self.beside)}
        return {prefix for prefix in fitting if not (self.without and has(prefix + self.without))}

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a tensor; an unknown name comes back as it is."""
        for beginning, ours in self.modules:
            if match := beginning.match(name):
                return match.expand(ours) + name[match.end() :]
        return name


def _spelled(*modules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    # A module's name ends at a dot.
    return tuple((re.compile(rf"{theirs}(?=\.)"), ours) for theirs, ours in modules)


def _llama_cpp(ffn_up: str) -> tuple[tuple[re.Pattern[str], str], ...]:
    """llama.cpp's spelling of a T5; what it calls ffn_up is wi_1 beside a gate, and else wi."""
    feed_forward = {"ffn_gate": "wi_0", "ffn_up": ffn_up, "ffn_down": "wo"}
    pairs = [(r"token_embd", "shared"), (r"output", "lm_head")]
    for short, stack, last in (("enc", "encoder", 1), ("dec", "decoder", 2)):
        block, ours = rf"{short}\.blk\.(\d+)", rf"{stack}.block.\1.layer"
        pairs += [
            (rf"{short}\.output_norm", f"{stack}.final_layer_norm"),
            (rf"{block}\.attn_([qkvo])", rf"{ours}.0.SelfAttention.\2"),
            (rf"{block}\.attn_rel_b", f"{ours}.0.SelfAttention.relative_attention_bias"),
            (rf"{block}\.attn_norm", f"{ours}.0.layer_norm"),
            (rf"{block}\.cross_attn_([qkvo])", rf"{ours}.1.EncDecAttention.\2"),
            (rf"{block}\.cross_attn_rel_b", f"{ours}.1.EncDecAttention.relative_attention_bias"),
            (rf"{block}\.cross_attn_norm", f"{ours}.1.layer_norm"),
            (rf"{block}\.ffn_norm", f"{ours}.{last}.layer_norm"),
        ]
        pairs += [(rf"{block}\.{ffn}", f"{ours}.{last}.DenseReluDense.{name}") for ffn, name in feed_forward.items()]
    return _spelled(*pairs)


_LAYER = r"encoder.block.\1.layer"
_LLAMA_CPP = re.compile(r"(?P<prefix>(.*\.)?)enc\.blk\.0\.attn_q\.")
_GATE = "enc.blk.0.ffn_gate."
NAMINGS = (
    Naming("Hugging Face", re.compile(r"(?P<prefix>.*?)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.")),
    # A T5Stack that was saved by itself.
    Naming(
        "T5Stack",
        re.compile(r"(?P<prefix>(.*\.)?)(?<!encoder\.)(?<!decoder\.)block\.0\.layer\.0\.SelfAttention\.q\."),
        modules=_spelled(
            (r"embed_tokens", "shared"),
            (r"block", "encoder.block"),
            (r"final_layer_norm", "encoder.final_layer_norm"),
        ),
    ),
    # The UMT5 of Wan's own repository, and the files made of it.
    Naming(
        "Wan",
        re.compile(r"(?P<prefix>(.*\.)?)blocks\.0\.attn\.q\."),
        beside="token_embedding.",
        modules=_spelled(
            (r"token_embedding", "shared"),
            (r"norm", "encoder.final_layer_norm"),
            (r"blocks\.(\d+)\.norm1", rf"{_LAYER}.0.layer_norm"),
            (r"blocks\.(\d+)\.norm2", rf"{_LAYER}.1.layer_norm"),
            (r"blocks\.(\d+)\.attn\.([qkvo])", rf"{_LAYER}.0.SelfAttention.\2"),
            (r"blocks\.(\d+)\.pos_embedding\.embedding", rf"{_LAYER}.0.SelfAttention.relative_attention_bias"),
            (r"blocks\.(\d+)\.ffn\.gate\.0", rf"{_LAYER}.1.DenseReluDense.wi_0"),
            (r"blocks\.(\d+)\.ffn\.fc1", rf"{_LAYER}.1.DenseReluDense.wi_1"),
            (r"blocks\.(\d+)\.ffn\.fc2", rf"{_LAYER}.1.DenseReluDense.wo"),
            # Where all layers share one, as in T5.
            (r"pos_embedding\.embedding", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ),
        tokenizer="google/umt5-xxl",
    ),
    Naming("llama.cpp", _LLAMA_CPP, beside=_GATE, modules=_llama_cpp(ffn_up="wi_1")),
    Naming("llama.cpp, without gates", _LLAMA_CPP, without=_GATE, modules=_llama_cpp(ffn_up="wi")),
)

# Every tensor a T5 has, in Hugging Face's spelling.
_T5_TENSOR = re.compile(
    r"shared\.weight|lm_head\.weight|(en|de)coder\.final_layer_norm\.weight"
    r"|(en|de)coder\.block\.\d+\.layer\.\d\.("
    r"SelfAttention\.(q|k|v|o|relative_attention_bias)|EncDecAttention\.(q|k|v|o)"
    r"|DenseReluDense\.(wi|wi_0|wi_1|wo)|layer_norm)\.weight"
)

# The stacks' own names for the embedding, which is stored as shared.weight as well; some files have only one of them.
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# The tokenizer of ComfyUI's single files, which stands before the weights' prefix or under it.
_TOKENIZER = re.compile(r"(.*\.)?(spiece_model|tokenizer_json)")

# Names that carry no weight, and why they may be left out.
_IGNORED = (
    (_TOKENIZER, "a tokenizer"),
    (re.compile(r"scaled_fp8"), "marks a file with scaled float8 weights"),
    (re.compile(r"logit_scale"), "a number of CLIP's that ComfyUI saves beside every text encoder; no T5 reads it"),
    (re.compile(r".*\.comfy_quant"), "says how a weight is quantised, which its dtype says as well"),
    (re.compile(r".*\.(scale_input|input_scale)"), "scale of float8 activations, which are not used"),
    (
        re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
        "left in the published v1.0 files; no model reads it",
    ),
)

# A scaled float8 weight is its values times this one number; ComfyUI has spelled it in two ways.
_SCALE = re.compile(r"(?P<module>.*)\.(scale_weight|weight_scale)")

# What other models' files are known by, to say what was given instead of a T5. A LoRA has the names of what it is for.
_OTHER_MODELS = (
    ("lora", "a LoRA"),
    ("text_model.encoder.layers.", "a CLIP text encoder"),
    ("transformer.resblocks.", "an OpenCLIP text encoder"),
    ("down_blocks.", "a UNet or VAE"),
    ("input_blocks.", "a UNet"),
    ("double_blocks.", "a diffusion transformer"),
    ("joint_blocks.", "a diffusion transformer"),
    ("transformer_blocks.", "a diffusion transformer"),
    ("cross_attn.", "a diffusion transformer"),
    ("decoder.up.", "a VAE"),
    ("model.layers.", "a decoder-only language model"),
    ("encoder.layer.", "a BERT-like encoder"),
)


@dataclass
class KeyMap:
    """Where each tensor of the T5 is in the file."""

    names: dict[str, str] = field(default_factory=dict)
    """Hugging Face name to the file's name."""
    scales: dict[str, str] = field(default_factory=dict)
    """Hugging Face name of a float8 weight to the file's name of its scale."""
    ignored: dict[str, str] = field(default_factory=dict)
    """The file's name to the reason why it is not used."""
    unknown: list[str] = field(default_factory=list)
    """The file's names that no T5 has, though they stand among its tensors."""
    tokenizer: str | None = None
    """The file's name for the tokenizer of this T5."""
    prefix: str = ""
    """What stands before every name of the T5 in the file."""
    naming: Naming = NAMINGS[0]
    """How the file spells the names behind it."""

    def hf_name(self, full: str) -> str | None:
        """The Hugging Face name of one of the file's tensors, known or not; None where it is no part of the T5."""
        return self.naming.hf_name(full.removeprefix(self.prefix)) if full.startswith(self.prefix) else None


def map_names(names: Iterable[str], source: str) -> KeyMap:
    """Finds the T5 among the tensor names of a file.

    Raises:
        CheckpointError: no T5 or several in the file.
    """
    names = list(names)
    naming, prefix = _find_t5(names, source)
    keymap = KeyMap(prefix=prefix, naming=naming, tokenizer=_nearest_tokenizer(names, prefix))
    copies = {}
    for full in names:
        name = keymap.hf_name(full)
        scale = _SCALE.fullmatch(name or "")
        reason = next((reason for pattern, reason in _IGNORED if pattern.fullmatch(name or "")), None)
        if name is None:
            is_tokenizer = _TOKENIZER.fullmatch(full)
            keymap.ignored[full] = "a tokenizer" if is_tokenizer else f"not under {prefix!r}: another part of the file"
        elif name in _EMBEDDING_COPIES:
            copies[name] = full
        elif _T5_TENSOR.fullmatch(name):
            keymap.names[name] = full
        elif scale:
            keymap.scales[f"{scale['module']}.weight"] = full
        elif reason:
            keymap.ignored[full] = reason
        else:
            keymap.unknown.append(full)
    for name in sorted(copies, key=_EMBEDDING_COPIES.index):
        _place_embedding_copy(keymap, name, copies[name])
    return keymap


def holds_t5(names: Collection[str]) -> bool:
    """Whether there is a T5 encoder among the tensor names of a file, in any spelling and under any prefix."""
    return any(naming.prefixes(names) for naming in NAMINGS)


def _place_embedding_copy(keymap: KeyMap, name: str, full: str) -> None:
    scale = keymap.scales.pop(name, None)
    if "shared.weight" in keymap.names:
        keymap.ignored[full] = "a copy of the embedding, shared.weight"
        keymap.ignored |= {scale: "the scale of that copy"} if scale else {}
    else:
        keymap.names["shared.weight"] = full
        keymap.scales |= {"shared.weight": scale} if scale else {}


def _nearest_tokenizer(names: list[str], prefix: str) -> str | None:
    """The tokenizer that stands nearest before the weights; one beside that way belongs to another model.

    A whole pipeline in one file has ``text_encoders.spiece_model`` for ``text_encoders.umt5xxl.transformer.…``.
    """
    before = {full: match[1] or "" for full in names if (match := _TOKENIZER.fullmatch(full))}
    on_the_way = [full for full in before if prefix.startswith(before[full])]
    return max(on_the_way, key=len, default=None)


def _find_t5(names: list[str], source: str) -> tuple[Naming, str]:
    found = [(naming, prefix) for naming in NAMINGS for prefix in sorted(naming.prefixes(names))]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{source} holds {len(found)} T5 encoders, under {', '.join(repr(prefix) for _, prefix in found)}"
        )
    guess = next((kind for mark, kind in _OTHER_MODELS if any(mark in name for name in names)), None)
    looks = f"looks like {guess}" if guess else f"begins with {', '.join(sorted(names)[:3]) or 'nothing'}"
    raise CheckpointError(
        f"{source} is no T5: it {looks}, and has no encoder.block.0.layer.0.SelfAttention.q (nor what Wan's files call "
        "it, blocks.0.attn.q); give the file of the T5 text encoder"
    )
