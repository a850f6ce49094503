"""``generate``: the command that generates texts."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nai_t5_core.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    Json,
    ModelOption,
    Products,
    ProductsOption,
    PromptFile,
    Prompts,
    SaveScales,
    ScalesOption,
    Subfolder,
    TokenizerOption,
)
from nai_t5_core.cli.terminal import all_prompts, print_json, say, short, working

if TYPE_CHECKING:
    from nai_t5_core.backends.choices import ProductsChoice
    from nai_t5_core.generation.options import GenerationOptions
    from nai_t5_core.generation.t5 import T5
    from nai_t5_core.tokenizer import Tokenizer


class EarlyStopping(str, Enum):
    """When a prompt with enough finished beams is done."""

    yes = "yes"
    no = "no"
    never = "never"


_EARLY_STOPPING: dict[EarlyStopping, Any] = {
    EarlyStopping.yes: True,
    EarlyStopping.no: False,
    EarlyStopping.never: "never",
}


def generate(
    prompts: Prompts = None,
    file: PromptFile = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a text at most, the end token included.")] = 100,
    min_new_tokens: Annotated[int, typer.Option(help="No end before that many tokens.")] = 0,
    num_beams: Annotated[int, typer.Option("--num-beams", "--beams", help="Beam search with that many beams.")] = 1,
    num_return_sequences: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Above 0, longer beams are favoured.")] = 1.0,
    early_stopping: Annotated[
        EarlyStopping, typer.Option(help="Beams: stop at enough finished texts (yes), when none looks better (no).")
    ] = EarlyStopping.no,
    sample: Annotated[bool, typer.Option("--sample", help="Draw each token from its distribution.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample: below 1 is more certain.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="With --sample: only the likeliest so many; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="With --sample: only the likeliest of this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="With --sample: the same seed gives the same texts.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens come again less often.")] = 1.0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="No run of so many tokens twice; 0 for any.")] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="Compute in 8 bits on the CPU: faster, and less exact.")] = False,
    products: ProductsOption = Products.auto,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    scales: ScalesOption = None,
    save_scales: SaveScales = None,
    subfolder: Subfolder = "",
    tokenizer: TokenizerOption = None,
    as_json: Json = False,
) -> None:
    """Generate text for prompts: greedy, with beams, or by sampling."""
    texts = all_prompts(prompts, file)
    with working("loading the model"):
        from nai_t5_core.generation.options import GenerationOptions
        from nai_t5_core.tokenizer import load_tokenizer
        from nai_t5_core.weights.load import load_whole

        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            num_beams=num_beams,
            num_return_sequences=num_return_sequences,
            length_penalty=length_penalty,
            early_stopping=_EARLY_STOPPING[early_stopping],
            do_sample=sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
        )
        own = load_tokenizer(tokenizer) if tokenizer is not None else None
        loaded = load_whole(model, dtype.value, device, subfolder=subfolder, scales=scales or "auto")
        found = own or loaded.tokenizer
    if found is None:
        from nai_t5_core.weights.examine import NO_TOKENIZER

        raise ValueError(NO_TOKENIZER.format(source=loaded.report.source))
    ready = _made_fast(loaded.model, int8, products.value)
    with working(f"generating for {len(texts)} prompts"):
        outputs = _generate(ready, found, texts, options, seed)
    if save_scales is not None:
        from nai_t5_core.weights.scales_file import write_scales

        write_scales(save_scales, ready.encoder_stack.scales, ready.decoder_scales)
    if as_json:
        print_json({"source": loaded.report.source, "model": loaded.report.kind, "prompts": outputs})
        return
    for row in outputs:
        say("", title=short(row["prompt"]), style="bold")
        for output in row["outputs"]:
            say(f"  {output['text']}")


def _made_fast(model: T5, int8: bool, products: ProductsChoice) -> T5:
    from nai_t5_core.backends.choose import prepack, quantize_int8, why_not_prepack

    if int8:
        return quantize_int8(model, products)
    return prepack(model, products) if products != "auto" or why_not_prepack(model) is None else model


def _generate(
    model: T5, tokenizer: Tokenizer, texts: list[str], options: GenerationOptions, seed: int | None
) -> list[dict[str, Any]]:
    """For every prompt, its texts and their tokens."""
    import torch

    from nai_t5_core.float16.generation_guard import generate_guarded

    tokens = tokenizer(texts)
    ids, mask = torch.tensor(tokens.input_ids), torch.tensor(tokens.attention_mask)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    out = generate_guarded(model, ids, mask, generator=generator, **dataclasses.asdict(options))
    groups = out.unflatten(0, (len(texts), -1)).tolist()
    return [
        {"prompt": text, "outputs": [_output(tokenizer, row, model.config.eos_token_id) for row in rows]}
        for text, rows in zip(texts, groups, strict=True)
    ]


def _output(tokenizer: Tokenizer, row: list[int], end_token: int) -> dict[str, Any]:
    token_ids = row[: row.index(end_token) + 1] if end_token in row else row
    return {"text": tokenizer.decode(token_ids), "token_ids": token_ids, "ended": end_token in row}
