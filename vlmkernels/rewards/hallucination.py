"""Objects that a caption names and the image does not show: CHAIR, on object lists that are given."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vlmkernels.ops.checks import require
from vlmkernels.rewards.batch import pure


class Mentions(NamedTuple):
    """Objects of a vocabulary that a caption names, once each, and those among them that its image does not show."""

    mentioned: list[str]
    hallucinated: list[str]


def vocabulary_of(value: Mapping[str, Iterable[str]] | Iterable[str]) -> dict[str, str]:
    """Each word that names an object, lower case, and the object's name. Takes names, or a mapping of names to synonyms."""
    names = value if isinstance(value, Mapping) else {name: () for name in value}
    require(len(names) > 0, "vocabulary", "name at least one object", value)
    return {str(word).lower(): str(name).lower() for name, words in names.items() for word in (name, *words)}


def mentions(captions: list[str], objects: list[list[str]], vocabulary) -> list[Mentions]:
    """What each caption names. Longer words come first ("hot dog" is no dog); a plural in -s or -es counts.

    Args:
        captions: N texts.
        objects: N lists, what each image shows: names or synonyms.
        vocabulary: all objects that are looked for; see ``vocabulary_of``.
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
def chair(captions: list[str], objects: list[list[str]], *, vocabulary) -> list[float]:
    """1 - CHAIR_i: the share of the objects a caption names that the image shows. 0 where it names none: silence does not pay.

    CHAIR counts every mention; here an object counts once, however often a caption names it.
    Source: https://arxiv.org/abs/1809.02156

    Args:
        captions, objects, vocabulary: as in ``mentions``.
    """
    found = mentions(captions, objects, vocabulary)
    return [1 - len(f.hallucinated) / len(f.mentioned) if f.mentioned else 0.0 for f in found]
