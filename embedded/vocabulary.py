"""Makes the embedded model's vocabulary: a SentencePiece unigram model, laid out as T5's.

Ids: pad 0, end 1, unknown 2, the 256 bytes that spell whatever no piece covers, the pieces, then `<extra_id_99>` down
to `<extra_id_0>`, which is the last. `python -m embedded.vocabulary FILE` writes it.
"""

import io
import os
import string
import struct
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece

from embedded.corpus import generate_captions, generate_tasks

SIZE = 4096
EXTRA_IDS = 100
SEED = 0
CAPTIONS, TASKS = 10_000, 4_000


def train_vocabulary() -> bytes:
    """Train the vocabulary on generated text; every call gives the same bytes.

    Returns:
        A SentencePiece model file of `SIZE` pieces, `EXTRA_IDS` of them sentinels.
    """
    texts = generate_captions(SEED, CAPTIONS)
    texts += [f"{question} {answer}" for question, answer in generate_tasks(SEED, TASKS)]
    model = io.BytesIO()
    rules = Path("rules.tsv")
    with _working_in_a_new_folder():  # the file's path goes into the model: it has to be the same every time
        rules.write_text(_normalisation_rules(), encoding="ascii")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=SIZE - EXTRA_IDS,
            character_coverage=1.0,
            required_chars=string.ascii_letters + string.digits + string.punctuation,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_tsv=str(rules),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    return model.getvalue() + b"".join(_user_defined(f"<extra_id_{i}>") for i in reversed(range(EXTRA_IDS)))


@contextmanager
def _working_in_a_new_folder() -> Iterator[None]:
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _user_defined(text: str) -> bytes:
    """One more piece: concatenated protobuf messages are one message, whose repeated fields go on."""
    name = text.encode()
    # the fields of a piece: 1 its text, 2 its score as float32, 3 its type, of which 4 is "user defined"
    piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x04"
    return b"\x0a" + bytes([len(piece)]) + piece


def _normalisation_rules() -> str:
    """T5's rules, nmt_nfkc, for every character and its decompositions, except those of Hangul syllables.

    That is 60 kB of a model file instead of 240 kB.

    Returns:
        Lines of source and target characters in hexadecimal, as SentencePiece reads them.
    """
    normalise = sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    ).normalize
    rules = {}
    # planes 0 and 1, and the compatibility ideographs of plane 2: nothing changes elsewhere
    for code in (*range(1, 0xD800), *range(0xE000, 0x20000), *range(0x2F800, 0x2FA20)):
        for source in _spellings(chr(code)):
            target = normalise(source)
            if target != source and (len(source) == 1 or target != "".join(map(normalise, source))):
                rules[source] = target
    return "".join(f"{_hexadecimal(source)}\t{_hexadecimal(target)}\n" for source, target in sorted(rules.items()))


def _spellings(character: str) -> set[str]:
    """A character and its decompositions: into two, into all canonical parts, into all compatible parts."""
    parts = [part for part in unicodedata.decomposition(character).split() if not part.startswith("<")]
    if not parts:  # Hangul syllables have none here: they are decomposed by a formula
        return {character}
    apart = "".join(chr(int(part, 16)) for part in parts)
    return {character, apart, *(unicodedata.normalize(form, character) for form in ("NFD", "NFKD"))}


def _hexadecimal(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(train_vocabulary())
