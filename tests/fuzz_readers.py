"""Everything that reads a file, each with a small whole file to damage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from checkpoints import scaled_float8
from fuzz_damage import Damage, damaged_bytes, damaged_json, damaged_safetensors, damaged_state, damaged_text
from fuzz_files import (
    CONFIG,
    ENCODER,
    STATE,
    as_json,
    bpe_json,
    rules,
    sentencepiece_model,
    torch_file,
    training_config,
)
from fuzz_quantised import quantised_files
from safetensors.torch import save
from toy_quantised import note

from comfy_nai_t5.embeddings import describe, load_conditioning, save_conditioning, save_core_conditioning
from nai_t5_core.facts.config import config_to_hf
from nai_t5_core.facts.scales import LayerScales, unscaled
from nai_t5_core.lora.files import read_lora
from nai_t5_core.lora.live import LiveLoras
from nai_t5_core.lora.loras import Loras
from nai_t5_core.prompts.cache.entry import from_bytes, to_bytes
from nai_t5_core.prompts.cache.key import Key
from nai_t5_core.prompts.text_encoder import TextEncoder
from nai_t5_core.prompts.textual_inversion import add_embeddings
from nai_t5_core.tokenizer import (
    Tokenizer,
    load_tokenizer,
    sentencepiece_to_tokenizer_json,
    tokenizer_json_to_sentencepiece,
)
from nai_t5_core.training import checkpoints as training_checkpoints
from nai_t5_core.training.batches import read_texts
from nai_t5_core.training.config import DataSection, read_config
from nai_t5_core.training.losses import read_losses
from nai_t5_core.weights.convert import convert
from nai_t5_core.weights.load import load_encoder, load_t5
from nai_t5_core.weights.scales_file import read_scales, write_scales

PROMPT = "a ﬁne ＦＯＸ <extra_id_0> 猫 e\u0301"


@dataclass(frozen=True)
class Reader:
    """A file of a kind, and what reads it.

    Attributes:
        file: the name of the file that is damaged.
        content: the whole one.
        damage: from the whole file to damaged ones.
        read: reads what the folder holds.
        beside: the other files of the folder, which stay whole.
    """

    file: str
    content: bytes
    damage: Callable[[bytes], Damage]
    read: Callable[[Path], Any]
    beside: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path, content: bytes) -> None:
        for name, other in {**self.beside, self.file: content}.items():
            (folder / name).write_bytes(other)


def encode(tokenizer: Tokenizer) -> None:
    """Uses a tokenizer in all its ways."""
    batch = tokenizer([PROMPT, ""], max_length=5)
    tokenizer.decode(batch.input_ids[0])
    tokenizer.count(PROMPT)


def encoder_of(file: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> None:
        stack = load_encoder(folder / file, "float32", "cpu")
        stack(torch.tensor([[3, 1]]))

    return read


def tokenizer_of(file: str) -> Callable[[Path], Any]:
    return lambda folder: encode(load_tokenizer(folder / file))


def lora_of(file: str) -> Callable[[Path], Any]:
    stack = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False).stack

    def read(folder: Path) -> None:
        lora = read_lora(folder / file)
        for loras in (Loras(stack), LiveLoras(stack)):
            loras.add(lora, 0.5)
            loras.clear()

    return read


def _whole_t5(folder: Path) -> None:
    model = load_t5(folder, "float32", "cpu")
    model.generate(torch.tensor([[3, 1]]), max_new_tokens=2)


def _converted(folder: Path) -> None:
    convert(folder / "model.safetensors", folder / "converted.safetensors")


def _both_tokenizers(folder: Path) -> None:
    encode(load_tokenizer(folder / "tokenizer.json"))
    tokenizer_json_to_sentencepiece((folder / "tokenizer.json").read_bytes())


def _both_models(folder: Path) -> None:
    encode(load_tokenizer(folder / "spiece.model"))
    sentencepiece_to_tokenizer_json((folder / "spiece.model").read_bytes())


def _embedding(folder: Path) -> None:
    describe(load_conditioning(folder / "saved.safetensors")[0])


def _vectors(folder: Path) -> None:
    encoder = TextEncoder.from_pretrained(dtype="float32", device="cpu", optimize=False)
    file = next(folder.glob("vectors.*"))
    add_embeddings(encoder, file, "<fox>")
    encoder.encode(["a <fox>"])


def _texts(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "spiece.model")
    read_texts(DataSection(objective="pairs", file=folder / "pairs.jsonl", rows=1), tokenizer)


def _training_state() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters())


def _training_checkpoint(folder: Path) -> None:
    training_checkpoints.load(folder / "checkpoint.pt", *_training_state(), {"seed": 1})


@cache
def readers() -> dict[str, Reader]:
    """Every reader by its name."""
    with tempfile.TemporaryDirectory() as made:
        return _readers(Path(made))


def _readers(folder: Path) -> dict[str, Reader]:
    """Whole files that only the library itself writes are made in ``folder``."""
    hf_config = as_json(config_to_hf(CONFIG))
    whole = save(STATE)
    spiece = sentencepiece_model(normalization_rule_tsv=rules(folder))
    bpe = sentencepiece_model(vocab_size=300, model_type="bpe", byte_fallback=True)
    shard_names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = sorted(ENCODER)
    shards = {file: save({name: ENCODER[name] for name in names[number::2]}) for number, file in enumerate(shard_names)}
    index = {"metadata": {}, "weight_map": {name: shard_names[place % 2] for place, name in enumerate(names)}}
    float8 = {
        **scaled_float8(ENCODER, "weight_scale")[0],
        "encoder.block.0.layer.0.SelfAttention.q.comfy_quant": note(format="float8_e4m3fn"),
    }
    found = {
        "safetensors": Reader("model.safetensors", save(ENCODER), damaged_safetensors, encoder_of("model.safetensors")),
        "safetensors, whole T5": Reader(
            "model.safetensors", whole, damaged_safetensors, _whole_t5, {"config.json": hf_config}
        ),
        "safetensors, float8": Reader(
            "t5.safetensors", save(float8), damaged_safetensors, encoder_of("t5.safetensors")
        ),
        "convert": Reader("model.safetensors", save(ENCODER), damaged_safetensors, _converted),
        "config.json": Reader("config.json", hf_config, damaged_json, _whole_t5, {"model.safetensors": whole}),
        "index.json": Reader(
            "model.safetensors.index.json",
            as_json(index),
            damaged_json,
            encoder_of("model.safetensors.index.json"),
            shards,
        ),
        "PyTorch": Reader("t5.bin", torch_file(ENCODER), damaged_state, encoder_of("t5.bin")),
        "PyTorch before 2020": Reader(
            "t5.pth",
            torch_file({"state_dict": ENCODER, "step": 3}, _use_new_zipfile_serialization=False),
            damaged_state,
            encoder_of("t5.pth"),
        ),
        "tokenizer.json": Reader(
            "tokenizer.json", sentencepiece_to_tokenizer_json(spiece), damaged_json, _both_tokenizers
        ),
        "tokenizer.json, BPE": Reader("tokenizer.json", bpe_json(), damaged_json, tokenizer_of("tokenizer.json")),
        "spiece.model": Reader("spiece.model", spiece, damaged_bytes, _both_models),
        "spiece.model, BPE": Reader("spiece.model", bpe, damaged_bytes, tokenizer_of("spiece.model")),
        **_added_tokens(spiece),
        **_loras(),
        "float16 scales": Reader(
            "scales.json", _scales(folder), damaged_json, lambda folder: read_scales(folder / "scales.json")
        ),
        "cached embedding": Reader("e.safetensors", _cached(), damaged_safetensors, _from_cache),
        "ComfyUI's conditioning": Reader(
            "saved.safetensors", _core_conditioning(folder), damaged_safetensors, _embedding
        ),
        "saved embedding": Reader("saved.safetensors", _conditioning(folder), damaged_safetensors, _embedding),
        "textual inversion": Reader(
            "vectors.safetensors", save({"t5xxl": torch.ones(2, 128)}), damaged_safetensors, _vectors
        ),
        "textual inversion, PyTorch": Reader(
            "vectors.bin", torch_file({"<fox>": torch.ones(128)}), damaged_state, _vectors
        ),
        "training config": Reader(
            "train.toml",
            training_config(),
            damaged_text,
            lambda folder: read_config(folder / "train.toml"),
            {"spiece.model": spiece},
        ),
        "training pairs": Reader(
            "pairs.jsonl",
            b"\n".join(as_json({"input": f"a {word}", "target": word}) for word in ("cat", "fox", "mat")),
            damaged_text,
            _texts,
            {"spiece.model": spiece},
        ),
        "training losses": Reader(
            "losses.jsonl",
            b"".join(
                as_json({"step": step, "loss": 1.5, "learning_rate": 0.1, "gradient_norm": 1.0, "targets": 7}) + b"\n"
                for step in (1, 2)
            ),
            damaged_text,
            lambda folder: read_losses(folder / "losses.jsonl"),
        ),
        "training checkpoint": Reader("checkpoint.pt", _checkpoint(folder), damaged_bytes, _training_checkpoint),
        **_native(folder, spiece),
        **_gguf(folder, spiece),
        **{
            name: Reader(file, content, damage, encoder_of(file))
            for name, (file, content, damage) in quantised_files(folder).items()
        },
    }
    return dict(sorted(found.items()))


def _added_tokens(spiece: bytes) -> dict[str, Reader]:
    config = as_json(
        {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": 100,
            "pad_token": "<pad>",
            "additional_special_tokens": ["<extra_id_0>", {"content": "<own>", "lstrip": True}],
            "added_tokens_decoder": {"2": {"content": "<unk>", "special": True}},
        }
    )
    as_tokenizer_json = sentencepiece_to_tokenizer_json(spiece)
    return {
        "tokenizer_config.json": Reader(
            "tokenizer_config.json", config, damaged_json, tokenizer_of(""), {"spiece.model": spiece}
        ),
        "tokenizer_config.json beside a json": Reader(
            "tokenizer_config.json", config, damaged_json, tokenizer_of(""), {"tokenizer.json": as_tokenizer_json}
        ),
        "added_tokens.json": Reader(
            "added_tokens.json", as_json({"<unk>": 2}), damaged_json, tokenizer_of(""), {"spiece.model": spiece}
        ),
        "special_tokens_map.json": Reader(
            "special_tokens_map.json",
            as_json({"pad_token": "<pad>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["<a>"]}),
            damaged_json,
            tokenizer_of(""),
            {"spiece.model": spiece},
        ),
    }


def _loras() -> dict[str, Reader]:
    """Of the embedded model, which is 128 wide, with 4 heads of 32."""
    q = "encoder.block.0.layer.0.SelfAttention.q"
    up, down = torch.ones(128, 2), torch.ones(2, 128)
    peft = {f"base_model.model.{q}.lora_A.weight": down, f"base_model.model.{q}.lora_B.weight": up}
    adapter = as_json(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"SelfAttention.q": 3, r".*\.k": 1}}
    )
    kohya = {f"lora_te2_{q.replace('.', '_')}.{name}": value for name, value in _kohya(up, down).items()}
    kohya |= {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}
    diffusers = {f"text_encoder_2.{q}.lora_A.weight": down, f"text_encoder_2.{q}.lora_B.weight": up}
    header = {"lora_adapter_metadata": json.dumps({"text_encoder_2.lora_alpha": 4, "text_encoder_2.use_rslora": True})}
    name = "adapter_model.safetensors"
    return {
        "LoRA of peft": Reader(name, save(peft), damaged_safetensors, lora_of(""), {"adapter_config.json": adapter}),
        "adapter_config.json": Reader("adapter_config.json", adapter, damaged_json, lora_of(""), {name: save(peft)}),
        "LoRA of kohya": Reader("l.safetensors", save(kohya), damaged_safetensors, lora_of("l.safetensors")),
        "LoRA of diffusers": Reader(
            "l.safetensors", save(diffusers, header), damaged_safetensors, lora_of("l.safetensors")
        ),
        "LoRA, PyTorch": Reader("l.pt", torch_file(kohya), damaged_state, lora_of("l.pt")),
    }


def _kohya(up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}


def _scales(folder: Path) -> bytes:
    scales = unscaled(2).with_layer(1, LayerScales(0.5, 0.25, 0.5))
    write_scales(folder / "scales.json", scales, scales)
    return (folder / "scales.json").read_bytes()


def _conditioning(folder: Path) -> bytes:
    conditioning = [[torch.ones(1, 2, 4), {"attention_mask": torch.ones(1, 2), "strength": 1.0}]] * 2
    return save_conditioning(conditioning, folder / "saved.safetensors", note="a cat").read_bytes()


def _core_conditioning(folder: Path) -> bytes:
    extras = {"pooled_output": torch.ones(1, 2), "strength": 1.0, "list": [torch.ones(1), torch.ones(2)]}
    return save_core_conditioning([[torch.ones(1, 2, 4), extras]], folder / "core.safetensors").read_bytes()


def _cached() -> bytes:
    return to_bytes(Key("a cat"), torch.ones(2, 4), "int8")


def _from_cache(folder: Path) -> None:
    entry = from_bytes((folder / "e.safetensors").read_bytes())
    assert entry.rows.ndim == 2


def _checkpoint(folder: Path) -> bytes:
    model, optimizer = _training_state()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    training_checkpoints.save(folder / "checkpoint.pt", 3, model, optimizer, {"seed": 1})
    return (folder / "checkpoint.pt").read_bytes()


def _native(folder: Path, spiece: bytes) -> dict[str, Reader]:
    model = folder / "whole"
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_bytes(save(STATE))
    (model / "config.json").write_bytes(as_json(config_to_hf(CONFIG)))
    (model / "spiece.model").write_bytes(spiece)
    convert(model, folder / "own.safetensors", dtype="float16", scales=unscaled(2).with_layer(1, LayerScales(0.5)))
    content = (folder / "own.safetensors").read_bytes()

    def read(folder: Path) -> None:
        TextEncoder.from_pretrained(folder / "own.safetensors", "float32", "cpu", optimize=False).encode([PROMPT])

    return {"our own": Reader("own.safetensors", content, damaged_safetensors, read)}


def _gguf(folder: Path, spiece: bytes) -> dict[str, Reader]:
    from fuzz_gguf import damaged_gguf
    from toy_gguf import write_gguf

    content = write_gguf(folder / "t5.gguf", ENCODER, "F16", spiece, config=CONFIG.encoder_only()).read_bytes()
    return {
        "GGUF": Reader("t5.gguf", content, damaged_gguf, encoder_of("t5.gguf")),
        "GGUF, tokenizer": Reader("t5.gguf", content, damaged_gguf, tokenizer_of("t5.gguf")),
    }
