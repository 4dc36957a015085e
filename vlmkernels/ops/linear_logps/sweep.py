"""The GEMMs of a language-model head over chunks of rows, so that the logits of all rows are never in memory at once."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from vlmkernels.ops.fixed_matmul import fixed_matmul, is_fixed

HALF = (torch.bfloat16, torch.float16)
# aten::mm.dtype_out, which only CUDA has: fp32 results of 16-bit operands.
HAS_FP32_RESULTS = "dtype_out" in torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]

# Without fp32 results, the gradient of the weight is accumulated in fp32 in blocks of this many rows.
VOCAB_BLOCK = 8192
# The rows of a chunk are a multiple of this if possible, for the tiles of the GEMMs.
ROW_TILE = 128


class Head(NamedTuple):
    """A head and the scaling of its logits x.

    The softmax is over z = u * inverse, where u = x, or softcap * tanh(x * logit_scale / softcap) with a softcap.
    """

    weight: torch.Tensor  # (V, H), in the dtype of the hidden states
    bias: torch.Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None

    @classmethod
    def from_operands(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        temperature: float,
        logit_scale: float,
        softcap: float | None,
    ) -> "Head":
        """Cast the operands to the dtype of the hidden states; a master copy of the weight is wider."""
        bias = None if bias is None else bias.to(hidden.dtype)
        return cls(gemm_operand(weight.to(hidden.dtype)), bias, temperature, logit_scale, softcap)

    @property
    def inverse(self) -> float:
        return (self.logit_scale if self.softcap is None else 1.0) / self.temperature

    def capped(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return u and du/dx of logits x, in fp32 if they are narrower."""
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap is None:
            return x, 1.0
        tanh = torch.tanh(x * (self.logit_scale / self.softcap))
        return self.softcap * tanh, self.logit_scale * (1 - tanh.square())


def selected_indices(mask: torch.Tensor | None, rows: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the flat indices (N,) of the selected results and of their rows of hidden states; None: all."""
    selected = None if mask is None else mask.flatten().nonzero().squeeze(1)
    if rows is None:
        return selected, selected
    return selected, rows.flatten() if selected is None else rows.flatten()[selected]


def select_results(selected: torch.Tensor | None, results: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Return the selected elements (N,), or rows (N, columns), of results in the shape of targets, as a contiguous tensor."""
    flat = results.reshape(-1) if columns is None else results.reshape(-1, columns)
    return flat.contiguous() if selected is None else flat[selected]


def write_results(selected: torch.Tensor | None, out: torch.Tensor, values: torch.Tensor) -> None:
    """Write the selected elements (N,), or rows (N, columns), to the contiguous ``out`` in the shape of targets."""
    flat = out.view(-1, *values.shape[1:])
    if selected is None:
        flat.copy_(values)
    else:
        flat.index_copy_(0, selected, values)


def local_targets(targets: torch.Tensor, vocab_start: int, vocab: int, vocab_size: int) -> torch.Tensor:
    """Return targets relative to the first token of this part of the vocabulary.

    A token of another part becomes -1, and a target that is not in the whole vocabulary becomes ``vocab``.
    """
    local = targets - vocab_start
    elsewhere = torch.where((targets >= 0) & (targets < vocab_size), -1, vocab)
    return torch.where((local >= 0) & (local < vocab), local, elsewhere)


def result_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype of the logits: fp32 if the GEMM supports it, because bf16 rounds a logit by up to 2^-9 of its size."""
    fp32 = hidden.device.type == "cuda" and hidden.dtype in HALF and HAS_FP32_RESULTS
    return torch.float32 if fp32 else hidden.dtype


def row_bytes(hidden: torch.Tensor, vocab: int) -> int:
    """Return the memory of a row of logits in bytes."""
    return vocab * result_dtype(hidden).itemsize


def default_chunk_bytes(device: torch.device) -> int:
    """Return the default of chunk_bytes.

    It is larger on a GPU, where each chunk reads and writes the gradient of the weight: its GEMMs must take longer than that.
    """
    return 2**28 if device.type == "cpu" else 2**30


# The largest weight of a token times gradient_scale is between half of this and this. The gradient of a logit then fits in fp16
# if its derivative of the token's loss is at most 255, and small probabilities do not underflow in it.
LARGEST_WEIGHT = 256.0


def is_scaled(hidden: torch.Tensor) -> bool:
    """Return whether gradients of logits that a forward pass computes are multiplied by ``gradient_scale``.

    fp16 cannot hold 1e-8. The loss scale cannot take its place: it is a factor of the gradient that autograd passes to the
    backward pass.
    """
    return hidden.dtype == torch.float16


def gradient_scale(largest: float) -> float:
    """Return a power of two that makes weights of tokens up to ``largest`` large enough for gradients in fp16."""
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** min(math.floor(math.log2(LARGEST_WEIGHT / largest)), 120)  # finite in fp32


def default_dlogits_bytes(device: torch.device) -> int | None:
    """Return the default memory of logit gradients that are held besides the chunk.

    None: only the gradients of one chunk are held, in the memory of its logits.
    """
    return None if device.type == "cpu" else 2**32


def narrowed(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View the memory of ``logits`` (n, V) as (n, V) of a dtype that is not wider; rows start at the same addresses."""
    return logits.view(dtype)[:, : logits.shape[1]]


def gemm_operand(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` (..., n, K), on the CPU as a copy if neither its rows nor its columns are without gaps.

    With AMX, oneDNN reads past the end of rows of 16-bit values and multiplies what it finds by zero, which is NaN if that is
    not finite. fp32 operands are copied too, because torch can run their GEMMs in bf16.
    """
    if matrix.device.type != "cpu" or _is_dense(matrix) or _is_dense(matrix.mT):
        return matrix
    return matrix.mT.contiguous().mT if matrix.stride(-2) == 1 else matrix.contiguous()


def _is_dense(matrix: torch.Tensor) -> bool:
    """Return whether the rows of ``matrix`` (..., n, K) follow one another without gaps."""
    (rows, width), (row, column) = matrix.shape[-2:], matrix.stride()[-2:]
    return (column == 1 or width <= 1) and (row == width or rows <= 1)


def flat(hidden: torch.Tensor) -> torch.Tensor:
    """Reshape (..., H) to (R, H) with contiguous rows, as an operand of a GEMM."""
    return gemm_operand((hidden if hidden.stride(-1) == 1 else hidden.contiguous()).reshape(-1, hidden.shape[-1]))


class Sweep:
    """Iterate over the logits of the selected rows in chunks, which share one buffer."""

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        index: torch.Tensor | None,
        chunk_bytes: int,
        kept: torch.Tensor | None = None,
        rows_of_chunk: int | None = None,
    ) -> None:
        """
        Args:
            hidden: (..., H).
            head: the head.
            index: (N,) int64, the selected rows of ``hidden``; None: all.
            chunk_bytes: upper bound on the memory of the buffer.
            kept: (K, V): the logits of the first K rows are written to it, instead of to the buffer, as one chunk.
            rows_of_chunk: the number of rows per chunk, instead of what ``chunk_bytes`` allows.
        """
        self.hidden = flat(hidden)
        self.head, self.index = head, index
        self.num = len(self.hidden) if index is None else len(index)
        self.kept = min(self.num, 0 if kept is None else len(kept))
        self.kept_logits = kept
        if rows_of_chunk is None:
            rows_of_chunk = _rows_of_chunk(self.num - self.kept, chunk_bytes, row_bytes(hidden, len(head.weight)))
        self.rows_of_chunk = rows_of_chunk
        self.buffer: torch.Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """For each chunk: its slice of the selected rows, their hidden states (n, H), and memory for their logits (n, V)."""
        if self.kept:
            assert self.kept_logits is not None
            yield self._part(0, self.kept, self.kept_logits[: self.kept])
        for start in range(self.kept, self.num, self.rows_of_chunk):
            stop = min(start + self.rows_of_chunk, self.num)
            if self.buffer is None:
                shape = (self.rows_of_chunk, len(self.head.weight))
                self.buffer = torch.empty(shape, dtype=result_dtype(self.hidden), device=self.hidden.device)
            yield self._part(start, stop, self.buffer[: stop - start])

    def _part(self, start: int, stop: int, out: torch.Tensor) -> tuple[slice, torch.Tensor, torch.Tensor]:
        rows = slice(start, stop)
        return rows, self.hidden[rows if self.index is None else self.index[rows]], out

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write hidden @ weight.T + bias to ``out``."""
        weight, bias = self.head.weight.t(), self.head.bias
        if is_fixed():
            return out.copy_(fixed_matmul(hidden, weight, bias=bias, out_dtype=out.dtype))
        if bias is None or out.dtype == hidden.dtype:
            return _mm(hidden, weight, out.dtype, out=out, add=bias)
        return _mm(hidden, weight, out.dtype, out=out).add_(bias)


def _rows_of_chunk(num: int, chunk_bytes: int, bytes_of_row: int) -> int:
    """Return the number of rows per chunk: as few chunks as ``chunk_bytes`` allows, of almost equal size."""
    most = chunk_bytes // bytes_of_row
    if num <= most:
        return max(num, 1)
    most = max(most // ROW_TILE * ROW_TILE, min(most, ROW_TILE))
    chunks = -(-num // most)
    even = -(-num // chunks)
    return min(most, -(-even // 16) * 16)


class Gradients:
    """Accumulate the gradients of hidden states, weight and bias from the gradients of the logits, part by part.

    If there are several parts, the gradient of the weight is accumulated in fp32. The gradient of the bias always is.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        head: Head,
        index: torch.Tensor | None,
        needed: Sequence[bool],
        *,
        repeated: bool,
        weight_dtype: torch.dtype,
        parts: int = 1,
        out: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        in_fp32: bool = False,
    ) -> None:
        """
        Args:
            hidden: (..., H).
            head: the head.
            index: (N,) int64, the rows of ``hidden`` that the logits were computed from; None: all.
            needed: whether hidden states, weight and bias need gradients.
            repeated: whether a row may occur several times in ``index``.
            weight_dtype: the dtype of the gradient of the weight.
            parts: the number of calls of ``add``.
            out: (V, H): add the gradient of the weight to this tensor, and return none.
            scale: () fp32, multiplies all gradients. For the gradient of the weight, the hidden states are multiplied by it
                before the product with dlogits, which is cheaper than multiplying the (V, H) result.
            in_fp32: compute and return the gradients in fp32, because they can be beyond the range of fp16 until they are
                scaled. ``scale`` then multiplies all results; the hidden states could underflow.
        """
        self.shape, self.hidden_states, self.weight_matrix, self.index = hidden.shape, flat(hidden), head.weight, index
        self.repeated, self.out, self.scale, self.in_fp32 = repeated, out, scale, in_fp32
        by_hidden, by_weight, by_bias = needed
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden_dtype, self.weight_dtype = (wide, wide) if in_fp32 else (hidden.dtype, weight_dtype)
        self.hidden: torch.Tensor | None = None
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if by_hidden:
            new = torch.empty if index is None else torch.zeros
            self.hidden = new(self.hidden_states.shape, dtype=wide if repeated else self.hidden_dtype, device=hidden.device)
        if by_weight:
            dtype = hidden.dtype if parts == 1 and self.weight_dtype == hidden.dtype else wide
            self.weight = torch.empty(head.weight.shape, dtype=dtype, device=hidden.device) if out is None else out
        if by_bias:
            assert head.bias is not None
            self.bias = torch.zeros(head.bias.shape, dtype=wide, device=hidden.device)
        self.started = out is not None

    def add(self, part: slice, dlogits: torch.Tensor) -> None:
        """Add the products of ``dlogits`` (n, V), in the dtype of the hidden states, for the selected rows ``part``."""
        place = part if self.index is None else self.index[part]
        dlogits = gemm_operand(dlogits)
        if self.hidden is not None:
            if isinstance(place, slice):
                _product(dlogits, self.weight_matrix, self.hidden_dtype, out=self.hidden[place])
            else:
                dhidden = _product(dlogits, self.weight_matrix, self.hidden_dtype).to(self.hidden.dtype)
                put = self.hidden.index_add_ if self.repeated else self.hidden.index_copy_
                put(0, place, dhidden)
        if self.weight is not None:
            states = self.hidden_states[place]
            states = states if self.scale is None or self.in_fp32 else states * self.scale
            _add_product(self.weight, dlogits.t(), states, self.started)
            self.started = True
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def results(self) -> list[torch.Tensor]:
        """Return the gradients of hidden states, weight and bias; (0,) for one that is not needed or was added to ``out``."""
        if self.weight is not None and not self.started:
            self.weight.zero_()
        if self.scale is not None:
            for gradient in (self.hidden, self.bias, self.weight if self.in_fp32 else None):
                if gradient is not None:
                    gradient.mul_(self.scale)
        weight = None if self.out is not None else self.weight
        dtypes = (self.hidden_dtype, self.weight_dtype, self.weight_dtype)
        results = zip((self.hidden, weight, self.bias), dtypes, strict=True)
        hidden, weight, bias = (self.hidden_states.new_empty(0) if x is None else x.to(dtype) for x, dtype in results)
        return [hidden if self.hidden is None else hidden.view(self.shape), weight, bias]


def empty_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: Sequence[bool], in_fp32: bool = False
) -> list[torch.Tensor]:
    """Return uninitialized tensors with the shapes and dtypes of ``Gradients.results``, for the fake implementations."""
    like = (hidden, weight, weight if bias is None else weight.new_empty(bias.shape))
    dtypes = [torch.float32 if in_fp32 else x.dtype for x in like]
    results = zip(like, dtypes, needed, strict=True)
    return [x.new_empty(x.shape, dtype=dtype) if n else hidden.new_empty(0) for x, dtype, n in results]


class Segments:
    """Collect the logit gradients of several chunks, a segment, and add their products to ``Gradients`` at once.

    Every product reads and writes the fp32 (V, H) gradient of the weight, so fewer products are faster. If the logits are wider
    than their gradients, a segment has as many chunks as fit in ``segment_bytes``. Otherwise it is one chunk, whose logits are
    overwritten by their gradient.
    """

    def __init__(self, hidden: torch.Tensor, sweep: Sweep, needed: Sequence[bool], segment_bytes: int, **options: Any) -> None:
        """
        Args:
            hidden: (..., H).
            sweep: the chunks.
            needed, options: see ``Gradients``.
            segment_bytes: upper bound on the memory of the gradients of a segment.
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
        """Return the memory for the gradients of ``logits``, the logits of ``chunk``."""
        if not self.rows or chunk.stop <= self.kept:
            return narrowed(logits, self.buffer.dtype)
        return self.buffer[chunk.start - self.start : chunk.stop - self.start]

    def add(self, chunk: slice, dlogits: torch.Tensor) -> None:
        """Add the gradients of a chunk, which were written to its ``room``."""
        if not self.rows or chunk.stop <= self.kept:
            self.gradients.add(chunk, dlogits)
        elif chunk.stop == self.num or chunk.stop - self.start == self.rows:
            self.gradients.add(slice(self.start, chunk.stop), self.buffer[: chunk.stop - self.start])
            self.start = chunk.stop


def _mm(
    a: torch.Tensor,
    b: torch.Tensor,
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a @ b, or a @ b + ``add``, in ``dtype``: that of the operands, or fp32 if HAS_FP32_RESULTS."""
    a, b = gemm_operand(a), gemm_operand(b)
    options = {} if dtype == a.dtype else {"out_dtype": dtype}
    return torch.mm(a, b, out=out, **options) if add is None else torch.addmm(add, a, b, out=out, **options)


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return a @ b in ``dtype``, which is that of ``a`` or wider. The product is rounded only to ``dtype``."""
    if dtype == a.dtype or (a.device.type == "cuda" and HAS_FP32_RESULTS and dtype == torch.float32):
        return _mm(a, b, dtype, out=out)
    return _mm(a.to(dtype), b.to(dtype), dtype, out=out)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, add: bool) -> None:
    """Write, or with ``add`` add, a (V, n) @ b (n, H) to ``out`` (V, H).

    If the GEMM supports it, or ``a`` is fp16, whose range is small, the product is rounded only to the dtype of ``out``, not to
    the dtype of ``a``.
    """
    if out.dtype == a.dtype or (out.device.type == "cuda" and HAS_FP32_RESULTS and out.dtype == torch.float32):
        _mm(a, b, out.dtype, out=out, add=out if add else None)
        return
    dtype = out.dtype if a.dtype == torch.float16 else a.dtype
    b = b.to(dtype)
    for start in range(0, len(out), VOCAB_BLOCK):
        block = slice(start, start + VOCAB_BLOCK)
        product = _mm(a[block].to(dtype), b, dtype)
        out[block].add_(product) if add else out[block].copy_(product)
