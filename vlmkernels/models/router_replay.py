"""Router replay: the experts that routers chose in the rollout are used again in training.

In a mixture of experts (MoE), rounding can change which experts a router chooses. A token then runs through other weights in
training than in the rollout, and its log-probability differs by much more than rounding. ``use_router_replay`` makes a model
accept the keyword ``routed_experts``: routers use these experts, and compute their weights from their own logits, so that
gradients reach the router as without replay::

    scores = router(hidden)                                       # (T, E)
    chosen = where(routed_experts < 0, topk(scores, K), routed_experts)     # (T, K)
    weights = normalize(scores.gather(chosen))

The keyword reaches the layers of the decoder. In each, the attention module (or the recurrent one) gets all keywords, and runs
before the router, also when gradient checkpointing runs the layer again; a hook of it hands the experts to the router.

Source: https://arxiv.org/abs/2510.11370 and https://arxiv.org/abs/2507.18071.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from vlmkernels.models.hooks import remove_hooks
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model

# The classes of routers that return (logits, weights, indices) and choose by one topk over the experts.
ROUTERS = (
    *("DeepseekV3TopkRouter", "Ernie4_5_VLMoeMoeTopKRouter", "Gemma4TextRouter", "Glm4vMoeTextTopkRouter"),
    *("Qwen3_5MoeTopKRouter", "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "Qwen3VLMoeTextTopKRouter"),
)


class RoutedExperts(NamedTuple):
    """The K experts that each of M MoE layers chose for each token; -1: not recorded, the router chooses.

    Attributes:
        prompts: (P, L, M, K) int16, in the layout of the prompts' input_ids.
        completions: (B, C, M, K) int16, in the layout of the completions.
    """

    prompts: torch.Tensor
    completions: torch.Tensor

    def to(self, device: torch.device | str) -> "RoutedExperts":
        return RoutedExperts(self.prompts.to(device), self.completions.to(device))

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """Return the experts of some tokens.

        Args:
            places: integers on the CPU, any shape: indices of all tokens of the prompts and then of the completions, padding
                included; -1 for no token.

        Returns:
            (..., M, K) int16.
        """
        flat = torch.cat(
            [
                self.prompts.flatten(0, 1),
                self.completions.flatten(0, 1),
                self.prompts.new_full((1, *self.prompts.shape[2:]), -1),
            ]
        )
        places = torch.where(places < 0, len(flat) - 1, places)
        return flat[places.to(flat.device, non_blocking=True)]


@dataclass(eq=False)
class _Layer:
    """The routing of one MoE layer, which its routers and hooks share.

    Attributes:
        index: the number of the layer among the M MoE layers.
        top_k, num_experts: K and E.
        given: (T, K), the experts to use in this pass. None: the router chooses.
        vision: (T,) bool, the tokens that the second of two routers gets (Ernie 4.5 VL). None: there is one router.
        records: whether the experts are recorded.
        chosen: (T, K), the experts of the last pass.
        replayed: whether a router has used given experts.
    """

    index: int
    top_k: int
    num_experts: int
    given: torch.Tensor | None = None
    vision: torch.Tensor | None = None
    records: bool = False
    chosen: torch.Tensor | None = None
    replayed: bool = False


class _Choose(TorchFunctionMode):
    """Let the one topk over all experts return given experts and their scores."""

    def __init__(self, layer: _Layer, given: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.given, self.calls = layer, given, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        scores = args[0] if args else kwargs["input"]
        if scores.shape != (len(self.given), self.layer.num_experts) or result[1].shape[1] != self.layer.top_k:
            return result  # of groups of experts
        self.calls += 1
        chosen = torch.where(self.given < 0, result[1], self.given)
        return scores.gather(1, chosen), chosen


def _router_forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    layer: _Layer = module.expert_replay
    rows = None if layer.vision is None else layer.vision if module.routes_vision else ~layer.vision
    given = layer.given if layer.given is None or rows is None else layer.given[rows]
    forward = type(module).forward
    if given is None:
        output = forward(module, *args, **kwargs)
    else:
        with _Choose(layer, given.long()) as choose:
            output = forward(module, *args, **kwargs)
        if choose.calls != 1:
            raise NotImplementedError(
                f"router_replay must run routers that choose by one topk of {layer.top_k} of {layer.num_experts} experts, got "
                f"{choose.calls} in {type(module).__name__}"
            )
        layer.replayed = True
    if layer.records:
        chosen = output[2].detach()
        if rows is None:
            layer.chosen = chosen
        else:
            new = layer.chosen is None or len(layer.chosen) != len(rows) or not module.routes_vision
            layer.chosen = chosen.new_full((len(rows), layer.top_k), -1) if new else layer.chosen
            layer.chosen[rows] = chosen
    return output


def use_router_replay(model: PreTrainedModel) -> PreTrainedModel:
    """Make ``model`` accept the keyword ``routed_experts``, and let ``ExpertRecorder`` record the experts that it chooses.

    ``routed_experts`` is (B, T, M, K), integers, for each token of input_ids and each MoE layer the experts to use; a router
    chooses where they are -1.

    Changes ``model`` in place: the ``forward`` of its routers, and hooks of the modules that get the keyword.
    ``undo_router_replay`` undoes it.

    Args:
        model: a transformers model without adapters around it.

    Returns:
        ``model``.

    Raises:
        NotImplementedError: see ``router_replay_unsupported``.
    """
    if _layers(model):
        return model
    if reason := router_replay_unsupported(model):
        raise NotImplementedError(f"model must support router replay: {reason}")
    count = 0
    for block in model.get_decoder().layers:
        routers = _routers(block)
        layer = None
        if routers:
            first = next(iter(routers.values()))
            scores = getattr(first, "weight", None) if hasattr(first, "weight") else first.proj.weight
            layer, count = _Layer(count, _top_k(first), len(scores)), count + 1
        for name, router in routers.items():
            router.expert_replay, router.routes_vision = layer, "vision_moe" in name
            router.forward = MethodType(_router_forward, router)
        for mixer in _mixers(block):
            mixer.expert_replay = layer
            mixer.register_forward_pre_hook(_take_experts, with_kwargs=True)
        for module in block.modules():
            if hasattr(module, "vision_moe"):
                module.expert_replay = layer
                module.register_forward_pre_hook(_divide, with_kwargs=True)
    model.base_model.register_forward_pre_hook(_check_experts, with_kwargs=True)
    model.base_model.register_forward_hook(_check_replayed, with_kwargs=True)
    return model


def undo_router_replay(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``use_router_replay`` in ``model``, in place, and return it."""
    remove_hooks(model, [_check_experts, _check_replayed, _take_experts, _divide])
    for module in model.modules():
        if hasattr(module, "routes_vision"):
            del module.forward, module.routes_vision
        vars(module).pop("expert_replay", None)
    return model


def router_replay_unsupported(model: PreTrainedModel) -> str | None:
    """Return why ``use_router_replay`` does not support ``model``, or None if it does."""
    name = type(model).__name__
    decoder = model.get_decoder()
    blocks = getattr(decoder, "layers", ())
    if not any(_routers(block) for block in blocks):
        return f"{name} must have MoE layers with one of the routers {', '.join(ROUTERS)}, got none"
    for block in blocks:
        for router in _routers(block).values():
            if "forward" in vars(router):
                return f"{name} must have the forward of its routers, got another in {type(router).__name__}"
        if not _mixers(block):
            return f"{name} must have layers that pass keywords on to their attention, got {type(block).__name__}"
    return None


def _routers(block: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in block.named_modules() if type(module).__name__ in ROUTERS}


def _mixers(block: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules of a layer that get the keywords of the model: attention or a recurrent layer."""
    names = ("self_attn", "linear_attn", "conv", "short_conv")
    found = [getattr(block, name) for name in names if isinstance(getattr(block, name, None), torch.nn.Module)]
    kinds = inspect.Parameter
    return [
        m for m in found if any(p.kind is kinds.VAR_KEYWORD for p in inspect.signature(type(m).forward).parameters.values())
    ]


def _top_k(router: torch.nn.Module) -> int:
    return router.top_k if hasattr(router, "top_k") else router.config.top_k_experts


def _layers(model: torch.nn.Module) -> list[_Layer]:
    """Return the M layers of a model that ``use_router_replay`` was called on; [] if it was not."""
    found = {id(layer): layer for module in model.modules() if (layer := vars(module).get("expert_replay")) is not None}
    return sorted(found.values(), key=lambda layer: layer.index)


def _check_experts(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    experts, layers = kwargs.get("routed_experts"), _layers(model)
    for layer in layers:
        layer.given = layer.vision = layer.chosen = None
        layer.replayed = False
    if experts is None:
        return
    if experts.is_floating_point() or experts.dtype == torch.bool:
        raise TypeError(f"routed_experts must hold integers, got {experts.dtype}")
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    expected = (*tokens.shape[:2], len(layers), layers[0].top_k)
    if tuple(experts.shape) != expected:
        raise ValueError(
            f"routed_experts must be one row of experts per token and MoE layer, {expected}, got {tuple(experts.shape)}"
        )
    most = layers[0].num_experts
    if experts.device.type == "cpu" and experts.numel() and not -1 <= int(experts.min()) <= int(experts.max()) < most:
        raise ValueError(f"routed_experts must be -1 or in [0, {most}), got {int(experts.min())} to {int(experts.max())}")


def _check_replayed(model: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    missing = [layer.index for layer in _layers(model) if not layer.replayed]
    if kwargs.get("routed_experts") is not None and missing:
        raise NotImplementedError(
            f"model must pass routed_experts on to all of its MoE layers, got none in the layers {missing} of "
            f"{type(model).__name__}"
        )


def _take_experts(mixer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Hand the experts to the router of the layer, and keep the keyword from the attention function."""
    layer: _Layer | None = mixer.expert_replay
    experts = kwargs.get("routed_experts")
    if layer is not None:
        layer.given = None if experts is None else experts[:, :, layer.index].flatten(0, 1)
    return None if "routed_experts" not in kwargs else (args, {k: v for k, v in kwargs.items() if k != "routed_experts"})


def _divide(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    """Note which tokens go to the router for images and videos; ``module`` gets them as ``moe_mm_token_type_ids``."""
    types = kwargs.get("moe_mm_token_type_ids", args[1] if len(args) > 1 else None)
    module.expert_replay.vision = None if types is None or not types.any() else types.bool().flatten()


class ExpertRecorder:
    """Records the experts that a model chooses while it decodes completions.

    In a ``with`` block of the recorder, the routers keep the experts of a forward pass for ``take``; the recorder assigns them
    to the tokens of prompts and completions. ``take`` and ``add_tokens`` do not wait for the device, and can be part of a CUDA
    graph.

    Args:
        model: a model that ``use_router_replay`` was called on; it may have adapters.
        prompts: P prompts.
        num_completions: B.
        budget: the maximum number of tokens of a completion. The place of token t of completion k is ``k * budget + t``.
    """

    def __init__(self, model: torch.nn.Module, prompts: ModelInputs, num_completions: int, budget: int) -> None:
        self._layers = _layers(base_model(model))
        if not self._layers:
            raise NotImplementedError("model must be prepared by use_router_replay to record experts, got one that is not")
        self._mask, self._shape = prompts.inputs["attention_mask"].bool(), (num_completions, budget)
        sizes, device = (len(self._layers), self._layers[0].top_k), self._mask.device
        self.nowhere = num_completions * budget  # the place of tokens that are not recorded
        self._prompts = torch.full((*self._mask.shape, *sizes), -1, dtype=torch.int16, device=device)
        self._completions = torch.full((self.nowhere + 1, *sizes), -1, dtype=torch.int16, device=device)

    def __enter__(self) -> "ExpertRecorder":
        for layer in self._layers:
            layer.records = True
        return self

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer.records, layer.chosen = False, None

    def take(self) -> torch.Tensor:
        """Return the experts of the last forward pass, (T, M, K) int16, for its tokens in the order of its input."""
        chosen = []
        for layer in self._layers:
            if layer.chosen is None:
                raise RuntimeError(f"a forward pass must have recorded experts, got none of MoE layer {layer.index}")
            chosen.append(layer.chosen)
        return torch.stack(chosen, 1).to(torch.int16)

    def add_prompts(self, prompts: Sequence[int]) -> None:
        """Store the experts of the last forward pass, of a pack of whole prompts one after another."""
        experts = self.take()
        lengths = self._mask[list(prompts)].sum(1).tolist()
        for prompt, part in zip(prompts, experts.split(lengths), strict=True):
            self._prompts[prompt, self._mask[prompt]] = part

    def add_tokens(self, places: torch.Tensor) -> None:
        """Store the experts of the last forward pass, of tokens of completions.

        Args:
            places: (T,) int64 on the device, see ``ExpertRecorder``; ``nowhere`` for tokens to ignore.
        """
        self._completions.index_copy_(0, places, self.take())

    def routed(self, width: int) -> RoutedExperts:
        """Return the experts of all prompts and of the first ``width`` tokens of the completions."""
        return RoutedExperts(self._prompts, self._completions[:-1].unflatten(0, self._shape)[:, :width].contiguous())
