"""A prompt as the label that it means: all that a class-conditional model can take from one."""

from __future__ import annotations

import functools
import re

from app.engine.request import ModelInfo
from app.errors import Invalid

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
WORD = r"[^\W_]+"
ANY = ("any", "anything", "random", "surprise")


def label_of(prompt: str, info: ModelInfo) -> int | None:
    """The one label that a prompt names, by its class's name or its number ("7", "seven"); None for "any".

    Raises:
        Invalid: it names none, or several; the message says what is understood.
    """
    text = _plain(prompt)
    names, numbers = _names(info.class_names), _numbers(info.num_classes)
    found = _found(text, names) or _found(text, numbers)
    if len(found) == 1:
        return found.pop()
    if not found and info.unlabelled and any(word in text.split() for word in ANY):
        return None
    what = f"names {', '.join(map(str, sorted(found)))}: name one" if found else "names nothing that this model draws"
    raise Invalid.field("prompt", f"{prompt[:64]!r} {what}. {understood(info)}")


def _plain(text: str) -> str:
    """Words alone, in lower case."""
    return " ".join(re.findall(WORD, text.casefold()))


Names = tuple[tuple[re.Pattern[str], int], ...]


@functools.lru_cache(maxsize=8)
def _names(class_names: tuple[str, ...]) -> Names:
    """Of classes, the longest first: a hot dog is no dog."""
    plain = [(_plain(name), label) for label, name in enumerate(class_names)]
    by_length = sorted(((name.removesuffix("s") or name, label) for name, label in plain if name), key=_length)
    return tuple((re.compile(rf"\b{re.escape(name)}s?\b"), label) for name, label in by_length)


@functools.lru_cache(maxsize=8)
def _numbers(num_classes: int) -> Names:
    words = [(word, label) for label in range(num_classes) for word in (str(label), *NUMBERS[label : label + 1])]
    return tuple((re.compile(rf"\b{word}s?\b"), label) for word, label in words)


def _length(named: tuple[str, int]) -> int:
    return -len(named[0])


def _found(text: str, names: Names) -> set[int]:
    """The labels that a text names; what one name took is not looked at again."""
    found = set()
    for pattern, label in names:
        text, times = pattern.subn("|", text)
        if times:
            found.add(label)
    return found


def understood(info: ModelInfo) -> str:
    """What may stand in a prompt, for people."""
    if not info.num_classes:
        return f'{info.name} is unconditional and understands "any" alone'
    last = info.num_classes - 1
    words = f" or words (zero .. {NUMBERS[last]})" if last < len(NUMBERS) else ""
    names = f", names ({', '.join(info.class_names)})" if info.class_names else ""
    any_label = ', and "any"' if info.unlabelled else ""
    return f'{info.name} understands the numbers 0 .. {last}{words}{names}{any_label}, as in "a handwritten {last}"'
