"""Image features as model inputs, so that each image runs through the vision tower once.

transformers models accept features in place of pixels (the argument ``mm_encoder_outputs``, transformers >= 5.18).
``use_image_features`` adds forward hooks that compute this argument from further keywords of the forward pass:

    image_index: (images,) int64, for each image its index among the images whose pixels are given. Equal images share one.
    image_features: (tokens, H), the features of all images, one after another, in place of their pixels.
    deepstack_features: (tokens, layers, H), given with image_features for vision towers that return them.
    idle_media: "image" or "video" -> model inputs of an image or video that no token refers to. Its features are added to the
        output with weight 0, so that a rank without images also runs its vision tower.

With any of these keywords the vision tower runs before the token embedding.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from vlmkernels.models.families import FEATURES, PIXELS, family_of
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import dropout_rates
from vlmkernels.models.positions import POSITION_INPUTS

_REQUIREMENT = "mm_encoder_outputs, transformers >= 5.18"


@dataclass
class _Features(BaseModelOutputWithPooling):
    """A value of ``mm_encoder_outputs``. transformers >= 5.24 returns it as part of the model's output too."""

    deepstack_features: list | None = None
    visual_indicator_features: torch.Tensor | None = None  # of the tokens that enclose images and tiles in Ovis2


def accepts_image_features(model: PreTrainedModel) -> bool:
    """Return whether the forward pass of ``model`` accepts features in place of pixels."""
    return _accepts_encoder_outputs(model.base_model)


def use_image_features(model: PreTrainedModel) -> PreTrainedModel:
    """Let ``model`` accept the keywords of this module.

    Changes ``model`` in place: it registers two forward hooks on ``model.base_model``. A second call changes nothing. There is
    no function to undo it; without the keywords the hooks do nothing.

    Args:
        model: a transformers model without adapters. If ``accepts_image_features(model)`` is false, the keywords raise
            NotImplementedError.

    Returns:
        ``model``.
    """
    inner = model.base_model
    if _features_from_keywords not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_features_from_keywords, with_kwargs=True)
        inner.register_forward_hook(_add_idle_features, with_kwargs=True)
    return model


def feature_reuse_unsupported(model: PreTrainedModel) -> str | None:
    """Return why image features cannot be reused in another forward pass, or None if they can."""
    if not accepts_image_features(model):
        return f"{type(model).__name__} does not accept features in place of pixels ({_REQUIREMENT})"
    inner = model.base_model
    language = {*inner.get_decoder().modules()}
    for name, module in inner.named_modules():
        if module is inner or module in language:
            continue
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return f"{name} is trained"
        if dropout_rates(module):
            return f"{name} has dropout"
    return None


@torch.no_grad()
def encode_images(model: PreTrainedModel, prompts: ModelInputs) -> ModelInputs:
    """Run the vision tower once per distinct image and replace the pixels of ``prompts`` by the features.

    The result is valid until the vision tower changes; see ``feature_reuse_unsupported``.

    Args:
        model: a model that ``use_image_features`` was called on.
        prompts: model inputs. Without pixels they are returned as they are.

    Raises:
        ValueError: the tower returns more or fewer features than the prompts have image tokens.
    """
    if "pixel_values" not in prompts.inputs:
        return prompts
    inputs = deduplicate_images(prompts)
    index = inputs.get("image_index")
    encoded = _run_tower(model.base_model.get_image_features, inputs)
    tokens = (prompts.inputs["input_ids"] == prompts.family.image_token_id).sum(1).cpu()
    features = {"image_features": _flatten(encoded.pooler_output, index)}
    if (layers := getattr(encoded, "deepstack_features", None)) is not None:
        features["deepstack_features"] = torch.stack([_flatten(layer, index) for layer in layers], 1)
    found = len(features["image_features"])
    if found != tokens.sum():
        raise ValueError(f"image_features must be one per image token, {int(tokens.sum())}, got {found}")
    kept = _without_pixels(prompts)
    return replace(prompts, inputs=kept | features, rows=prompts.rows | {"image_token": tokens})


def with_pixels(encoded: ModelInputs, pixels: ModelInputs) -> ModelInputs:
    """Return the inputs of ``encoded`` together with the pixels that its features were computed from, for another model.

    A model must get only one of the two: see ``without_pixels``.

    Args:
        encoded: the result of ``encode_images``.
        pixels: its argument.
    """
    return replace(encoded, inputs=pixels.inputs | encoded.inputs)


def without_pixels(inputs: ModelInputs) -> ModelInputs:
    """Remove the pixels of images that have features; undoes ``with_pixels``."""
    if "image_features" not in inputs.inputs:
        return inputs
    kept = _without_pixels(inputs)
    return inputs if len(kept) == len(inputs.inputs) else replace(inputs, inputs=kept)


def _without_pixels(inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """Return the inputs without those that only the vision tower reads, features excepted."""
    removed = image_axes(inputs).keys() - {*POSITION_INPUTS, *FEATURES}
    return {name: x for name, x in inputs.inputs.items() if name not in removed}


def deduplicate_images(prompts: ModelInputs) -> dict[str, torch.Tensor]:
    """Return the model inputs of ``prompts`` with the pixels of equal images once, and then with ``image_index``.

    Images are equal if their ``image_keys`` are. All pixels are kept in families whose inputs have rows that cannot be assigned
    to images.
    """
    axes = image_axes(prompts)
    keys = [] if prompts.image_keys is None else prompts.image_keys.tolist()
    unique = list(dict.fromkeys(keys))
    if len(unique) == len(keys) or "pixel_values" not in axes or not {*axes.values()} <= {"image", "image_patch"}:
        return prompts.inputs
    first = torch.tensor([keys.index(key) for key in unique])
    pixels = {name: prompts.select_images(name, first) for name in axes}
    return {**prompts.inputs, **pixels, "image_index": torch.tensor([unique.index(key) for key in keys])}


def image_axes(prompts: ModelInputs) -> dict[str, str]:
    """Return the axis of each input that describes images."""
    axes = {name: prompts.family.axis(name) for name in prompts.inputs}
    of_images = ("image", "image_patch", "tile", "crop", "stack", "illustrated", "image_token", "image_slice")
    return {name: axis for name, axis in axes.items() if axis in of_images}


def _accepts_encoder_outputs(module: torch.nn.Module) -> bool:
    return "mm_encoder_outputs" in inspect.signature(module.forward).parameters


def _run_tower(get_features: Callable[..., ModelOutput], inputs: dict) -> ModelOutput:
    """Call ``get_image_features`` or ``get_video_features`` of a model with the ``inputs`` that it accepts."""
    accepted = inspect.signature(get_features).parameters
    return get_features(**{name: x for name, x in inputs.items() if name in accepted}, return_dict=True)


def _flatten(parts: Sequence[torch.Tensor] | torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Return the features of the images in ``index`` (default all), one after another: (tokens, H)."""
    if index is not None:
        parts = [parts[image] for image in index.tolist()]
    return torch.cat([*parts]) if isinstance(parts, (list, tuple)) else parts.flatten(0, -2)


# The hooks


def _features_from_keywords(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Turn the keywords of this module into ``mm_encoder_outputs``; a forward pre-hook."""
    if kwargs.get("image_features") is None and not kwargs.keys() & {"image_index", "idle_media"}:
        return None
    if not _accepts_encoder_outputs(module):
        raise NotImplementedError(
            f"model must accept features in place of pixels ({_REQUIREMENT}), got {type(module).__name__}"
        )
    index = kwargs.pop("image_index", None)
    features = kwargs.pop("image_features", None)
    layers = kwargs.pop("deepstack_features", None)
    idle = kwargs.pop("idle_media", None) or {}
    outputs, zeros = {}, []
    for kind, pixels in PIXELS.items():  # in one order on every rank: under ZeRO-3 the towers' modules run collectives
        if kind in idle:
            zeros.append(_idle_features(module, kind, idle[kind]))
        elif kind == "image" and features is not None:
            outputs[kind] = _given_features(module, features, layers)
        elif kwargs.get(pixels) is not None:
            outputs[kind] = _run_tower(getattr(module, f"get_{kind}_features"), kwargs)
    if index is not None:
        outputs["image"] = _repeated_features(outputs["image"], index.tolist())
    kwargs = {name: x for name, x in kwargs.items() if name not in PIXELS.values()}
    if zeros:
        kwargs["idle_features"] = sum(zeros)
    return args, {**kwargs, "mm_encoder_outputs": outputs}


def _add_idle_features(module: torch.nn.Module, args: tuple, kwargs: dict, output: ModelOutput) -> ModelOutput | None:
    """Add the features of ``idle_media``, with weight 0, to the hidden states; a forward hook."""
    if (zero := kwargs.get("idle_features")) is None:
        return None
    output.last_hidden_state = output.last_hidden_state + zero
    return output


def _idle_features(module: torch.nn.Module, kind: str, inputs: dict) -> torch.Tensor:
    """Return 0 as a function of all features of an idle image or video."""
    encoded = _run_tower(getattr(module, f"get_{kind}_features"), inputs)
    layers = getattr(encoded, "deepstack_features", None) or ()
    return 0.0 * sum(part.sum() for part in [*encoded.pooler_output, *(part for layer in layers for part in layer)])


def _given_features(module: torch.nn.Module, features: torch.Tensor, layers: torch.Tensor | None) -> _Features:
    """Return ``image_features`` and ``deepstack_features`` in the form that the model expects."""
    pooled = (features,) if family_of(module.config).features_in_list else features
    deepstack = None if layers is None else [(x,) for x in layers.unbind(1)]
    indicators = None
    if (table := getattr(module, "visual_embeddings_table", None)) is not None:  # Ovis2: its last rows
        first = table.num_embeddings - len(module.visual_indicator_token_ids)
        indicators = table(torch.arange(first, table.num_embeddings, device=features.device))
    return _Features(pooler_output=pooled, deepstack_features=deepstack, visual_indicator_features=indicators)


def _repeated_features(encoded: ModelOutput, index: list[int]) -> _Features:
    """Return the features of the images in ``index``, which may contain an image several times."""

    def repeat(parts: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return parts[index] if isinstance(parts, torch.Tensor) else tuple(parts[image] for image in index)

    layers = getattr(encoded, "deepstack_features", None)
    return _Features(
        pooler_output=repeat(encoded.pooler_output),
        deepstack_features=None if layers is None else [repeat(layer) for layer in layers],
        visual_indicator_features=getattr(encoded, "visual_indicator_features", None),
    )
