"""A generation batch on its way through the optimiser."""

from dataclasses import dataclass

import torch

from vlmkernels.models.families import Family
from vlmkernels.models.inputs import Batch
from vlmkernels.ops.checks import require
from vlmkernels.rollout.generate import Rollout
from vlmkernels.train.config import GRPOConfig


@dataclass
class Experience:
    """B scored completions of one process, read in slices, one per micro-batch.

    advantages: (B,). mask: (B, C) bool, the tokens that count. num_items: the tokens that count, of all processes, over the
    number of processes. old_logps, ref_logps: (B, C), of the policy that sampled and of the reference, where needed.
    uses: micro-batches taken so far.
    """

    rollout: Rollout
    advantages: torch.Tensor
    mask: torch.Tensor
    num_items: float
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    uses: int = 0

    def state_dict(self) -> dict:
        """Tensors and numbers alone, for a checkpoint."""
        rollout, prompts = vars(self.rollout).copy(), self.rollout.prompts
        rollout["prompts"] = {"inputs": prompts.inputs, "rows": prompts.rows, "image_keys": prompts.image_keys}
        return {**vars(self), "rollout": rollout}

    @classmethod
    def from_state_dict(cls, state: dict, family: Family, device) -> "Experience":
        state = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        rollout = state.pop("rollout")
        prompts = Batch(**rollout.pop("prompts"), family=family).to(device)
        group = rollout.pop("group").cpu()
        rollout = Rollout(prompts, group, **{name: None if x is None else x.to(device) for name, x in rollout.items()})
        return cls(rollout, **state)

    def check(self, args: GRPOConfig, checkpoint: str) -> None:
        """Raise where a run with these arguments cannot go on with the batch, which another one began."""
        size, made = args.per_device_train_batch_size * args.steps_per_generation, len(self.advantages)
        batch = "be from between two generation batches to go on with other arguments:"
        name, within = f"resume_from_checkpoint {checkpoint}", "one within a generation batch"
        rule = f"{batch} per_device_train_batch_size * steps_per_generation = {size}"
        require(made == size, name, rule, f"{within} of {made} completions a process")
        rule = f"{batch} steps_per_generation * num_iterations = {args.steps_per_rollout}"
        require(self.uses < args.steps_per_rollout, name, rule, f"{within} that has served {self.uses} micro-batches")
        require(
            args.beta == 0 or self.ref_logps is not None, name, f"{batch} beta = {args.beta}", f"{within} without a reference"
        )
        later = args.steps_per_rollout > args.gradient_accumulation_steps
        rule = f"{batch} several optimiser steps on it"
        require(not later or self.old_logps is not None, name, rule, f"{within} without old log-probabilities")
