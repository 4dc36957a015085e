"""Random layouts of trees for hypothesis."""

from hypothesis import strategies as st

from vlmkernels.ops.tree_attention import TreeLayout


@st.composite
def layouts(draw, lengths=None, max_segments: int = 7, spans: bool = False) -> TreeLayout:
    """Layouts with segments of the given ``lengths``, by default 0 to 9; with ``spans``, some tokens are in spans."""
    parents, sizes, bidirectional, path, start = [], [], [], [], 0
    for segment in range(draw(st.integers(0, max_segments))):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        path.append(segment)
        sizes.append(draw(st.integers(0, 9) if lengths is None else lengths))
        first, start = start, start + sizes[-1]
        while spans and first < start:
            last = draw(st.integers(first + 1, start))
            if draw(st.booleans()):
                bidirectional.append((first, last))
            first = last
    return TreeLayout(tuple(sizes), tuple(parents), tuple(bidirectional), linked=spans and draw(st.booleans()))
