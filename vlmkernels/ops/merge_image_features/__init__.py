"""Image features in place of the embeddings of their placeholder tokens, by index. Imports torch alone."""

from collections.abc import Sequence

import torch

from vlmkernels.ops.checks import require, require_dtype

_FEWER = "the prompt was truncated, or an image was resized after the prompt was tokenised"
_MORE = (
    "placeholder tokens were sampled in a completion (ban them: media_token_ids), or an image was resized after tokenisation"
)


def placeholder_positions(
    input_ids: torch.Tensor,
    token_ids: int | Sequence[int],
    num_features: torch.Tensor | Sequence[int],
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Where the placeholder tokens are, once per batch, on the host: the flat indices that ``merge_image_features`` takes.

        (input_ids == token_id).flatten().nonzero().squeeze(1)

    Args:
        input_ids: (B, S), or packed (N,), on the CPU.
        token_ids: those that stand for a feature.
        num_features: (B,) on the CPU, the features of each sample, which must have as many placeholders.
        cu_seqlens: (B + 1,) on the CPU, of packed samples; without it they are one sample.

    Returns:
        (M,) int64 on the CPU.
    """
    require(
        input_ids.device.type == "cpu", "input_ids", "be on the CPU: reading them must not wait for a device", input_ids.device
    )
    require(input_ids.dim() in (1, 2), "input_ids", "be (B, S) or packed (N,)", tuple(input_ids.shape))
    token_ids = torch.as_tensor(token_ids, dtype=input_ids.dtype)
    positions = torch.isin(input_ids, token_ids).flatten().nonzero().squeeze(1)
    if input_ids.dim() == 2:
        ends = torch.arange(1, len(input_ids) + 1) * input_ids.shape[1]
    else:
        ends = torch.tensor([len(input_ids)]) if cu_seqlens is None else cu_seqlens[1:].long()
    require(len(num_features) == len(ends), "num_features", f"hold one number per sample, {len(ends)}", len(num_features))
    tokens = torch.searchsorted(positions, ends).diff(prepend=ends.new_zeros(1))
    for sample, (number, features) in enumerate(zip(tokens.tolist(), torch.as_tensor(num_features).tolist(), strict=True)):
        if number != features:
            cause = _FEWER if number < features else _MORE
            raise ValueError(f"sample {sample}: must have one placeholder token per feature, {features}, got {number}: {cause}")
    return positions


def merge_image_features(embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Token embeddings with image features at the placeholders' positions.

        embeddings.masked_scatter((input_ids == token_id).unsqueeze(-1), features)

    One copy of the embeddings and one indexed copy of the features: no mask of the embeddings' size, no prefix sum over it, and
    no wait for the device.

    Args:
        embeddings: (B, S, H), or packed (N, H).
        features: (M, H), in the order of the placeholders; cast to the embeddings' dtype.
        positions: (M,) int64, from ``placeholder_positions``, moved to the embeddings' device once per batch; here otherwise.

    Gradients go to embeddings, 0 at the positions, and to features.
    """
    width = embeddings.shape[-1]
    require_dtype("positions", positions, torch.int64)
    rule = f"be {(len(positions), width)}, a row of the embeddings' width per position"
    require(features.shape == (len(positions), width), "features", rule, tuple(features.shape))
    positions = positions.to(embeddings.device, non_blocking=True)
    return embeddings.reshape(-1, width).index_copy(0, positions, features.to(embeddings.dtype)).view(embeddings.shape)
