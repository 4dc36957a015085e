"""Division of a tree of segments into pieces in which all tokens attend in the same way.

A piece is a bidirectional span, or the tokens of a segment before, between or after its spans. The pieces of a path form a
chain, so they are themselves segments of a tree: the tokens of a piece attend to each other, causally or, in a span, in both
directions, and all later tokens of its paths attend to all its tokens.
"""

from functools import lru_cache
from typing import NamedTuple

from vlmkernels.ops.tree_attention.layout import TreeLayout


class Piece(NamedTuple):
    """Tokens [start, stop) of the pack; not empty.

    Attributes:
        end: the tokens [stop, end) are those that follow the piece on a path: they attend to all its tokens.
        level: the number of pieces before this one on its path. Tokens that follow pieces of one level are disjoint.
        segment: the index of its segment.
        is_span: whether its tokens attend to each other in both directions.
    """

    start: int
    stop: int
    end: int
    level: int
    segment: int
    is_span: bool


@lru_cache(maxsize=16)  # all layers of a pass have the same layout
def pieces(layout: TreeLayout) -> tuple[Piece, ...]:
    """Return the pieces of all segments, in the order of the pack."""
    result: list[Piece] = []
    levels: list[int] = []  # by segment, the level of what follows it
    spans = iter(layout.bidirectional)
    span = next(spans, None)
    for segment, (start, length, parent) in enumerate(zip(layout.starts, layout.lengths, layout.parents, strict=True)):
        level, end = levels[parent] if parent >= 0 else 0, start + length
        while start < end:
            is_span = span is not None and span[0] == start
            if is_span:
                stop, span = span[1], next(spans, None)
            else:
                stop = min(end, span[0]) if span is not None else end
            result.append(Piece(start, stop, layout.ends[segment], level, segment, is_span))
            start, level = stop, level + 1
        levels.append(level)
    return tuple(result)


def linked_pieces(layout: TreeLayout) -> list[tuple[Piece, list[Piece]]]:
    """Return each span that attends to later spans, because the layout has linked spans, with these."""
    spans = [piece for piece in pieces(layout) if piece.is_span] if layout.linked else []
    later = [[other for other in spans if other.segment == span.segment and other.start > span.start] for span in spans]
    return [(span, others) for span, others in zip(spans, later, strict=True) if others]
