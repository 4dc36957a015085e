"""The gated delta rule of trees, one token after another: the oracle of ``gated_delta_rule``.

The state S, (Dk, Dv) for each value head, is a memory that maps keys to values. A token decays it and corrects its value for
the key k_t by the fraction beta_t:

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - k_t^T exp(g_t) S_{t-1})^T,    o_t = scale q_t^T S_t

where q and k are divided by their L2 norms. Gated Delta Networks, https://arxiv.org/abs/2412.06464, equation 10.
"""

import torch


def unsupported(*tensors: torch.Tensor) -> str | None:
    return None


def run(inputs, layout, initial_state, scale, normalize, return_state):
    """Return the output (N, Hv, Dv) and the final state of every segment (S, Hv, Dk, Dv)."""
    dtype = torch.promote_types(inputs.query.dtype, torch.float32)
    query, key, value, g, beta = (x.to(dtype) for x in inputs)
    if normalize:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query, key = (x.repeat_interleave(value.shape[1] // x.shape[1], 1) for x in (query, key))
    if initial_state is None:
        initial_state = value.new_zeros(layout.parents.count(-1), value.shape[1], key.shape[2], value.shape[2])
    states, outputs = [], []
    roots = iter(initial_state.to(dtype))
    for start, length, parent in zip(layout.starts, layout.lengths, layout.parents, strict=True):
        state = states[parent] if parent >= 0 else next(roots)
        for t in range(start, start + length):
            state = g[t].exp()[:, None, None] * state
            correction = beta[t, :, None] * (value[t] - torch.einsum("hkv,hk->hv", state, key[t]))
            state = state + torch.einsum("hk,hv->hkv", key[t], correction)
            outputs.append(scale * torch.einsum("hkv,hk->hv", state, query[t]))
        states.append(state)
    return torch.stack(outputs), torch.stack(states)
