"""Replace the embeddings of placeholder tokens by image features. Imports only torch."""

from collections.abc import Sequence

import torch

from vlmkernels.ops.arguments import as_cu_seqlens, as_indices

__all__ = ["merge_image_features", "placeholder_positions"]

_FEWER = "the prompt was truncated, or an image was resized after the prompt was tokenized"
_MORE = (
    "placeholder tokens were sampled in a completion (ban them: media_token_ids), or an image was resized after tokenization"
)


def placeholder_positions(
    input_ids: torch.Tensor,
    token_ids: int | Sequence[int],
    num_features: torch.Tensor | Sequence[int],
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the flat indices of the placeholder tokens, for ``merge_image_features``. Call it once per batch, on the CPU.

    Equivalent to::

        torch.isin(input_ids, token_ids).flatten().nonzero().squeeze(1)

    Args:
        input_ids: (B, S), or packed (N,), on the CPU.
        token_ids: the ids of the placeholder tokens.
        num_features: (B,) on the CPU, the number of features of each sample. It must equal the number of its placeholders.
        cu_seqlens: (B + 1,) on the CPU, the bounds of packed samples. Default: one sample.

    Returns:
        (M,) int64 on the CPU.

    Raises:
        ValueError: ``input_ids`` are not on the CPU or have a wrong shape; or a sample does not have as many placeholders as
            features: the error names the sample.
    """
    input_ids = as_indices("input_ids", input_ids)
    num_features = as_indices("num_features", num_features)
    if input_ids.device.type != "cpu":
        raise ValueError(f"input_ids must be on the CPU (reading them must not wait for a device), got {input_ids.device}")
    if input_ids.dim() not in (1, 2):
        raise ValueError(f"input_ids must be (B, S) or packed (N,), got {tuple(input_ids.shape)}")
    placeholders = as_indices("token_ids", token_ids)
    positions = torch.isin(input_ids, placeholders).flatten().nonzero().squeeze(1)
    if input_ids.dim() == 2:
        ends = torch.arange(1, len(input_ids) + 1) * input_ids.shape[1]
    else:
        ends = torch.tensor([len(input_ids)]) if cu_seqlens is None else as_cu_seqlens(cu_seqlens)[1:].long()
    if num_features.shape != ends.shape:
        got = len(num_features) if num_features.dim() == 1 else tuple(num_features.shape)
        raise ValueError(f"num_features must hold one number per sample, {len(ends)}, got {got}")
    tokens = torch.searchsorted(positions, ends).diff(prepend=ends.new_zeros(1))
    for sample, (number, features) in enumerate(zip(tokens.tolist(), num_features.tolist(), strict=True)):
        if number != features:
            cause = _FEWER if number < features else _MORE
            raise ValueError(
                f"input_ids must have one placeholder token per feature, {features} in sample {sample}, got {number}: {cause}"
            )
    return positions


def merge_image_features(embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Replace the embeddings of placeholder tokens by image features, in a copy.

    Equivalent to::

        embeddings.masked_scatter((input_ids == token_id).unsqueeze(-1), features)

    with one copy of the embeddings and one indexed copy of the features. It needs no mask of the size of the embeddings and no
    prefix sum over it, and does not wait for the device.

    Args:
        embeddings: (B, S, H), or packed (N, H).
        features: (M, H), in the order of the placeholders; cast to the dtype of ``embeddings``.
        positions: (M,) integers, from ``placeholder_positions``. Move them to the device of ``embeddings`` once per batch;
            otherwise every call copies them.

    Returns:
        A tensor in the shape and dtype of ``embeddings``. ``features`` and ``embeddings`` get gradients; the gradient of
        ``embeddings`` is 0 at the positions.

    Raises:
        ValueError, TypeError: a shape or dtype is wrong.
    """
    width = embeddings.shape[-1]
    positions = as_indices("positions", positions)
    if positions.dim() != 1:
        raise ValueError(f"positions must be (M,), got {tuple(positions.shape)}")
    if features.shape != (len(positions), width):
        raise ValueError(
            f"features must be {(len(positions), width)}, a row of the embeddings' width per position,"
            f" got {tuple(features.shape)}"
        )
    positions = positions.to(embeddings.device, non_blocking=True)
    return embeddings.reshape(-1, width).index_copy(0, positions, features.to(embeddings.dtype)).view(embeddings.shape)
