"""A run's config: where its paths start, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_training import SIZES, config_in, toml, write_data

from nai_t5_core.facts.config import T5Config
from nai_t5_core.training.config import read_config
from nai_t5_core.training.start import first_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, pairs and a tokenizer."""
    return write_data(tmp_path)


def test_config_paths_start_at_its_folder(folder: Path) -> None:
    config = config_in(folder)
    assert config.out == folder / "run" and config.model.tokenizer == folder / "spiece.model"
    assert [section.file.parent for section in config.data] == [folder] * 3
    assert config.model.sizes == T5Config(**SIZES)
    text = "\n".join(line for line in toml().split("\n") if line.split(" = ")[0] not in {*SIZES, "[model.sizes]"})
    for source, expected in (("spiece.model", str(folder / "spiece.model")), ("google/t5", "google/t5")):
        (folder / "train.toml").write_text(text.replace('tokenizer = "spiece.model"', f'source = "{source}"'))
        assert read_config(folder / "train.toml").model.source == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 6", "stepps = 6", "stepps: Extra inputs are not permitted"),
        ("steps = 6", "", "steps: Field required"),
        ("steps = 6", "steps = 0", r"steps: Input should be greater than 0 \(given: 0\)"),
        ('schedule = "constant"', 'schedule = "step"', "optimizer.schedule: Input should be 'constant'"),
        ('tokenizer = "spiece.model"', "", "model: sizes without a tokenizer"),
        ('tokenizer = "spiece.model"', 'source = "a/b"', "model: give either source"),
        ("num_decoder_layers = 2", "num_decoder_layers = 0", "model: sizes.num_decoder_layers is 0"),
        ("rows = 4", "rows = 4\nmean_span = 2", "data.2: only span-corruption has mean_span"),
        ('schedule = "constant"', 'kind = "adafactor"\nbetas = [0.9, 0.9]', "optimizer: betas are AdamW's"),
        ("warmup = 2", "warmup = 2\nbetas = [0.9, 1.0]", "optimizer: betas="),
        ("rows = 4", "rows = 0", "data.2.rows: Input should be greater than 0"),
        ("steps = 6", "steps = ", "cannot be read as TOML"),
        ("steps = 6", "steps = 6\ndropout = 1.0", "dropout: Input should be less than 1"),
        ("steps = 6", 'steps = 6\ndropout = 0.1\nattention = "flex"', "flex attention has no dropout"),
    ],
)
def test_mistakes_in_a_config(folder: Path, old: str, new: str, message: str) -> None:
    text = toml()
    assert old in text
    (folder / "train.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_config(folder / "train.toml")


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    config = config_in(folder)
    assert config.model.sizes is not None
    sizes = config.model.sizes.model_copy(update={"vocab_size": 100})
    small = config.model_copy(update={"model": config.model.model_copy(update={"sizes": sizes})})
    with pytest.raises(ValueError, match="the tokenizer has 4096 tokens, the model 100"):
        first_model(small)


@pytest.mark.parametrize("name", ["d_model", "d_ff", "vocab_size"])
def test_sizes_beyond_memory_are_refused(folder: Path, name: str) -> None:
    """Before anything of that size is allocated."""
    (folder / "train.toml").write_text(toml().replace(f"{name} = {SIZES[name]}", f"{name} = {10**12}"))
    with pytest.raises(ValueError, match=r"a T5 of [\d,]+ GiB in float32, and this machine has [\d,]+ GiB of memory"):
        first_model(read_config(folder / "train.toml"))


def test_the_config_in_the_docs_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (tmp_path / "train.toml").write_text(page.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    config = read_config(tmp_path / "train.toml")
    assert config.model.source == "google/flan-t5-base" and config.dropout == 0.1
    assert [section.objective for section in config.data] == ["span-corruption", "pairs"]
