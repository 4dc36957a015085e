"""Checks of ``optim``: the packages of the optimizers of transformers, and optimizers that step within the backward pass."""

import re
from importlib.util import find_spec

from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Patterns of names, of which the first that matches counts: the module that the optimizers need, and what installs it.
PACKAGES = (
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("torch_(4|8)bit", "torchao", "torchao"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("8bit|bnb|paged|lion|ademamix", "bitsandbytes", "'vlmkernels[qlora]'"),
)
IN_BACKWARD = re.compile("layerwise$|lomo$")


def check_optimizer(args: TrainingArguments) -> None:
    """Check that the optimizer's package is installed, and that no option contradicts steps within the backward pass.

    Args:
        args: a ``GRPOConfig``.

    Raises:
        ImportError: the package is missing.
        ValueError: an optimizer that steps within the backward pass, which leaves no gradients, is used with an option that
            needs the gradients of the whole batch.
    """
    name = args.optim.value
    needed = next(((module, source) for pattern, module, source in PACKAGES if re.search(pattern, name)), None)
    if needed is not None and find_spec(needed[0]) is None:
        raise ImportError(f"optim {name!r} needs {needed[0]}: pip install {needed[1]}")
    if not IN_BACKWARD.search(name):
        return
    allowed = {
        "gradient_accumulation_steps": (1, "every backward pass takes a step"),
        "max_tokens_per_microbatch": (None, "every backward pass takes a step"),
        "max_grad_norm": (0, "gradients are gone before they can be clipped"),
        "on_nonfinite": ("raise", "the step is taken before gradients can be checked"),
        "fp16": (False, "the gradients are those of a scaled loss"),
        "world_size": (1, "gradients are not summed over processes"),
    }
    for field, (value, reason) in allowed.items():
        if getattr(args, field) != value:
            raise ValueError(f"{field} must be {value!r} with optim={name!r}: {reason}, got {getattr(args, field)!r}")
    if name.endswith("layerwise"):
        logger.warning("optim=%r has no state in checkpoints: a resumed run starts with new moments", name)
