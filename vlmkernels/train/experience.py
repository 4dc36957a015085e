"""A generation batch with everything that training on it needs."""

from dataclasses import dataclass, field, fields

import torch

from vlmkernels.models.families import Family
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.router_replay import RoutedExperts
from vlmkernels.models.trajectories import Turns
from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig

# Arguments that must not change while a batch is in use: what ``uses`` counts, and the policy of ``old_logps``.
FIXED = ("per_device_train_batch_size", "temperature")


@dataclass
class Experience:
    """The B completions that one process sampled for ``steps_per_rollout`` micro-batches.

    Args:
        rollout: prompts and completions.
        advantages: (B,), or (B, C) per token if a reward function scores turns. None without reward functions.
        loss_mask: (B, C) bool, the tokens that count in the loss.
        num_items: number of tokens that count in the loss, averaged over processes.
        old_logps: (B, C), log-probabilities under the policy that sampled; None if every micro-batch is on policy.
        ref_logps: (B, C), log-probabilities under the reference; None if beta is 0.
        uses: micro-batches trained on so far.
        made_with: the values of ``FIXED`` arguments. Empty in checkpoints of earlier versions.
    """

    rollout: Rollout
    advantages: torch.Tensor | None
    loss_mask: torch.Tensor
    num_items: float
    old_logps: torch.Tensor | None = None
    ref_logps: torch.Tensor | None = None
    uses: int = 0
    made_with: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict:
        """Return the fields as tensors and numbers, for a checkpoint."""
        rollout = {f.name: getattr(self.rollout, f.name) for f in fields(Rollout)}
        for name in ("prompts", "masked_prompts"):
            rollout[name] = None if rollout[name] is None else _plain(rollout[name])
        if (turns := self.rollout.turns) is not None:
            rollout["turns"] = {"inputs": _plain(turns.inputs), "trajectory": turns.trajectory, "sampled": turns.sampled}
        if (experts := self.rollout.routed_experts) is not None:
            rollout["routed_experts"] = experts._asdict()
        return {**vars(self), "rollout": rollout}

    @classmethod
    def from_state_dict(cls, state: dict, family: Family, device: torch.device) -> "Experience":
        """Rebuild the experience of a checkpoint on ``device``."""
        state = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in state.items()}
        rollout = state.pop("rollout")
        prompts = ModelInputs(**rollout.pop("prompts"), family=family).to(device)
        if (masked := rollout.pop("masked_prompts", None)) is not None:  # None in checkpoints of earlier versions
            masked = ModelInputs(**masked, family=family).to(device)
        group, turns = rollout.pop("group").cpu(), rollout.pop("turns", None)
        if turns is not None:
            turns = Turns(ModelInputs(**turns.pop("inputs"), family=family).to(device), **turns)
        if (experts := rollout.pop("routed_experts", None)) is not None:
            experts = RoutedExperts(**experts).to(device)
        values = {name: None if x is None else x.to(device) for name, x in rollout.items()}
        return cls(Rollout(prompts, group, **values, masked_prompts=masked, turns=turns, routed_experts=experts), **state)

    def check_arguments(self, args: GRPOConfig, checkpoint: str, *, has_rewards: bool, has_teacher: bool) -> None:
        """Check that a run with these arguments can continue the batch of a checkpoint.

        Args:
            has_rewards, has_teacher: whether the run has reward functions and a teacher.

        Raises:
            ValueError: the batch was made with other arguments.
        """
        size, saved_size = args.per_device_train_batch_size * args.steps_per_generation, len(self.loss_mask)
        uses, window = args.steps_per_rollout, args.gradient_accumulation_steps
        saved = f"resume_from_checkpoint {checkpoint} was saved mid-batch"
        if saved_size != size:
            raise ValueError(
                f"{saved}: per_device_train_batch_size * steps_per_generation must be {saved_size}, the completions of "
                f"its batch per process, got {size}"
            )
        for name, value in self.made_with.items():
            if getattr(args, name) != value:
                raise ValueError(f"{saved}: {name} must be {value}, as when its batch was sampled, got {getattr(args, name)}")
        if self.uses % window:
            raise ValueError(
                f"{saved}: gradient_accumulation_steps must divide {self.uses}, the micro-batches trained on so far, got "
                f"{window}"
            )
        if self.uses >= uses:
            raise ValueError(
                f"{saved}: steps_per_generation * num_iterations must be greater than {self.uses}, the micro-batches "
                f"trained on so far, got {uses}"
            )
        if args.router_replay != (self.rollout.routed_experts is not None):
            raise ValueError(
                f"{saved}: router_replay must be {not args.router_replay}, as when its batch was sampled, got "
                f"{args.router_replay}"
            )
        if args.masks_images and self.rollout.masked_prompts is None:
            raise ValueError(
                f"{saved}: perception_loss_weight, der_loss_weight1 and der_loss_weight2 must be 0, because its batch has no "
                f"masked images, got {args.perception_loss_weight}, {args.der_loss_weight1} and {args.der_loss_weight2}"
            )
        if has_rewards and self.advantages is None:
            raise ValueError(f"{saved}: reward_funcs must be None, because its batch has no advantages, got reward functions")
        inputs = [self.rollout.prompts.inputs, {} if self.rollout.turns is None else self.rollout.turns.inputs.inputs]
        if has_teacher and any("image_features" in x and "pixel_values" not in x for x in inputs):
            raise ValueError(f"{saved}: teacher must be None, because its batch has no pixels for a teacher, got a teacher")
        if args.beta != 0 and self.ref_logps is None:
            raise ValueError(f"{saved}: beta must be 0, because its batch has no reference log-probabilities, got {args.beta}")
        if has_rewards and uses > window and self.old_logps is None:
            raise ValueError(
                f"{saved}: steps_per_generation * num_iterations must be at most gradient_accumulation_steps = {window}, "
                f"because its batch has no old log-probabilities, got {uses}"
            )


def _plain(inputs: ModelInputs) -> dict:
    return {"inputs": inputs.inputs, "rows": inputs.rows, "image_keys": inputs.image_keys}
