"""The gated delta rule by matrix products over chunks of tokens, all chunks of a wave (plan.py) in one batch.

Within a chunk of C tokens that starts from the state S, let G be the cumulative sum of g, W_ij = exp(G_i - G_j) for j <= i, and
x_i the correction of token i before its factor beta_i. Token i reads S and what the tokens before it wrote:

    x_i = v_i - exp(G_i) k_i^T S - sum_{j<i} W_ij (k_i^T k_j) beta_j x_j,  so that  X = (I + A)^-1 (V - exp(G) K S)
    o_i = exp(G_i) q_i^T S + sum_{j<=i} W_ij (q_i^T k_j) beta_j x_j
    S'  = exp(G_C) S + sum_j exp(G_C - G_j) beta_j k_j x_j^T

The gradient of g_t is the sum over all terms that it decays: tokens from t on that read S or what tokens before t wrote, and S'
of S or of what tokens before t wrote. A gradient of G would be simpler, but where the decay is strong its terms cancel.

The queries and keys of a chunk are stacked as (2 C, Dk), and the states of the r = Hv / Hk value heads of a key head lie side
by side as (Dk, r Dv), so that one product serves them all. https://arxiv.org/abs/2412.06464, section 3.3.
"""

from typing import NamedTuple

import torch

from vlmkernels.ops.gated_delta_rule.plan import Group, Plan, plan

SMALLEST = 16  # on the CPU, triangular matrices of more rows are inverted by blocks, which is faster


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


def chunk_sizes(device: torch.device, width: int) -> tuple[int, ...]:
    """Return the sizes of chunks: on the CPU those that were fastest for Dk = ``width``, elsewhere those of few kernels."""
    if device.type != "cpu":
        return (1, 16, 64)
    return (1, 4, 8, 16, 32) if width <= 64 else (1, 4, 8, 16, 32, 64)


class _Settings(NamedTuple):
    plan: Plan
    scale: float
    normalize: bool
    return_state: bool

    def uses_states(self, group: Group) -> bool:
        """Whether the states after these chunks are used."""
        return self.return_state or not group.is_last


def run(inputs, layout, initial_state, scale, normalize, return_state):
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    tensors, device = [x.to(dtype) for x in inputs], inputs.query.device
    heads = inputs.key.shape[1], inputs.value.shape[1]
    settings = _Settings(plan(layout, *heads, chunk_sizes(device, inputs.key.shape[2]), device), scale, normalize, return_state)
    waves = settings.plan.waves
    if len(waves) == 1 and waves[0][-1].size == 1 and initial_state is not None:
        return _step(*tensors, initial_state.to(dtype), settings)
    return _Rule.apply(*tensors, None if initial_state is None else initial_state.to(dtype), settings)


def _step(query, key, value, g, beta, initial, settings: _Settings):
    """The rule for paths of one token, as in decoding."""
    plan, r = settings.plan, value.shape[1] // key.shape[1]
    if settings.normalize:
        query, key = (x * _norm(x) for x in (query, key))
    query, key = (x.repeat_interleave(r, 1).flatten(0, 1).unsqueeze(1) for x in (query, key))
    state = (initial[plan.waves[0][0].sources] * g.exp()[..., None, None]).flatten(0, 1)  # (N * Hv, Dk, Dv)
    correction = beta.reshape(-1, 1, 1) * (value.flatten(0, 1).unsqueeze(1) - key @ state)
    state = torch.baddbmm(state, key.mT, correction) if torch.is_grad_enabled() else state.baddbmm_(key.mT, correction)
    out = settings.scale * (query @ state).view_as(value)
    if not settings.return_state:
        return out, None
    state = state.unflatten(0, value.shape[:2])
    if len(state) == plan.num_segments:  # each segment has a token
        return out, state
    finals = state.new_empty(plan.num_segments, *state.shape[1:])
    for ends, states in zip(plan.ends, (initial, state), strict=True):
        if ends is not None:
            finals[ends.segments] = states[ends.states]
    return out, finals


def _norm(x):
    """Return the factor by which the rule normalizes queries and keys."""
    return (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def inverse(a):
    """Return the inverse of I + the strictly lower part of ``a`` (B, C, C), where C is a power of two."""
    size = a.shape[-1]
    if size <= SMALLEST or a.device.type != "cpu":
        eye = torch.eye(size, dtype=a.dtype, device=a.device)
        return torch.linalg.solve_triangular(a, eye.expand_as(a), upper=False, unitriangular=True)
    half = size // 2
    first, second = inverse(torch.cat([a[:, :half, :half], a[:, half:, half:]])).chunk(2)
    result = torch.zeros_like(a)
    result[:, :half, :half], result[:, half:, half:] = first, second
    result[:, half:, :half] = (second @ (a[:, half:, :half] @ first)).neg_()
    return result


class _Chunks:
    """The n chunks of a group, with r = Hv / Hk: their queries and keys, and factors from g and beta."""

    def __init__(self, group: Group, query, key, g, beta, settings: _Settings):
        num, (heads, width), size = group.states.stop - group.states.start, key.shape[1:], group.size
        self.group, self.size, self.scale, self.normalize = group, size, settings.scale, settings.normalize
        self.shape = (num, heads, g.shape[1] // heads, size)
        rows = [x.flatten(0, 1).index_select(0, group.key_rows).view(-1, size, width) for x in (query, key)]
        self.pair = torch.cat(rows, 1)  # (n * Hk, 2 C, Dk)
        self.norm = _norm(self.pair) if self.normalize else torch.ones_like(self.pair[..., :1])
        self.norm[:, :size] *= self.scale
        self.pair *= self.norm
        self.key = self.pair[:, size:]
        # (n, Hk, 1, 2, C, C): queries by keys, and keys by keys
        self.products = (self.pair @ self.key.mT).view(num, heads, 1, 2, size, size)
        total = self.gather(g).cumsum(-1)
        later = torch.full((size, size), -torch.inf, dtype=g.dtype, device=g.device).triu_(1)
        self.decays = (total.unsqueeze(-1) - total.unsqueeze(-2)).add_(later).exp_()  # (n, Hk, r, C, C)
        self.beta = self.gather(beta).unsqueeze(-2)  # (n, Hk, r, 1, C)
        self.weights = self.decays * self.beta
        self.read = total.exp().unsqueeze(-1)  # (n, Hk, r, C, 1)
        self.kept = (total[..., -1:] - total).exp_().unsqueeze(-1)
        self.write = self.kept * self.beta.mT
        self.decay = self.read[..., -1, :].unsqueeze(2)  # (n, Hk, 1, r, 1)

    def gather(self, x):
        """Return (n, Hk, r, C, ...) of the pack (N, Hv, ...), 0 in the padding."""
        rows = x.flatten(0, 1).index_select(0, self.group.value_rows)
        return rows.index_fill_(0, self.group.padding, 0).view(*self.shape, *x.shape[2:])

    def apart(self, x, *lead):
        """View (n * Hk, [lead,] C, r * Dv) as (n, Hk, [lead,] r, C, Dv)."""
        num, heads, r, size = self.shape
        return x.view(num, heads, *lead, size, r, x.shape[-1] // r).transpose(-3, -2)

    def side_by_side(self, x, factor):
        """Return x (n, Hk, r, C, Dv) times ``factor`` as (n * Hk, C, r * Dv)."""
        num, heads, r, size = self.shape
        result = x.new_empty(num * heads, size, r * x.shape[-1])
        torch.mul(x, factor, out=self.apart(result))
        return result

    def denormalize(self, dpair, dquery, dkey):
        """Write the gradients (n * Hk * C, Dk) of queries and keys, given that of ``pair``, which is overwritten."""
        if self.normalize:
            inner = (self.pair * dpair).sum(-1, keepdim=True)
            inner[:, : self.size] /= self.scale**2
            dpair.addcmul_(self.pair, inner, value=-1)
        for part, norm, out in zip(dpair.split(self.size, 1), self.norm.split(self.size, 1), (dquery, dkey), strict=True):
            torch.mul(part, norm, out=out.view_as(part))


def _forward(c: _Chunks, value, state, new, out):
    """Write the outputs (n * Hv, C, Dv) and the new states; return the corrections and (I + A)^-1 for the backward pass.

    state, new: (n, Hk, Dk, r * Dv); None for old states of zeros, and for new states that are not used.
    """
    attention = c.products * c.weights.unsqueeze(3)  # (n, Hk, r, 2, C, C)
    solver = inverse(attention[:, :, :, 1].flatten(0, 2))
    attention = attention[:, :, :, 0].flatten(0, 2)
    x, dv = c.gather(value), value.shape[2]
    if state is None:
        x = solver @ x.flatten(0, 2)
        torch.bmm(attention, x, out=out)
    else:
        reads = c.apart(c.pair @ state.flatten(0, 1), 2)  # (n, Hk, 2, r, C, Dv)
        torch.mul(reads[:, :, 0], c.read, out=out.view_as(x))
        x = solver @ torch.addcmul(x, reads[:, :, 1], c.read, value=-1, out=x).flatten(0, 2)
        out.baddbmm_(attention, x)
    x = x.view(*c.shape, dv)
    if new is not None:
        writes = c.side_by_side(x, c.write)
        if state is None:
            torch.bmm(c.key.mT, writes, out=new.flatten(0, 1))
        else:
            torch.mul(state.unflatten(-1, (-1, dv)), c.decay, out=new.unflatten(-1, (-1, dv)))
            new.flatten(0, 1).baddbmm_(c.key.mT, writes)
    return x, solver


def _backward(c: _Chunks, dout, state, dnew, x, solver, dvalue):
    """Write the gradient of the values (n * Hv, C, Dv); return those of c.pair, of g and beta (n, Hk, r, C), and of ``state``.

    state, dnew: (n, Hk, Dk, r * Dv); None for zeros. The memory of ``dnew`` is used for the gradient of ``state``.
    """
    (num, heads, r, size), dv = c.shape, dout.shape[2]
    dout = c.gather(dout)
    dx = ((c.products[:, :, :, 0] * c.weights).flatten(0, 2).mT @ dout.flatten(0, 2)).view_as(dout)
    if dnew is not None:
        flat = dnew.flatten(0, 1)
        dwrites = c.apart(c.key @ flat)
        dx.addcmul_(dwrites, c.write)
        of_writes = (dwrites * x).sum(-1) * c.kept.squeeze(-1)
        dkey = c.side_by_side(x, c.write) @ flat.mT
    torch.bmm(solver.mT, dx.flatten(0, 2), out=dvalue)
    dvalue = dvalue.view_as(dout)
    # What tokens read from tokens before them.
    dproducts = torch.cat([dout, -dvalue], 3).flatten(0, 2) @ x.flatten(0, 2).mT
    dproducts = dproducts.view(num, heads, r, 2, size, size).mul_(c.decays.unsqueeze(3))
    dproducts[:, :, :, 1].diagonal(dim1=-2, dim2=-1).zero_()
    of_pairs = (dproducts * c.products).sum(3)
    dbeta = of_pairs.sum(-2)
    dproducts = dproducts.mul_(c.beta.unsqueeze(3)).sum(2).view(-1, 2 * size, size)
    dpair = dproducts @ c.key
    before = torch.ones(size, size, dtype=dout.dtype, device=dout.device).triu_(1)  # [j, t]: j < t
    dg = (of_pairs.mul_(c.beta) @ before).tril_().sum(-2)
    # What they write to the new states.
    if dnew is None:
        dkey = dproducts.mT @ c.pair
    else:
        dkey.baddbmm_(dproducts.mT, c.pair)
        dbeta += of_writes
        dg += (of_writes * c.beta.squeeze(-2)) @ before
    dpair[:, size:] += dkey
    if state is None:
        return dpair, dg, dbeta, None
    # What they read from the old states.
    flat = state.flatten(0, 1)
    dreads = torch.cat([c.side_by_side(dout, c.read), c.side_by_side(dvalue, -c.read)], 1)
    dpair.baddbmm_(dreads, flat.mT)
    dg += (c.apart(c.pair @ flat, 2) * c.apart(dreads, 2)).sum((2, -1)) @ (1 - before)
    if dnew is None:
        dstate = (c.pair.mT @ dreads).view_as(state)
    else:
        dstate = dnew
        apart = dstate.unflatten(-1, (r, dv))
        apart *= c.decay
        dg += (dstate * state).unflatten(-1, (r, dv)).sum((2, 4)).unsqueeze(-1)
        dstate.flatten(0, 1).baddbmm_(c.pair.mT, dreads)
    return dpair, dg, dbeta, dstate


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, g, beta, initial, settings: _Settings):
        plan, (heads, dv), (_, key_heads, dk) = settings.plan, value.shape[1:], key.shape
        out = value.new_empty(plan.waves[-1][-1].values.stop, dv)
        finals = value.new_zeros(plan.num_segments, heads, dk, dv) if settings.return_state else None
        before, stored, has_backward = [], [], any(ctx.needs_input_grad)

        def put(ends, states):
            if finals is not None and ends is not None and states is not None:
                finals[ends.segments] = _unpaired(states[ends.states], dv)

        states = None if initial is None else _paired(initial, key_heads)
        put(plan.ends[0], states)
        for wave, ends in zip(plan.waves, plan.ends[1:], strict=True):
            new = value.new_empty(wave[-1].states.stop, key_heads, dk, heads // key_heads * dv)
            for group in wave:
                c = _Chunks(group, query, key, g, beta, settings)
                state = None if states is None else states[group.sources]
                used = new[group.states] if settings.uses_states(group) else None
                saved = _forward(c, value, state, used, out[group.values].view(-1, c.size, dv))
                stored += saved if has_backward else ()
            before += [states] if has_backward else ()
            states = new
            put(ends, states)
        ctx.settings, ctx.dv = settings, dv
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, g, beta, *before, *stored)
        return out.index_select(0, plan.value_rows).view_as(value), finals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dfinals):
        tensors = ctx.saved_tensors  # read once: activation checkpointing does not allow more
        with torch.autocast(tensors[0].device.type, enabled=False):
            return _Rule._gradients(ctx, tensors, dout, dfinals)

    @staticmethod
    def _gradients(ctx, tensors, dout, dfinals):
        query, key, g, beta, *stored = tensors
        settings: _Settings = ctx.settings
        plan, num, dk, dv = settings.plan, len(settings.plan.waves), key.shape[2], ctx.dv
        before, pairs = stored[:num], stored[num:]
        last = plan.waves[-1][-1]
        dquery, dkey = (key.new_empty(last.keys.stop, dk) for _ in range(2))
        dvalue, (dg, dbeta) = key.new_empty(last.values.stop, dv), key.new_empty(2, last.values.stop)
        if dout is None:
            dout = key.new_zeros(*g.shape, dv)
        dnew = None  # of the states after a wave
        for wave, ends, states in zip(reversed(plan.waves), reversed(plan.ends), reversed(before), strict=False):
            if dfinals is not None and ends is not None:
                dnew = _add(dnew, ends.states, _paired(dfinals[ends.segments], key.shape[1]), wave[-1].states.stop)
            dstates = None
            for group in reversed(wave):
                solver, x = pairs.pop(), pairs.pop()
                c = _Chunks(group, query, key, g, beta, settings)
                state = None if states is None else states[group.sources]
                used = dnew[group.states] if dnew is not None and settings.uses_states(group) else None
                dpair, *of_gates, dstate = _backward(c, dout, state, used, x, solver, dvalue[group.values].view(-1, c.size, dv))
                for rows, values in zip((dg, dbeta), of_gates, strict=True):
                    rows[group.values] = values.flatten()
                c.denormalize(dpair, dquery[group.keys], dkey[group.keys])
                if dstate is not None:
                    dstates = _add(dstates, group.sources, dstate, len(states))
            dnew = dstates
        dinitial = None
        if before[0] is not None:
            if dfinals is not None and plan.ends[0] is not None:
                ends = plan.ends[0]
                dnew = _add(dnew, ends.states, _paired(dfinals[ends.segments], key.shape[1]), len(before[0]))
            dinitial = _unpaired(dnew, dv)
        dquery, dkey = (x.index_select(0, plan.key_rows).view_as(key) for x in (dquery, dkey))
        dvalue, dg, dbeta = (x.index_select(0, plan.value_rows).view(*g.shape, -1) for x in (dvalue, dg, dbeta))
        return dquery, dkey, dvalue, dg.view_as(g), dbeta.view_as(g), dinitial, None


def _add(total, rows, part, num):
    """Add ``part`` to the rows of ``total`` (num, ...), or of zeros if it is None. ``part`` may be overwritten."""
    if total is None:
        if isinstance(rows, slice) and len(part) == num:
            return part
        total = part.new_zeros(num, *part.shape[1:])
    if isinstance(rows, slice):
        total[rows] += part
    else:
        total.index_add_(0, rows, part)
    return total


def _paired(states, key_heads):
    """Return a copy (n, Hk, Dk, r * Dv) of states (n, Hv, Dk, Dv)."""
    return states.unflatten(1, (key_heads, -1)).transpose(2, 3).clone(memory_format=torch.contiguous_format).flatten(3)


def _unpaired(states, dv):
    """The inverse of ``_paired``."""
    return states.unflatten(-1, (-1, dv)).transpose(2, 3).flatten(1, 2)
