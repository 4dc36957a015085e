"""The op ``rotary`` in the attention of transformers models.

The attention modules of transformers call ``apply_rotary_pos_emb`` and ``apply_rotary_pos_emb_vision``. ``use_fused_rotary``
lets the modules of one model call the op instead, as vlmkernels.models.forward_copies describes.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress

import torch

from vlmkernels.backend import use_backend
from vlmkernels.models import forward_copies
from vlmkernels.ops.rotary import rotary


def use_fused_rotary(model: torch.nn.Module, *, where_supported: bool = False) -> torch.nn.Module:
    """Rotate queries and keys in the attention modules of ``model`` with the op ``rotary``.

    The op replaces about ten passes over queries and keys, and in vision towers fp32 copies of them. Its results equal
    ``apply_rotary_pos_emb_vision``; in text models, in 16 bits, they are closer to fp64 than ``apply_rotary_pos_emb``.

    Changes ``model`` in place: the ``forward`` of its attention modules. ``undo_fused_rotary`` undoes it.

    Args:
        model: Qwen2-VL to Qwen3.5-VL, a text model such as Llama, or a part of a model. In GLM-4V, whose text model pairs other
            features, pass the vision tower.
        where_supported: leave attention modules for which this raises NotImplementedError as they are.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: no attention module calls one of these functions, an attention module that gets rotary embeddings
            calls neither, the function of this name computes something else, or the ``forward`` of an attention module has
            already been replaced.
    """
    if where_supported:
        for module in model.modules():
            if forward_copies.calling(type(module).forward, _FUSED):
                with suppress(NotImplementedError):
                    use_fused_rotary(module)
        return model
    checked, chosen = set(), []
    for module in model.modules():
        forward = type(module).forward
        path = forward_copies.calling(forward, _FUSED)
        if not path:
            if type(module).__name__.endswith("Attention") and "position_embeddings" in inspect.signature(forward).parameters:
                raise NotImplementedError(
                    f"model must have attention modules that call {' or '.join(_FUSED)}, got {type(module).__name__}, whose "
                    "forward gets position_embeddings and calls neither"
                )
            continue
        names = _FUSED.keys() & set(path[-1].__code__.co_names)
        if getattr(getattr(module, "config", None), "model_type", None) in _OTHER_TABLES:
            raise NotImplementedError(
                f"model must have cos and sin that hold every angle twice, got those of {type(module).__name__}"
            )
        if type(module) not in checked:
            for name in names:
                _check_same_function(name, path[-1].__globals__[name], type(module))
            checked.add(type(module))
        chosen.append((module, {name: _FUSED[name][0] for name in names}))
    if not chosen:
        raise NotImplementedError(
            f"model must have attention modules that call {' or '.join(_FUSED)}, got {type(model).__name__}"
        )
    for module, functions in chosen:
        forward_copies.replace(module, functions, __name__)
    return model


def undo_fused_rotary(model: torch.nn.Module) -> torch.nn.Module:
    """Undo ``use_fused_rotary`` in ``model``, in place, and return it."""
    forward_copies.restore(model, __name__)
    return model


def fused_vision_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace ``apply_rotary_pos_emb_vision``. q, k: (N, H, D); cos, sin: (N, D)."""
    return rotary(q, k, *_half_tables(cos, sin))


def fused_text_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace ``apply_rotary_pos_emb``.

    q, k: (B, H, S, D), and cos, sin: (B, S, R). If ``unsqueeze_dim`` is 2, q and k are (B, S, H, D); if it is 0 (Pixtral), cos
    and sin are (S, R).
    """
    if unsqueeze_dim == 0:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    return rotary(q, k, *_half_tables(cos, sin), heads_first=unsqueeze_dim != 2)


def _half_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the second half of the tables: transformers stores every angle twice."""
    pairs = cos.shape[-1] // 2
    return cos.narrow(-1, 0, pairs), sin.narrow(-1, 0, pairs)


# The function of transformers -> its replacement, and the shapes of q and cos that are used to compare the two.
_FUSED = {
    "apply_rotary_pos_emb_vision": (fused_vision_rotary, (3, 2, 8), (3, 8)),
    "apply_rotary_pos_emb": (fused_text_rotary, (1, 2, 3, 8), (1, 3, 8)),
}

# Configurations of models whose text has other angles in the second half of cos and sin than in the first.
_OTHER_TABLES = ("hunyuan_vl_text", "hunyuan_vl")


def _check_same_function(name: str, original: Callable, owner: type) -> None:
    """Check that ``original`` and its replacement return the same: some models use this name for another function."""
    fused, heads, tokens = _FUSED[name]
    x, angles = torch.linspace(-1, 1, 48).view(heads), torch.linspace(0, 3, 12).view(*tokens[:-1], 4)
    tables = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    arguments = (x, x.flip(-1), *tables)
    try:
        with use_backend("reference"):
            results = [*zip(fused(*arguments), original(*arguments), strict=True)]
    except TypeError:  # another signature
        results = []
    if not results or not all(torch.allclose(a.double(), b.double(), atol=1e-5) for a, b in results):
        raise NotImplementedError(
            f"model must have attention whose {name} rotates the pairs (j, j + P), got another function in {owner.__name__}"
        )
