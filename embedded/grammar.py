"""The grammar of the corpus: rules that put the lexicon's words together, and the writer that draws from them."""

import random
import re

from embedded.lexicon import IRREGULAR_PLURALS, LEXICON, NUMBERS

# Each symbol has alternatives, all equally likely; {symbol} stands for one of another's. `{thing*}` is a plural.
# Symbols that are not here are kinds of words in the lexicon.
_RULES = {
    "caption": [
        "{scene}",
        "{scene}",
        "{scene}.",
        "{picture} of {scene}",
        "{picture} of {scene}",
        "{picture} of {np}",
        "{picture} of {np}, {tags}",
        "{scene}, {tags}",
        "{np}, {tags}",
        "{scene}. {detail}.",
        "{picture} of {scene}. {detail}. {detail}.",
        "{scene}. {detail}. {detail}. {finish}.",
        "{sign}",
        "{sign}, {tags}",
        "{counted}",
        "{film}",
        "{np} and {np}",
        "{the} {thing} is {relation} {the} {thing}",
        "{style} {medium}: {scene}",
        "({np}:1.{digit}), {tags}, [{praise}]",
        "{fault}, {fault}, {fault}, {fault}, {fault}",
        "{title} - {scene} ({year})",
        "{name}'s {quality} {thing}; {scene}!",
        "what if {np} were {doing} {where}?",
        "{picture} about {idea} and {idea}",
        "{idea}, as {a} {style} {medium}",
    ],
    "scene": [
        "{actor} {doing} {where}",
        "{actor} {doing} {where}",
        "{actor} {doing} {manner} {where}",
        "{actor} {using} {np}",
        "{actor} {using} {np} {where}",
        "{actor} and {actor} {doing} {where}",
        "{np} {relation} {np}",
        "{np} {relation} {np}",
        "{np} {relation} {np} {where}",
        "{np} between {np} and {np}",
        "{a} {building} {where}",
        "{a} {place} in {season}, {weather} and {a} {sky} sky",
        "{a} {colour} {vehicle} {relation} {a} {building}",
        "{table}",
        "{actor} with {a} {bird} {relation} {a} {object}",
        "{np} made of {material}",
        "{actor}, {doing}, {relation} {a} {plant}",
        "{actor} {verb} {manner} {where}",
        "{actor} {verb} while {actor} {verb}",
        "{actor} playing {sport} with {actor}",
        "the {landmark} {relation} {np}",
        "{actor} in front of the {landmark}",
        "the {heaven} over {a} {quality} {place}",
        "{actor} at {a} {event} in {city}",
        "{a} {nation} {event}",
    ],
    "np": [
        "{a} {thing}",
        "{a} {colour} {thing}",
        "{a} {adjective} {thing}",
        "{a} {adjective} {colour} {thing}",
        "{a} {size} {thing} made of {material}",
        "{a} {material} {thing}",
        "{a} {shade} {colour} {thing}",
        "{a} {adjective}, {adjective} {thing}",
        "{counted}",
        "{actor}",
        "{the} {colour} {thing}",
        "half of {a} {fruit}",
        "{a} {nation} {thing}",
        "{a} {colour} {clothing} with {colour} {pattern}",
        "{a} {thing} covered in {pattern}",
        "{a} {object} shaped like {a} {thing}",
        "{a} {colour} and {colour} {thing}",
    ],
    "actor": [
        "{a} {being}",
        "{a} {mood} {being}",
        "{a} {mood} {colour} {animal}",
        "{a} {size} {being}",
        "{a} {being} in {a} {colour} {clothing}",
        "{a} {mood} {being} wearing {a} {material} {clothing}",
        "{a} {animal} dressed as {a} {person}",
        "{name}",
        "{name} the {being}",
        "{a} {nation} {person}",
        "{a} {being} with {size} {feature}",
        "{a} {mood} {being} with {colour} {feature} and {hairstyle} hair",
        "{number} {mood} {being*}",
        "{the} {being}",
    ],
    "being": ["{person}", "{person}", "{animal}", "{animal}", "{bird}", "{creature}"],
    "thing": [
        "{object}",
        "{object}",
        "{object}",
        "{furniture}",
        "{clothing}",
        "{vehicle}",
        "{fruit}",
        "{vegetable}",
        "{food}",
        "{plant}",
        "{animal}",
        "{bird}",
        "{building}",
    ],
    "counted": ["{number} {thing*}", "{number} {colour} {thing*}", "{number} {adjective} {thing*}", "some {thing*}"],
    "adjective": ["{size}", "{shape}", "{texture}", "{quality}", "{mood}", "{texture}", "{quality}"],
    "where": [
        "in {a} {place}",
        "in {a} {quality} {place}",
        "at {time}",
        "in {a} {place} at {time}",
        "in the {weather}",
        "near {a} {building}",
        "in front of {a} {colour} {building}",
        "in {city}",
        "on {a} {weekday} in {month}",
        "on the streets of {city} at {time}",
        "{relation} {a} {furniture}",
        "under {a} {sky} sky",
        "near the {landmark}",
        "on the surface of the {heaven}",
        "during {a} {event}",
        "on the {shape} roof of {a} {building}",
    ],
    "table": [
        "{a} {colour} cup of {drink} on {a} {material} table",
        "{a} plate of {food*} and {fruit*}",
        "{a} bowl of {vegetable*} with {a} {object}",
        "{number} {food*} with {fruit} and {vegetable} on {a} {shape} plate",
        "{a} bottle of {drink} {relation} {a} {food}",
    ],
    "picture": [
        "{a} {medium}",
        "{a} {style} {medium}",
        "{a} {colour} and {colour} {medium}",
        "{a} {quality} {medium}",
        "{a} {style} {medium} in the style of {style} art",
    ],
    "tags": [
        "{tag}",
        "{tag}, {tag}",
        "{tag}, {tag}, {tag}",
        "{tag}, {tag}, {tag}, {tag}",
        "{tag}, {tag}, {tag}, {tag}, {tag}, {tag}",
        "({tag}:0.{digit}), {tag}",
    ],
    "tag": [
        "{lighting}",
        "{camera}",
        "{style}",
        "{praise}",
        "{style} style",
        "{mood}",
        "{colour} background",
        "{idea}",
        "{nation} art",
        "{pattern}",
        "{weather}",
        "{time}",
        "{shade} {colour} tones",
        "{material}",
        "{digit}:{digit}",
        "{digit}0%",
        "#{season}{digit}",
    ],
    "detail": [
        "the sky is {sky} and {shade} {colour}",
        "in the background there is {np}",
        "in the foreground there are {counted}",
        "on the left stands {np}, on the right {np}",
        "{np} lies {relation} {the} {thing}",
        "{lighting} falls on {the} {thing}",
        "it is {time} and there is {weather} in the air",
        "{the} {thing} is {colour}, but {the} {thing} is {colour}",
        "everything is made of {material}",
        "there is no {thing} anywhere",
        "{the} {being} looks {mood} and {mood}",
        "behind {the} {being} you can see {np}",
    ],
    "finish": [
        "shot as {a} {camera} with {lighting}",
        "the mood is {mood} and {mood}",
        "the colours are {colour}, {colour} and {colour}",
        "{praise}, {praise}",
        "it looks like {a} {style} {medium} from {year}",
    ],
    "sign": [
        '{a} {colour} sign that says "{WORD}"',
        '{a} {material} {building} with the words "{WORD}" over the door',
        'the word "{word}" written in {colour} letters on {a} {thing}',
        '"{WORD}" in {colour} {style} lettering',
        "{a} {clothing} with the number {digit}{digit} on it",
        "{a} {medium} with the {size} title “{Common} {Common} {common}”",
        'a page that reads: "{common} {common} {common}, {common} {common}."',
        '{actor} says: "{common} {common} the {common} {idea}?"',
        '{a} {being} holding {a} sign: "{WORD} {digit}"',
    ],
    "film": [
        "the camera {motion} as {actor} is {doing} {where}",
        "the camera {motion} {manner} past {np} towards {np}",
        "{a} {camera} of {actor} {using} {np}; the camera {motion}, then {motion}",
        "time-lapse of {a} {place} from {time} to {time}",
        "slow motion of {np} falling {relation} {np}",
    ],
    "title": ["The {Quality} {Being}", "{City} at {Time}", "{Number} {Thing}s", "No. {digit}"],
    "a": [*["a"] * 12, "one", "another", "the"],
    "the": ["the"],
    "number": NUMBERS[2:],
    "digit": list("123456789"),
    "year": [str(year) for year in range(1500, 2040, 4)],
}

_GRAMMAR = LEXICON | _RULES
_SYMBOL = re.compile(r"\{(\w+)(\*?)\}")
_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=(?!(?i:uni|use|usu|euro|one\b|uk))[aeiouAEIOU]|8|11\b|18\b|hourglass)")


class Writer:
    """Draws from the grammar with one random stream; only `random()` is used, which Python promises to keep."""

    def __init__(self, seed: str) -> None:
        self._draw = random.Random(seed).random

    def below(self, limit: int) -> int:
        """A number from 0 up to, but without, the limit."""
        return int(self._draw() * limit)

    def pick(self, *kinds: str) -> str:
        """One word of the lexicon, or one text of the grammar, of one of the kinds."""
        kind = kinds[self.below(len(kinds))]
        options = _GRAMMAR[kind]
        return _SYMBOL.sub(self._expand, options[self.below(len(options))])

    def some(self, count: int, *kinds: str) -> list[str]:
        """That many different words of the kinds."""
        words: dict[str, None] = {}
        while len(words) < count:
            words[self.pick(*kinds)] = None
        return list(words)

    def _expand(self, symbol: re.Match[str]) -> str:
        name, star = symbol.groups()
        text = self.pick(name.lower())
        if star:
            return plural(text)
        if name.isupper():
            return text.upper()
        return text.title() if name[0].isupper() else text

    def caption(self) -> str:
        """An image caption; every fourth one, on average, has capital letters where sentences begin."""
        text = articles(self.pick("caption"))
        if self.below(4):
            return text
        return re.sub(r"(^|[.!?] )([a-z])", lambda start: start[1] + start[2].upper(), text)


def articles(text: str) -> str:
    """Text with `an` for `a` where a vowel is heard next."""
    return _BEFORE_VOWEL.sub(r"\1n ", text)


def plural(noun: str) -> str:
    """The plural of an English noun of the lexicon, `box` to `boxes`."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("ss", "us", "x", "ch", "sh")) and not noun.endswith("fish"):
        return noun + "es"
    if noun.endswith(("s", "fish")):
        return noun
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"
