"""The GEMMs of a language-model head over chunks of rows, so that logits of all rows are never held at once."""

from typing import NamedTuple

import torch

HALF = (torch.bfloat16, torch.float16)
# aten::mm.dtype_out, of CUDA alone: fp32 results of 16-bit operands.
HAS_FP32_RESULTS = "dtype_out" in torch.ops.aten.mm.overloads()

# Without fp32 results the weight's gradient is added up in fp32 by so many rows of it at a time.
VOCAB_BLOCK = 8192
# Rows of a chunk beyond one are a multiple of this, for the GEMMs' tiles.
ROW_TILE = 128


class Head(NamedTuple):
    """A head and what follows it. The softmax is that of z = u * inverse, where u is the logit x, or with a softcap
    softcap * tanh(x * logit_scale / softcap)."""

    weight: torch.Tensor  # (V, H), in the dtype of the hidden states
    bias: torch.Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, hidden, weight, bias, *rest) -> "Head":
        """The operands in the dtype of the hidden states: a master copy of the weights is wider."""
        return cls(weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype), *rest)

    @property
    def inverse(self) -> float:
        return (self.logit_scale if self.softcap is None else 1.0) / self.temperature


def asked_for(mask: torch.Tensor | None, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(N,) each: which results are asked for, and the rows of hidden states that they are computed from; None: all."""
    asked = None if mask is None else mask.flatten().nonzero().squeeze(1)
    if rows is None:
        return asked, asked
    return asked, rows.flatten() if asked is None else rows.flatten()[asked]


def select_results(asked: torch.Tensor | None, *results: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Of tensors (..., [columns]) like targets, what is asked for."""
    flat = [r if r is None else r.reshape(-1).contiguous() for r in results]
    return flat if asked is None else [r if r is None else r[asked] for r in flat]


def local_targets(targets: torch.Tensor, vocab_start: int, vocab: int, vocab_size: int) -> torch.Tensor:
    """Counted from the first token of this part of the vocabulary; -1 for tokens of other parts, ``vocab`` for no token."""
    local = targets - vocab_start
    elsewhere = torch.where((targets >= 0) & (targets < vocab_size), -1, vocab)
    return torch.where((local >= 0) & (local < vocab), local, elsewhere)


def result_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Of the logits: fp32 where the GEMM can leave them so, since 16 bits round a logit by up to 2^-9 of its size."""
    fp32 = hidden.device.type == "cuda" and hidden.dtype in HALF and HAS_FP32_RESULTS
    return torch.float32 if fp32 else hidden.dtype


def row_bytes(hidden: torch.Tensor, vocab: int) -> int:
    return vocab * result_dtype(hidden).itemsize


def default_chunk_bytes(device: torch.device) -> int:
    """The weight's gradient is read and written once per chunk: a GPU needs longer ones to stay bound by its GEMMs."""
    return 2**28 if device.type == "cpu" else 2**30


def default_dlogits_bytes(device: torch.device) -> int | None:
    """Of the gradients by logits that are held at a time, beside the chunk; None: those of a chunk, in its memory."""
    return None if device.type == "cpu" else 2**32


def narrowed(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The memory of ``logits`` (n, V) as (n, V) of a dtype that is as wide or narrower: each row in its own row's place."""
    return logits.view(dtype)[:, : logits.shape[1]]


def flat(hidden: torch.Tensor) -> torch.Tensor:
    """(..., H) as (R, H), rows of adjacent elements."""
    return (hidden if hidden.stride(-1) == 1 else hidden.contiguous()).reshape(-1, hidden.shape[-1])


class Sweep:
    """Logits of the selected rows, a chunk at a time, in one buffer."""

    def __init__(self, hidden, head: Head, index, chunk_bytes: int, kept=None) -> None:
        """
        Args:
            hidden: (..., H).
            index: (N,) int64, the rows of it asked for; None: all.
            chunk_bytes: the most that the buffer takes.
            kept: (K, V): where the logits of the first K rows stay, instead of passing through the buffer.
        """
        self.hidden = flat(hidden)
        self.head, self.index = head, index
        self.num = len(self.hidden) if index is None else len(index)
        self.kept = min(self.num, 0 if kept is None else len(kept))
        self.kept_logits = kept
        self.rows_of_chunk = _rows_of_chunk(self.num - self.kept, chunk_bytes, row_bytes(hidden, len(head.weight)))
        self.num_chunks = bool(self.kept) + -(-(self.num - self.kept) // self.rows_of_chunk)
        self.buffer = None

    def __iter__(self):
        """(chunk, hidden states (n, H), room for logits (n, V)), chunk by chunk."""
        if self.kept:
            yield self._part(0, self.kept, self.kept_logits[: self.kept])
        for start in range(self.kept, self.num, self.rows_of_chunk):
            stop = min(start + self.rows_of_chunk, self.num)
            if self.buffer is None:
                shape = (self.rows_of_chunk, len(self.head.weight))
                self.buffer = torch.empty(shape, dtype=result_dtype(self.hidden), device=self.hidden.device)
            yield self._part(start, stop, self.buffer[: stop - start])

    def _part(self, start, stop, out):
        rows = slice(start, stop)
        return rows, self.hidden[rows if self.index is None else self.index[rows]], out

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write hidden @ weight.T + bias to ``out``."""
        weight, bias = self.head.weight.t(), self.head.bias
        if out.dtype == hidden.dtype:
            return torch.mm(hidden, weight, out=out) if bias is None else torch.addmm(bias, hidden, weight, out=out)
        torch.mm(hidden, weight, out_dtype=out.dtype, out=out)
        return out if bias is None else out.add_(bias)


def _rows_of_chunk(num: int, chunk_bytes: int, bytes_of_row: int) -> int:
    """Chunks of one size, as large as fits."""
    most = chunk_bytes // bytes_of_row
    if num <= most:
        return max(num, 1)
    most = max(most // ROW_TILE * ROW_TILE, min(most, ROW_TILE))
    chunks = -(-num // most)
    even = -(-num // chunks)
    return min(most, -(-even // 16) * 16)


class Gradients:
    """The gradients by hidden states, weight and bias: products of the gradients by the logits, part by part.

    The gradients by the weight and the bias are accumulated in fp32 where there are several parts.
    """

    def __init__(self, hidden, head: Head, index, needed, *, repeated, weight_dtype, parts=1, out=None, scale=None) -> None:
        """
        Args:
            hidden: (..., H).
            index: (N,) int64, the rows of ``hidden`` that the logits were computed from; None: all.
            needed: three bools, by hidden states, weight, bias.
            repeated: whether ``index`` may hold a row more than once.
            weight_dtype: of the gradient by the weight.
            parts: how often ``add`` will be called.
            out: (V, H): accumulate the gradient by the weight in this tensor, and return none.
            scale: () fp32: multiplies every gradient. The hidden states are scaled before the product with dlogits, rather than
                the (V, H) gradient after it.
        """
        self.shape, self.hidden_states, self.weight_matrix, self.index = hidden.shape, flat(hidden), head.weight, index
        self.repeated, self.weight_dtype, self.out, self.scale = repeated, weight_dtype, out, scale
        by_hidden, by_weight, by_bias = needed
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = self.weight = self.bias = None
        if by_hidden:
            new = torch.empty if index is None else torch.zeros
            self.hidden = new(self.hidden_states.shape, dtype=wide if repeated else hidden.dtype, device=hidden.device)
        if by_weight:
            dtype = hidden.dtype if parts == 1 and weight_dtype == hidden.dtype else wide
            self.weight = torch.empty(head.weight.shape, dtype=dtype, device=hidden.device) if out is None else out
        if by_bias:
            self.bias = torch.zeros(head.bias.shape, dtype=wide, device=hidden.device)
        self.started = out is not None

    def add(self, part: slice, dlogits: torch.Tensor) -> None:
        """Add the products of ``dlogits`` (n, V), in the dtype of the hidden states, with those of the rows ``part``."""
        place = part if self.index is None else self.index[part]
        if self.hidden is not None and self.index is None:
            torch.mm(dlogits, self.weight_matrix, out=self.hidden[part])
        elif self.hidden is not None:
            dhidden = torch.mm(dlogits, self.weight_matrix).to(self.hidden.dtype)
            put = self.hidden.index_add_ if self.repeated else self.hidden.index_copy_
            put(0, place, dhidden)
        if self.weight is not None:
            states = self.hidden_states[place]
            states = states if self.scale is None else states * self.scale
            _add_product(self.weight, dlogits.t(), states, self.started)
            self.started = True
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def results(self) -> list[torch.Tensor]:
        """The gradients by hidden states, weight and bias; (0,) where one is not needed or is in ``out``."""
        if self.weight is not None and not self.started:
            self.weight.zero_()
        if self.scale is not None:
            for gradient in (self.hidden, self.bias):
                if gradient is not None:
                    gradient.mul_(self.scale)
        weight = None if self.out is not None else self.weight
        dtypes = (self.hidden_states.dtype, self.weight_dtype, self.weight_dtype)
        results = zip((self.hidden, weight, self.bias), dtypes, strict=True)
        hidden, weight, bias = (self.hidden_states.new_empty(0) if x is None else x.to(dtype) for x, dtype in results)
        return [hidden if self.hidden is None else hidden.view(self.shape), weight, bias]


class Segments:
    """The gradients by the logits of a segment at a time, which are multiplied when it is complete.

    Each product accumulates in the fp32 (V, H) gradient by the weight. So where the logits are wider than their gradients, a
    segment is as many chunks as ``segment_bytes`` holds gradients of; else it is a chunk, overwritten by its gradient.
    """

    def __init__(self, hidden, sweep: Sweep, needed, segment_bytes: int, **options) -> None:
        """
        Args:
            needed, options: see ``Gradients``.
        """
        vocab, num = len(sweep.head.weight), sweep.num - sweep.kept
        most = segment_bytes // (vocab * hidden.itemsize)
        rows = num if num <= most else most // sweep.rows_of_chunk * sweep.rows_of_chunk
        wider = result_dtype(hidden) != hidden.dtype
        self.rows = rows if wider and rows > sweep.rows_of_chunk else 0
        self.buffer = hidden.new_empty(self.rows, vocab)
        self.start, self.num, self.kept = sweep.kept, sweep.num, sweep.kept
        parts = bool(sweep.kept) + -(-num // (self.rows or sweep.rows_of_chunk))
        self.gradients = Gradients(hidden, sweep.head, sweep.index, needed, parts=parts, **options)

    def room(self, chunk: slice, logits: torch.Tensor) -> torch.Tensor:
        """Where the gradients by ``logits`` go."""
        if not self.rows or chunk.stop <= self.kept:
            return narrowed(logits, self.buffer.dtype)
        return self.buffer[chunk.start - self.start : chunk.stop - self.start]

    def add(self, chunk: slice, dlogits: torch.Tensor) -> None:
        if not self.rows or chunk.stop <= self.kept:
            self.gradients.add(chunk, dlogits)
        elif chunk.stop == self.num or chunk.stop - self.start == self.rows:
            self.gradients.add(slice(self.start, chunk.stop), self.buffer[: chunk.stop - self.start])
            self.start = chunk.stop


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, add: bool) -> None:
    """out (V, H) = a (V, n) @ b (n, H), plus itself with ``add``; rounded once to the dtype of ``out`` where that can be."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif out.device.type == "cuda" and HAS_FP32_RESULTS and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        for start in range(0, len(out), VOCAB_BLOCK):
            block = slice(start, start + VOCAB_BLOCK)
            product = torch.mm(a[block], b)
            out[block].add_(product) if add else out[block].copy_(product)
