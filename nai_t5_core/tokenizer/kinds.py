"""The three kinds of tokenizer: a SentencePiece model, a tokenizer.json file, and the bytes of ByT5."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nai_t5_core.facts.nested_text import parse_object
from nai_t5_core.tokenizer.added_tokens import AddedToken, FolderTokens, refuse_gaps
from nai_t5_core.tokenizer.base import Tokenizer, split_at_tokens
from nai_t5_core.tokenizer.charsmap import refuse_damaged_charsmap
from nai_t5_core.tokenizer.convert import Normalization, sentencepiece_to_tokenizer_json
from nai_t5_core.tokenizer.rust_errors import as_value_error
from nai_t5_core.tokenizer.sentencepiece_format import (
    EXTRA_ID,
    charsmap_of,
    extend_sentencepiece,
    missing_extra_ids,
    read_fields,
)

# Unicode's White_Space characters: the places where the fast tokenizer splits words.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Every character map in a tokenizer.json, before the library reads it: damage makes it stop with a report of its own.
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"')
# A character without a meaning, which no vocabulary has.
_UNKNOWN = "\U0010fffd"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file: T5's and UMT5's spiece.model, Pile-T5's tokenizer.model.

    Special tokens written in a prompt (`</s>`, `<pad>`, `<unk>`, `<extra_id_0>`) become their ids, as in transformers.
    `<extra_id_N>` that a T5 file lacks get the ids after its pieces, in reverse order: T5's `<extra_id_0>` is 32099. A
    model without a pad piece pads with its begin token, or with its end token if it has no begin token.

    Raises ValueError where `content` is no SentencePiece model or has no end token.
    """

    kind = "sentencepiece"

    def __init__(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._content = content
        self._model = SentencePieceProcessor()
        try:
            refuse_damaged_charsmap(charsmap_of(content))
            self._model.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"these {len(content)} bytes are no SentencePiece model: {error}") from None
        if self._model.eos_id() < 0:
            raise ValueError("this SentencePiece model has no end token (eos_id is -1), and every T5 tokenizer has one")
        if not 0 <= self._model.unk_id() < len(self._model):
            raise ValueError("this SentencePiece model has no token for what it does not know; fetch the file again")
        self.eos_token_id = self._model.eos_id()
        self.unk_token_id = self._model.unk_id()
        candidates = (self._model.pad_id(), self._model.bos_id(), self.eos_token_id)
        self.pad_token_id = next(candidate for candidate in candidates if candidate >= 0)
        self.file_size = len(self._model)
        has_extra_ids = any(self.token_id(token) is not None for token in ("<extra_id_0>", "▁<extra_id_0>"))
        missing = missing_extra_ids(self.file_size, self._model.pad_id(), has_extra_ids)
        self.lacks_extra_ids = missing > 0
        self.vocab_size = self.file_size + missing
        self._names = self._special_tokens()
        self._specials = {token: i for i, token in self._names.items()}
        by_length = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, by_length)))
        self._blanks = self._unmapped_blanks()

    def _special_tokens(self) -> dict[int, str]:
        """Texts by id of all tokens that are recognised in a prompt before SentencePiece tokenizes it."""
        model = self._model
        names = {i: model.id_to_piece(i) for i in range(self.file_size) if model.is_control(i)}
        names[model.unk_id()] = model.id_to_piece(model.unk_id())
        number = 0
        while (found := self.token_id(f"<extra_id_{number}>")) is not None:
            names[found] = f"<extra_id_{number}>"
            number += 1
        if self.lacks_extra_ids:
            names |= {self.vocab_size - 1 - i: f"<extra_id_{i}>" for i in range(self.vocab_size - self.file_size)}
        return names

    def _unmapped_blanks(self) -> dict[int, str]:
        """Translates to a space each white space that splits words in transformers, but that the model keeps."""
        normalize = self._model.normalize
        if normalize("a  b") != normalize("a b"):
            return {}
        return {ord(blank): " " for blank in _WHITE_SPACE if blank != " " and blank in normalize(f"a{blank}a")}

    def token_id(self, token: str) -> int | None:
        """The id of a piece of the model file; None for a text that is no piece."""
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def extended(self, tokens: Sequence[str], pad_token: str | None = None) -> SentencePieceTokenizer:
        """A copy with further tokens after the model file's pieces and, where given, another pad token."""
        return SentencePieceTokenizer(extend_sentencepiece(self._content, tokens, pad_token))

    def with_tokens(self, tokens: FolderTokens) -> Tokenizer:
        """The tokenizer with the tokens that other files of its folder add.

        If they add more than extra ids and a pad token, a Unigram model is converted to a tokenizer.json and run by the
        `tokenizers` library, as in transformers, since that library finds added tokens in a prompt by rules of its own.

        Raises ValueError where ids do not follow those of the model file.
        """
        base = self._with_extra_ids(tokens)
        if not tokens.numbered and not tokens.special:
            return base._with_pad(tokens.pad_token)
        try:
            as_json = JsonTokenizer(sentencepiece_to_tokenizer_json(base._content))
        except ValueError:  # not a Unigram model
            return base._with_special(tokens.special)._with_pad(tokens.pad_token)
        complete = as_json.with_tokens(tokens)
        return base if complete is as_json else complete

    def _with_extra_ids(self, tokens: FolderTokens) -> SentencePieceTokenizer:
        """A copy with the tokens whose ids follow the model file's pieces, or with the stated number of extra ids."""
        if self.file_size in tokens.numbered:
            behind = [i for i in tokens.numbered if i >= self.file_size]
            refuse_gaps(behind, self.file_size)
            return self.extended([tokens.numbered[i].content for i in behind])
        if self.lacks_extra_ids and tokens.extra_ids is not None:
            return self.extended([f"<extra_id_{i}>" for i in reversed(range(tokens.extra_ids))])
        return self

    def _with_special(self, tokens: Sequence[AddedToken]) -> SentencePieceTokenizer:
        new = [token.content for token in tokens if token.content not in self._specials]
        return self.extended(new) if new else self

    def _with_pad(self, pad: str | None) -> SentencePieceTokenizer:
        if pad is None or self.token_id(pad) == self.pad_token_id:
            return self
        return self.extended([] if self.token_id(pad) is not None else [pad], pad)

    def _parts(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        for start, part, special in split_at_tokens(text, self._pattern, self._specials):
            yield start, part.translate(self._blanks) if self._blanks else part, special

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for _, part, special in self._parts(text):
            ids += self._model.encode(part) if special is None else [special]
        return ids

    def _begin(self, text: str, index: int) -> int:
        for start, part, special in self._parts(text):
            begins = [0] if special is not None else self._piece_begins(part)
            if index < len(begins):
                return start + len(part.encode()[: begins[index]].decode(errors="ignore"))
            index -= len(begins)
        return len(text)

    def _piece_begins(self, text: str) -> list[int]:
        """The byte of `text` where each piece begins: field 4 of each piece, which are field 2 of SentencePieceText."""
        message = self._model.encode(text, out_type="serialized_proto")
        pieces = (value for number, value in read_fields(message) if number == 2 and isinstance(value, bytes))
        return [int(dict(read_fields(piece)).get(4, 0)) for piece in pieces]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        out = bytearray()
        for i in ids:
            if i in self._names:
                out += b"" if skip_special_tokens else self._names[i].encode()
            elif 0 <= i < self.file_size:
                piece = self._model.id_to_piece(i)
                out += bytes([int(piece[3:5], 16)]) if self._model.is_byte(i) else piece.replace("▁", " ").encode()
        return out.decode(errors="replace").removeprefix(" ")

    def serialized(self) -> tuple[str, bytes]:
        return self.kind, self._content


class JsonTokenizer(Tokenizer):
    """A tokenizer.json file, run by the `tokenizers` library.

    A Unigram file that collapses white space, as all of T5's do, is run with the steps that transformers 5 builds
    whatever the file says: the file's character map, a split at white space, and a "▁" in front of every word. Other
    files are run as they are, but without their post-processor: the end token is always added, and no other token.

    Raises ValueError where `content` is no tokenizer.json or has no `</s>`.
    """

    kind = "tokenizer.json"
    lacks_extra_ids = False

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer as Backend

        self._content = content
        for charsmap in _CHARSMAP.findall(content):
            refuse_damaged_charsmap(base64.b64decode(charsmap))
        with as_value_error(f"these {len(content)} bytes are no tokenizer.json"):
            self._backend = Backend.from_buffer(content)
        eos = self._backend.token_to_id("</s>")
        if eos is None:
            raise ValueError("this tokenizer.json has no token '</s>', and every T5 tokenizer ends its prompts with it")
        padding = self._backend.padding or {}
        candidates = [self._backend.token_to_id(token) for token in (padding.get("pad_token", ""), "<pad>", "<s>")]
        self.pad_token_id = next((candidate for candidate in candidates if candidate is not None), eos)
        self.eos_token_id = eos
        self.unk_token_id = self._backend.token_to_id("<unk>")
        self.vocab_size = self.file_size = self._backend.get_vocab_size()
        self._backend.no_padding()
        self._backend.no_truncation()
        self._use_reference_steps()
        with as_value_error("this tokenizer.json has no token for what it does not know"):
            self._backend.encode(_UNKNOWN, add_special_tokens=False)

    def _use_reference_steps(self) -> None:
        from tokenizers import models, normalizers, pre_tokenizers

        if not isinstance(self._backend.model, models.Unigram):
            return
        parts = {"normalizer": self._backend.normalizer, "pre_tokenizer": self._backend.pre_tokenizer}
        try:
            steps = Normalization.from_json(
                {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}
            )
        except ValueError:  # the file has other steps: run the file as it is
            return
        if steps.escape_whitespaces and steps.remove_extra_whitespaces and steps.add_dummy_prefix:
            charsmap = [normalizers.Precompiled(steps.charsmap)] if steps.charsmap else []
            self._backend.normalizer = normalizers.Sequence(charsmap)
            self._backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", prepend_scheme="always")]
            )

    def token_id(self, token: str) -> int | None:
        """The id of a token; None for a text that is no token."""
        return self._backend.token_to_id(token)

    def extended(self, tokens: Sequence[str], pad_token: str | None = None) -> JsonTokenizer:
        """A copy with further special tokens at its end and, where given, another pad token."""
        further = tuple(AddedToken(token) for token in tokens)
        return self.with_tokens(FolderTokens(special=further, pad_token=pad_token))

    def with_tokens(self, tokens: FolderTokens) -> JsonTokenizer:
        """The tokenizer with the tokens that other files of its folder add.

        Raises ValueError where ids do not follow those of the file.
        """
        data = parse_object(self._content)
        before = {entry["content"]: entry for entry in data.get("added_tokens") or []}
        entries = self._entries(before, tokens)
        pad = (
            None if tokens.pad_token is None else entries.get(tokens.pad_token, {"id": self.token_id(tokens.pad_token)})
        )
        if entries == before and (pad is None or pad["id"] == self.pad_token_id):
            return self
        data["added_tokens"] = sorted(entries.values(), key=lambda entry: entry["id"])
        if pad is not None:
            data["padding"] = {
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": pad["id"],
                "pad_type_id": 0,
                "pad_token": tokens.pad_token,
            }
        return JsonTokenizer(json.dumps(data, ensure_ascii=False).encode())

    def _entries(self, before: dict[str, dict[str, Any]], tokens: FolderTokens) -> dict[str, dict[str, Any]]:
        """Entries for the file's added tokens and then for those of the folder, by their text."""
        entries = dict(before)
        listed = {token.content for token in (*tokens.numbered.values(), *tokens.special)}
        if tokens.special_alone:
            entries = {text: entry for text, entry in before.items() if text in listed or not EXTRA_ID.fullmatch(text)}
        size = self.vocab_size
        refuse_gaps([i for i, token in tokens.numbered.items() if self.token_id(token.content) is None], size)
        special = list(tokens.special)
        if tokens.pad_token is not None and self.token_id(tokens.pad_token) is None:
            special.append(AddedToken(tokens.pad_token))
        numbered = {token.content: token for token in tokens.numbered.values()}
        for token in (*numbered.values(), *(token for token in special if token.content not in {*entries, *numbered})):
            known = self.token_id(token.content)
            entries[token.content] = token.as_json(size if known is None else known)
            size += known is None
        return entries

    def _ids(self, text: str) -> list[int]:
        return list(self._encode(text).ids)

    def _begin(self, text: str, index: int) -> int:
        return int(self._encode(text).offsets[index][0])

    def _encode(self, text: str) -> Any:
        with as_value_error("this tokenizer.json cannot encode the prompt"):
            return self._backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size]
        with as_value_error("this tokenizer.json cannot decode these ids"):
            return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def serialized(self) -> tuple[str, bytes]:
        return self.kind, self._content


class ByteTokenizer(Tokenizer):
    """ByT5's tokenizer, which needs no file: a token is a byte of UTF-8, its id the byte plus 3.

    0, 1 and 2 are `<pad>`, `</s>` and `<unk>`, and 259 to 383 are `<extra_id_0>` to `<extra_id_124>`. As in
    transformers, the first three remove the white space around them when they are written in a prompt, and a prompt
    that ends with `</s>` gets no second one.
    """

    kind = "bytes"
    pad_token_id = 0
    eos_token_id = 1
    unk_token_id = 2
    vocab_size = 384

    _first_byte = 3
    _specials: Mapping[str, int] = {
        "<pad>": 0,
        "</s>": 1,
        "<unk>": 2,
        **{f"<extra_id_{i}>": 259 + i for i in range(125)},
    }
    # White space is looked at from its beginning alone, or a long run of it would be read once for each place in it.
    _pattern = re.compile(r"(?:(?<!\s)\s+)?(?:<pad>|</s>|<unk>)\s*|<extra_id_(?:\d|[1-9]\d|1[01]\d|12[0-4])>")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for _, part, special in split_at_tokens(text, self._pattern, self._specials):
            ids += [byte + self._first_byte for byte in part.encode()] if special is None else [special]
        return ids

    def _begin(self, text: str, index: int) -> int:
        for start, part, special in split_at_tokens(text, self._pattern, self._specials):
            encoded = part.encode()
            size = len(encoded) if special is None else 1
            if index < size:
                return start + len(encoded[:index].decode(errors="ignore"))
            index -= size
        return len(text)

    def _with_end(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.eos_token_id else super()._with_end(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; ids outside the vocabulary and bytes that are not valid UTF-8 are left out."""
        names = {i: token.encode() for token, i in self._specials.items()}
        out = bytearray()
        for i in ids:
            if i in names:
                out += b"" if skip_special_tokens else names[i]
            elif self._first_byte <= i < 256 + self._first_byte:
                out.append(i - self._first_byte)
        return out.decode(errors="ignore")

    def serialized(self) -> tuple[str, bytes]:
        return self.kind, b""
