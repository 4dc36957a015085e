"""Image features: each image through the vision tower once in a forward pass, and once for all passes while it is frozen.

transformers' models take features in place of pixels (``mm_encoder_outputs``, from 5.18 on); a hook makes them of two keywords:

    image_index: (images,) int64, which of the images whose pixels are given each one is; None: each itself.
    image_features: (tokens, H), features of all images one behind the other, in place of their pixels; with
        deepstack_features: (tokens, layers, H), where the tower has some;
    idle_media: by kind ("image", "video"), inputs of some that stand nowhere and count for nothing, so that a process without
        any runs its tower.

With any of them the tower runs before the token embedding.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from vlmkernels.models.families import family_of
from vlmkernels.models.inputs import Batch
from vlmkernels.ops.checks import require

_KEYWORDS = ("image_index", "image_features", "deepstack_features", "idle_media")


@dataclass
class _Features(BaseModelOutputWithPooling):
    """What models take as ``mm_encoder_outputs``; transformers 5.24 also returns it with the model's output."""

    deepstack_features: list | None = None


def _has_seam(module: torch.nn.Module) -> bool:
    return "mm_encoder_outputs" in inspect.signature(module.forward).parameters


def takes_features(model: PreTrainedModel) -> bool:
    """Whether the model's forward pass takes features in place of pixels."""
    return _has_seam(model.base_model)


def use_image_features(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model take ``image_index`` and ``image_features`` where ``takes_features`` holds, and ``idle_media``. Changed in
    place and returned."""
    inner = model.base_model
    if _as_features not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_as_features, with_kwargs=True)
        inner.register_forward_hook(_count_for_nothing, with_kwargs=True)
    return model


def _encoded(encode: Callable, inputs: dict) -> ModelOutput:
    """What the tower and its projector make of the images (or videos) among model inputs; encode: a method of the model."""
    taken = inspect.signature(encode).parameters
    return encode(**{name: x for name, x in inputs.items() if name in taken}, return_dict=True)


def _count_for_nothing(module: torch.nn.Module, args: tuple, kwargs: dict, output: ModelOutput) -> ModelOutput | None:
    if (nothing := kwargs.get("nothing")) is None:
        return None
    output.last_hidden_state = output.last_hidden_state + nothing
    return output


def _as_features(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if kwargs.get("image_features") is None and not kwargs.keys() & {"image_index", "idle_media"}:
        return None
    rule = "take features in place of pixels (mm_encoder_outputs, transformers >= 5.18)"
    require(_has_seam(module), "model", rule, type(module).__name__, NotImplementedError)
    index, features, layers, idle = (kwargs.pop(name, None) for name in _KEYWORDS)
    outputs, nothing = {}, []
    for kind, pixels in {"image": "pixel_values", "video": "pixel_values_videos"}.items():
        encode = getattr(module, f"get_{kind}_features", None)
        if kind in (idle or ()):
            given = _encoded(encode, idle[kind])
            nothing += [
                *given.pooler_output,
                *(part for layer in getattr(given, "deepstack_features", None) or () for part in layer),
            ]
        elif kind == "image" and features is not None:
            pooled = (features,) if family_of(module.config).features_in_list else features
            deep = None if layers is None else [(layer,) for layer in layers.unbind(1)]
            outputs[kind] = _Features(pooler_output=pooled, deepstack_features=deep)
        elif kwargs.get(pixels) is not None:
            outputs[kind] = _encoded(encode, kwargs)
    if index is not None:
        outputs["image"] = _in_order(outputs["image"], index.tolist())
    kwargs = {name: x for name, x in kwargs.items() if name not in ("pixel_values", "pixel_values_videos")}
    if nothing:
        kwargs["nothing"] = 0.0 * sum(part.sum() for part in nothing)
    return args, {**kwargs, "mm_encoder_outputs": outputs}


def _in_order(given: ModelOutput, order: list[int]) -> _Features:
    """Features with those of the images in ``order``."""
    layers = getattr(given, "deepstack_features", None)
    pick = lambda parts: tuple(parts[image] for image in order)  # noqa: E731
    deep = None if layers is None else [pick(x) for x in layers]
    return _Features(pooler_output=pick(given.pooler_output), deepstack_features=deep)


def image_axes(prompts: Batch) -> dict[str, str]:
    """The axes of the inputs that describe images."""
    axes = {name: prompts.family.axis(name) for name in prompts.inputs}
    return {name: axis for name, axis in axes.items() if axis in ("image", "image_patch", "tile", "stack", "illustrated")}


def once_per_image(prompts: Batch) -> dict[str, torch.Tensor]:
    """Model inputs with the pixels of equal images given once, and ``image_index`` where that leaves any out.

    Families whose processors do not say which rows of pixels are an image's keep them all.
    """
    axes = image_axes(prompts)
    keys = [] if prompts.image_keys is None else prompts.image_keys.tolist()
    unique = list(dict.fromkeys(keys))
    if len(unique) == len(keys) or "pixel_values" not in axes or not {*axes.values()} <= {"image", "image_patch"}:
        return prompts.inputs
    first = torch.tensor([keys.index(key) for key in unique])
    chosen = {name: prompts.of_images(name, first) for name in axes}
    return {**prompts.inputs, **chosen, "image_index": torch.tensor([unique.index(key) for key in keys])}


def why_not_frozen(model: PreTrainedModel) -> str | None:
    """Why features may differ from one forward pass to the next; None where they cannot."""
    if not takes_features(model):
        return f"{type(model).__name__} takes no features in place of pixels (mm_encoder_outputs, transformers >= 5.18)"
    inner = model.base_model
    language = {*inner.get_decoder().modules()}
    for name, module in inner.named_modules():
        if module is inner or module in language:
            continue
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return f"{name} is trained"
        # Of attention the rate is a number, under either name; elsewhere they may be modules, which come by themselves.
        rates = [getattr(module, rate, None) for rate in ("attention_dropout", "dropout")]
        rates += [module.p] if isinstance(module, torch.nn.Dropout) else []
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return f"{name} drops out"
    return None


@torch.no_grad()
def encode_images(model: PreTrainedModel, prompts: Batch) -> Batch:
    """The prompts with the features of their images, each image encoded once, in place of pixels.

    For a model that ``use_image_features`` was called on; the result serves all its forward passes while its vision tower does
    not change (see ``why_not_frozen``).
    """
    if "pixel_values" not in prompts.inputs:
        return prompts
    inputs = once_per_image(prompts)
    given, order = _encoded(model.base_model.get_image_features, inputs), inputs.get("image_index")
    pick = lambda parts: parts if order is None else [parts[image] for image in order.tolist()]  # noqa: E731
    flat = lambda x: torch.cat([*pick(x)]) if isinstance(x, (list, tuple)) else x.flatten(0, -2)  # noqa: E731
    tokens = (prompts.inputs["input_ids"] == prompts.family.image_token_id).sum(1).cpu()
    features = {"image_features": flat(given.pooler_output)}
    if (layers := getattr(given, "deepstack_features", None)) is not None:
        features["deepstack_features"] = torch.stack([flat(layer) for layer in layers], 1)
    found = len(features["image_features"])
    require(found == tokens.sum(), "image_features", f"be one per image token, {int(tokens.sum())}", found)
    used = {name for name in image_axes(prompts) if name != "image_grid_thw"}  # that one tells the positions too
    kept = {name: x for name, x in prompts.inputs.items() if name not in used}
    return replace(prompts, inputs=kept | features, rows=prompts.rows | {"image_token": tokens})
