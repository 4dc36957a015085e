"""``rotary`` inside transformers' models: of one model at a time, no code of theirs changed or copied, nothing global."""

import inspect
from types import CellType, FunctionType, MethodType

import torch

from vlmkernels.backend import use_backend
from vlmkernels.ops.checks import require
from vlmkernels.ops.rotary import rotary


def _halves(cos, sin):
    """The tables of transformers hold every angle twice."""
    pairs = cos.shape[-1] // 2
    return cos.narrow(-1, 0, pairs), sin.narrow(-1, 0, pairs)


def fused_vision_rotary(q, k, cos, sin):
    """In place of ``apply_rotary_pos_emb_vision``. q, k: (N, H, D); cos, sin: (N, D)."""
    return rotary(q, k, *_halves(cos, sin))


def fused_text_rotary(q, k, cos, sin):
    """In place of ``apply_rotary_pos_emb``. q, k: (B, H, S, D); cos, sin: (B, S, R)."""
    return rotary(q, k, *_halves(cos, sin), heads_first=True)


# What stands in for a function that transformers' attention modules call by this name, and axes of its q and cos.
_FUSED = {
    "apply_rotary_pos_emb_vision": (fused_vision_rotary, (3, 2, 8), (3, 8)),
    "apply_rotary_pos_emb": (fused_text_rotary, (1, 2, 3, 8), (1, 3, 8)),
}


def _check(name: str, theirs, owner: type) -> None:
    """Models give one name to different functions: GLM's text pairs neighbours. Two tensors are sent through to see."""
    ours, heads, tokens = _FUSED[name]
    x, angles = torch.linspace(-1, 1, 48).view(heads), torch.linspace(0, 3, 12).view(*tokens[:-1], 4)
    tables = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    arguments = (x, x.flip(-1), *tables)
    with use_backend("reference"):
        results = zip(ours(*arguments), theirs(*arguments), strict=True)
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in results)
    rule = f"have attention whose {name} turns the pairs (j, j + P)"
    require(same, "model", rule, f"another function in {owner.__name__}", NotImplementedError)


def _with_globals(forward: FunctionType, replaced: dict) -> FunctionType:
    """A copy of ``forward`` that finds other globals; where it is decorated, of the function within and of its decorators."""
    scope, closure, inner = forward.__globals__, forward.__closure__, getattr(forward, "__wrapped__", None)
    if inner is None:
        # Without __name__, by which torch.compile would find the globals of transformers again.
        scope = {name: value for name, value in scope.items() if name != "__name__"} | replaced
    else:
        bound = _with_globals(inner, replaced)
        cells = [cell.cell_contents is inner for cell in closure or ()]
        require(any(cells), "model", "have decorators that call what they wrap", forward.__qualname__, NotImplementedError)
        closure = tuple(CellType(bound) if own else cell for own, cell in zip(cells, closure, strict=True))
    copied = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, closure)
    copied.__kwdefaults__, copied.__module__ = forward.__kwdefaults__, __name__
    if inner is not None:
        copied.__wrapped__ = bound
    return copied


def use_fused_rotary(model: torch.nn.Module) -> torch.nn.Module:
    """Let the attention modules of ``model`` turn queries and keys by the op ``rotary``.

    Instead of about ten passes over both, in fp32 copies of them in the vision towers. Results are those of
    ``apply_rotary_pos_emb_vision``, and in 16 bits closer to fp64 than those of ``apply_rotary_pos_emb`` of text models.

    transformers looks these two up as globals of the module that defines the attention. Each attention module of ``model`` gets
    its class's own ``forward`` with that one name bound to the op; classes and modules of transformers stay as they are.

    Args:
        model: Qwen2-VL to Qwen3.5-VL, or a model of text such as Llama; or a part, as the vision tower of GLM-4V, whose text
            pairs other features. Changed in place and returned.

    Raises:
        NotImplementedError: a function by that name does something else, no attention module calls one, or somebody else has
            replaced the forward of one.
    """
    forwards: dict[type, FunctionType] = {}
    chosen = []
    for module in model.modules():
        forward = type(module).forward
        plain = inspect.unwrap(forward)  # transformers 5.24 decorates those of text models
        names = _FUSED.keys() & set(plain.__code__.co_names)
        if not names:
            continue
        replaced = vars(module).get("forward")
        free = replaced is None or replaced.__module__ == __name__
        require(free, "model", "have the forward of its classes", f"another in {type(module).__name__}", NotImplementedError)
        if type(module) not in forwards:
            for name in names:
                _check(name, plain.__globals__[name], type(module))
            forwards[type(module)] = _with_globals(forward, {name: _FUSED[name][0] for name in names})
        chosen.append(module)
    rule = f"have attention modules that call {' or '.join(_FUSED)}"
    require(bool(chosen), "model", rule, type(model).__name__, NotImplementedError)
    for module in chosen:
        module.forward = MethodType(forwards[type(module)], module)
    return model
