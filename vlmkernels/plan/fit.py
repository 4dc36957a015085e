"""Search for a configuration that fits into a given amount of memory, from the one that gives up the least to the smallest."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

from vlmkernels.plan.machine import Machine
from vlmkernels.plan.shape import ModelShape
from vlmkernels.plan.step import Plan, plan
from vlmkernels.plan.workload import Workload

LORA_R = 32  # of levels with LoRA, unless a rank is given
SCALES = (0.5, 0.25, 0.125)  # of the pixels of images


@dataclass(frozen=True)
class Level:
    """What is trained. The levels before give up less.

    Attributes:
        name: name in reports.
        changes: values of fields of ``Workload``. ``lora_r`` stands for any rank above 0.
        compromises: how it differs from the first level.
        scale: factor of the pixels of images.
    """

    name: str
    changes: dict[str, Any]
    compromises: tuple[str, ...] = ()
    scale: float = 1.0

    def allows(self, work: Workload, kept: Collection[str]) -> bool:
        """Return whether the level agrees with the fields of ``work`` that are kept."""
        if "lora_r" in kept and (work.lora_r > 0) != (self.changes["lora_r"] > 0):
            return False
        if "weights" in kept and (work.weights == "nf4") != (self.changes["weights"] == "nf4"):
            return False
        others = {"optim", "freeze_vision"} & self.changes.keys() & {*kept}
        return all(getattr(work, name) == self.changes[name] for name in others)

    def apply(self, work: Workload, kept: Collection[str]) -> Workload:
        """Return the workload of the level, in which the fields in ``kept`` stay the same."""
        changes = {name: value for name, value in self.changes.items() if name not in kept}
        side = math.sqrt(self.scale)
        return replace(work, **changes, width=max(1, round(side * work.width)), height=max(1, round(side * work.height)))


_FULL = {"lora_r": 0, "weights": "fp32", "optim": "adamw_torch_fused", "freeze_vision": False}
_8_BITS = {**_FULL, "optim": "adamw_8bit"}
_LORA = {"lora_r": LORA_R, "weights": "bf16"}
_8_BIT_MOMENTS = ("moments of the optimizer have 8 bits",)
_LORA_CHANGES = ("LoRA adapters on the decoder are trained, not all parameters",)
_QLORA_CHANGES = (*_LORA_CHANGES, "weights of linear layers have 4 bits")
LEVELS = (
    Level("all parameters", _FULL),
    Level("all parameters, optimizer in 8 bits", _8_BITS, _8_BIT_MOMENTS),
    Level(
        "all but the vision tower, optimizer in 8 bits",
        {**_8_BITS, "freeze_vision": True},
        (*_8_BIT_MOMENTS, "the vision tower is not trained"),
    ),
    Level("LoRA", _LORA, _LORA_CHANGES),
    Level("QLoRA, 4 bits", {**_LORA, "weights": "nf4"}, _QLORA_CHANGES),
    *(
        Level(
            f"QLoRA, images of {s:g} times the pixels",
            {**_LORA, "weights": "nf4"},
            (*_QLORA_CHANGES, f"images have {s:g} times the pixels"),
            s,
        )
        for s in SCALES
    ),
)
# What saves memory and costs time, within a level: the fastest combination that fits is chosen.
BUDGETS = (None, 65536, 32768, 16384, 8192, 4096, 2048)  # of microbatch_tokens
SAVINGS: dict[str, tuple[Any, ...]] = {
    "checkpointing": (False, True),
    "activation_offloading": (False, True),
    "microbatch_tokens": BUDGETS,
}


@dataclass(frozen=True)
class Fit:
    """The result of ``fit``.

    Attributes:
        plan: the fastest plan of the first level in which one fits; if none fits, the plan that needs the least memory.
        level: its level.
        smaller: for each level before it, in which nothing fits, the plan that needs the least memory.
    """

    plan: Plan
    level: Level
    smaller: dict[str, Plan] = field(default_factory=dict)

    @property
    def compromises(self) -> list[str]:
        """How the plan differs from training all parameters in one forward pass."""
        work = self.plan.work
        slower = {
            "activations are computed twice (activation checkpointing)": work.checkpointing,
            "activations wait in host memory (activation offloading)": work.activation_offloading,
            f"{self.plan.loss_tokens.packs} passes instead of one": self.plan.loss_tokens.packs > 1,
        }
        return [*self.level.compromises, *(text for text, applies in slower.items() if applies)]


def _plans(
    shape: ModelShape, work: Workload, machine: Machine, kept: Collection[str], teacher: ModelShape | None
) -> tuple[list[Plan], list[ValueError]]:
    """Return the plans of all combinations of ``SAVINGS``, and why others are impossible."""
    options = {name: values for name, values in SAVINGS.items() if name not in kept}
    found, errors = [], []
    for values in product(*options.values()):
        try:
            found.append(plan(shape, replace(work, **dict(zip(options, values, strict=True))), machine, teacher))
        except ValueError as error:  # for example a micro-batch that is too small for a completion
            errors.append(error)
    return found, errors


def fit(
    shape: ModelShape, work: Workload, machine: Machine, kept: Collection[str] = (), teacher: ModelShape | None = None
) -> Fit:
    """Return a plan that fits into ``machine.memory``: the fastest of the first of ``LEVELS`` in which one does.

    Args:
        shape: the model.
        work: the step. Fields that are not kept may change.
        machine: the device, with the memory to fit into.
        kept: names of fields of ``work`` that must stay the same.
        teacher: the teacher of distillation; None = no teacher.

    Raises:
        ValueError: the workload is impossible on this machine, for example because a micro-batch is too small for a completion.
    """
    levels = [level for level in LEVELS if level.allows(work, kept)]
    if shape.vision is None or not work.images:
        levels = [level for level in levels if not level.changes.get("freeze_vision")]
    if shape.vision is None or not work.images or shape.vision.side or work.image_tokens:  # the size of images changes nothing
        levels = [level for level in levels if level.scale == 1]
    smaller: dict[str, Plan] = {}
    impossible: list[ValueError] = []
    for level in levels:
        try:
            found, errors = _plans(shape, level.apply(work, kept), machine, kept, teacher)
        except ValueError as error:  # such as nf4 with fsdp2
            found, errors = [], [error]
        if not found:
            impossible += errors[:1]
            continue
        if fitting := [one for one in found if one.fits]:
            return Fit(min(fitting, key=lambda one: one.seconds), level, smaller)
        smaller[level.name] = min(found, key=lambda one: sum(one.memory.values()))
    if not smaller:
        raise impossible[0]
    name = min(smaller, key=lambda name: sum(smaller[name].memory.values()))
    return Fit(smaller[name], next(level for level in levels if level.name == name), smaller)


def train_arguments(found: Plan, model: str, resized: bool = False, teacher: str | None = None) -> dict[str, str]:
    """Return the arguments of ``vlmkernels train`` that run a plan, without data and rewards.

    Args:
        model, teacher: the paths of the models, or their names on the hub.
        resized: whether to limit the pixels of images to those of the plan.
    """
    work, defaults = found.work, {field.name: field.default for field in fields(Workload)}
    size = f'[{{"step": 0, "max_pixels": {work.width * work.height}}}]'
    dtype = '"dtype": "bfloat16"'
    loading = {"bf16": f"{{{dtype}}}", "nf4": f'{{{dtype}, "quantization_config": {{"load_in_4bit": true}}}}'}
    precisions = {"bf16": "bfloat16", "fp32": "float32"}
    arguments: dict[str, Any] = {
        "model": model,
        "teacher": teacher,
        "teacher_model_init_kwargs": teacher and f'{{"dtype": "{precisions[work.teacher_weights]}"}}',
        "num_generations": work.group_size,
        "per_device_train_batch_size": work.completions,
        "gradient_accumulation_steps": 1,
        "max_completion_length": work.completion_tokens,
        "bf16": "true" if work.precision == "bf16" else None,
        "model_init_kwargs": loading.get(work.weights),
        "lora_r": work.lora_r or None,
        "lora_alpha": 2 * work.lora_r or None,
        "lora_target_modules": found.shape.adapted if work.lora_r else None,
        "freeze_vision": "true" if work.freeze_vision and not work.lora_r else None,
        "optim": None if work.optim == defaults["optim"] else work.optim,
        "activation_checkpointing": "true" if work.checkpointing else None,
        "activation_offloading": "true" if work.activation_offloading else None,
        "max_tokens_per_microbatch": work.microbatch_tokens,
        "num_iterations": 2 if work.old else None,
        "beta": 0.04 if work.reference else None,
        "perception_loss_weight": work.perception_loss_weight or None,
        "image_use_steps": work.image_use_steps,
        "share_prefix": None if work.share_prefix else "false",
        "rollout_engine": None if work.engine == defaults["engine"] else work.engine,
        "image_resolution_schedule": size if resized else None,
    }
    return {name: str(value) for name, value in arguments.items() if value is not None}
