"""Score object hallucination in captions with CHAIR, given the list of objects in each image."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vlmkernels.rewards.batch import pure

Vocabulary = Mapping[str, Iterable[str]] | Iterable[str]


class Mentions(NamedTuple):
    """The objects that a caption mentions, each listed once, and the subset that the image does not show."""

    mentioned: list[str]
    hallucinated: list[str]


def vocabulary_of(value: Vocabulary) -> dict[str, str]:
    """Map each word for an object to the object's name, in lower case. ``value``: names, or a dict from names to synonyms."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"vocabulary must be names of objects, or a map of names to synonyms, got {value!r}")
    names = value if isinstance(value, Mapping) else {name: () for name in value}
    if not names:
        raise ValueError(f"vocabulary must name at least one object, got {value}")
    synonyms = {name: [words] if isinstance(words, str) else words for name, words in names.items()}
    return {str(word).lower(): str(name).lower() for name, words in synonyms.items() for word in (name, *words)}


def mentions(captions: list[str], objects: list[list[str]], vocabulary: Vocabulary) -> list[Mentions]:
    """Find the objects that each caption mentions.

    The longest word wins: "hot dog" does not mention a dog. Plurals in -s and -es are matched too.

    Args:
        captions: N captions.
        objects: N lists of the objects that each image shows, by name or synonym.
        vocabulary: the objects to look for; see ``vocabulary_of``.
    """
    names = vocabulary_of(vocabulary)
    words = "|".join(re.escape(word) for word in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"\b({words})(?:s|es)?\b")
    found = []
    for caption, shown in zip(captions, objects, strict=True):
        present = {names.get(str(name).lower(), str(name).lower()) for name in shown}
        mentioned = list(dict.fromkeys(names[word] for word in pattern.findall(caption.lower())))
        found.append(Mentions(mentioned, [name for name in mentioned if name not in present]))
    return found


def _objects(value: object) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"must be a list of names, got {value!r:.80}")
    return list(value)


@pure(_objects)
def chair(captions: list[str], objects: list[list[str]], *, vocabulary: Vocabulary) -> list[float]:
    """1 - CHAIR_i: the share of the objects in a caption that the image shows; 0 for a caption without objects.

    CHAIR counts every mention. This function counts each object once, however often the caption mentions it.

    Args:
        captions, objects, vocabulary: see ``mentions``.

    Source: https://arxiv.org/abs/1809.02156
    """
    found = mentions(captions, objects, vocabulary)
    return [1 - len(f.hallucinated) / len(f.mentioned) if f.mentioned else 0.0 for f in found]
