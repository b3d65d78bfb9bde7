"""A prompt as the label that it means: all that a class-conditional model can take from one."""

from __future__ import annotations

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
    """The one label that a prompt names, by its number ("7", "seven") or its class's name; None for "any".

    Raises:
        Invalid: it names none, or several; the message says what is understood.
    """
    text = " ".join(re.findall(WORD, prompt.casefold()))
    found = {
        label
        for label in range(info.num_classes)
        if any(re.search(rf"\b{re.escape(name)}s?\b", text) for name in _names(label, info))
    }
    if len(found) == 1:
        return found.pop()
    if not found and info.unlabelled and any(word in text.split() for word in ANY):
        return None
    what = f"names {', '.join(map(str, sorted(found)))}: name one" if found else "names nothing that this model draws"
    raise Invalid.field("prompt", f"{prompt[:64]!r} {what}. {understood(info)}")


def _names(label: int, info: ModelInfo) -> list[str]:
    """What a label may be called, in the form that a prompt is looked through in."""
    names = [str(label), *NUMBERS[label : label + 1]]
    if info.class_names:
        names.append(" ".join(re.findall(WORD, info.class_names[label].casefold())))
    return [name.removesuffix("s") or name for name in names if name]


def understood(info: ModelInfo) -> str:
    """What may stand in a prompt, for people."""
    if not info.num_classes:
        return f'{info.name} is unconditional and understands "any" alone'
    last = info.num_classes - 1
    words = f" or words (zero .. {NUMBERS[last]})" if last < len(NUMBERS) else ""
    names = f", names ({', '.join(info.class_names)})" if info.class_names else ""
    any_label = ', and "any"' if info.unlabelled else ""
    return f'{info.name} understands the numbers 0 .. {last}{words}{names}{any_label}, as in "a handwritten {last}"'
