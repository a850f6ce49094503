"""Tiny random models under the names that diffusers' own tests ask the hub for, laid out as the hub's cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from toy_parts import T5, UMT5, VOCABULARY, llama, text_encoder, tokenizer
from transformers import BertConfig, BertModel, ClapFeatureExtractor

from nai_t5_core.facts.config import T5Config

REVISION = "0" * 40
# Some tests make a T5 of their own for the hub's tokenizer: it has to keep to the vocabulary that they give theirs.
T5_VOCABULARY, PIECES = 1103, 1000


def write_hub(hub: Path) -> None:
    """Fills a folder with what the tests ask for, as if it had been downloaded."""
    for name, write in _REPOSITORIES.items():
        repository = hub / f"models--hf-internal-testing--{name}"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
        write(snapshot)


def _write_t5(folder: Path) -> None:
    text_encoder(_small(T5.model_copy(update={"gated": False, "activation": "relu", "num_layers": 5}))).save_pretrained(
        folder
    )
    _small_tokenizer().save_pretrained(folder)


def _write_umt5(folder: Path) -> None:
    text_encoder(_small(UMT5)).save_pretrained(folder)
    _small_tokenizer().save_pretrained(folder)


def _small(config: T5Config) -> T5Config:
    """Without dropout, since tests that make a T5 of this config leave it in training mode, and compare its results."""
    return config.model_copy(update={"vocab_size": T5_VOCABULARY, "dropout_rate": 0.0})


def _small_tokenizer() -> Any:
    """The T5 tokenizer cut to the ids that the hub's has; bytes stand for what is cut off."""
    settings = tokenizer()
    content = json.loads(settings.backend_tokenizer.to_str())
    content["model"]["vocab"] = content["model"]["vocab"][:PIECES]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < PIECES]
    return type(settings)(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **settings.init_kwargs)


def _write_bert(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _write_llama(folder: Path) -> None:
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _write_clip(folder: Path) -> None:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    _write_bytes(folder, words, tokenizer_class="CLIPTokenizer", model_max_length=77, pad_token="<|endoftext|>")


def _write_roberta(folder: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    _write_bytes(folder, words, tokenizer_class="RobertaTokenizer")


def _write_qwen(folder: Path) -> None:
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    chat = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    _write_bytes(folder, words, tokenizer_class="Qwen2Tokenizer", pad_token="<|endoftext|>", chat_template=chat)


def _write_bytes(folder: Path, words: list[str], **settings: Any) -> None:
    """A tokenizer of single bytes, whose ids stay below the vocabulary of any of the tests' models."""
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_clap(folder: Path) -> None:
    ClapFeatureExtractor().save_pretrained(folder)


_REPOSITORIES: dict[str, Callable[[Path], None]] = {
    "tiny-random-t5": _write_t5,
    "tiny-random-T5Model": _write_t5,
    "tiny-random-T5ForConditionalGeneration": _write_t5,
    "tiny-random-umt5": _write_umt5,
    "tiny-random-BertModel": _write_bert,
    "tiny-random-LlamaForCausalLM": _write_llama,
    "tiny-random-clip": _write_clip,
    "tiny-random-roberta": _write_roberta,
    "tiny-random-Qwen2VLForConditionalGeneration": _write_qwen,
    "tiny-random-ClapModel": _write_clap,
}
