"""The loss of a split of a micro-batch, composed of what the models of a run compute for it."""

from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from vlmkernels.models.head import completion_loss, term_alone, top_entropy_threshold
from vlmkernels.models.loading import inference
from vlmkernels.ops.grpo_loss.parts import Part, combine_metrics, in_parts
from vlmkernels.record.phases import Phases, phase
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.experience import Experience
from vlmkernels.train.micro_batches import Split
from vlmkernels.train.mismatch import Mismatch
from vlmkernels.train.reference import as_reference
from vlmkernels.train.run_models import Models


class Objective:
    """Computes the loss of each split of a micro-batch::

        loss = GRPO loss of the policy                     with reward functions
                 with the KL divergence from the reference    beta
                 and the perception terms of masked images    perception_loss_weight, der_loss_weight1, der_loss_weight2
             + divergence of the policy from the teacher   with a teacher

    Args:
        models: the policy, its reference and its teacher.
        phases: times the passes.
        has_rewards: whether the run has reward functions.

    Attributes:
        config: the configuration of the GRPO loss.
        mismatch: compares the log-probabilities of training with those of the rollout.
    """

    def __init__(
        self, models: Models, args: GRPOConfig, accelerator: Accelerator, phases: Phases, *, has_rewards: bool
    ) -> None:
        self.models, self.args, self.accelerator, self.phases = models, args, accelerator, phases
        self.has_rewards, self.config = has_rewards, args.loss_config()
        self.mismatch = Mismatch(self.config, args.rollout_policy)

    def add_fixed_logps(self, model: torch.nn.Module, policy: PreTrainedModel, experience: Experience) -> None:
        """Compute the log-probabilities of the old policy and the reference, which stay the same while the batch is used.

        Micro-batches before the first optimizer step are on policy: their own forward pass gives their old log-probabilities.

        Args:
            model: the policy, perhaps wrapped.
            policy: the policy without wrappers.
        """
        args, models, rollout = self.args, self.models, experience.rollout
        off_policy = range(args.gradient_accumulation_steps, args.steps_per_generation)
        if off_policy or args.num_iterations > 1:
            with self.phases("old_logps") if off_policy else nullcontext(), inference(model):
                splits = (split for index in off_policy for split in models.micro_batches.splits(rollout, index))
                experience.old_logps = models.policy.logps(model, rollout, splits)
        if models.reference is not None:
            reference = model if models.ref_model is None else models.ref_model
            adapters = as_reference(policy) if models.ref_model is None else nullcontext()
            with self.phases("ref_logps"), inference(reference), adapters:
                every = range(args.steps_per_generation)
                splits = (split for index in every for split in models.micro_batches.splits(rollout, index))
                experience.ref_logps = models.reference.logps(reference, rollout, splits)

    def splits(self, experience: Experience, use: int, window: float) -> list[tuple[Split, Part]]:
        """Divide a micro-batch into splits, and return them with their weights in its loss.

        Args:
            use: how many micro-batches of the generation batch were trained on before this one.
            window: the number of micro-batches of the optimizer step.
        """
        index, branches = use % self.args.steps_per_generation, self.args.masks_images
        splits = self.models.micro_batches.splits(experience.rollout, index, branches=branches)
        counted = [split.samples for split in splits if not split.is_padding]
        sizes, tokens = [len(samples) for samples in counted], [1]
        if len(counted) > 1:  # with one split the number of tokens does not matter, and reading it would wait for the device
            tokens = [int(experience.loss_mask[samples].sum()) for samples in counted]
        parts = in_parts(self.config, sizes, tokens, window)
        parts += parts[-1:] * (len(splits) - len(counted))
        return list(zip(splits, parts, strict=True))

    @phase("forward")
    def split_loss(
        self, model: torch.nn.Module, experience: Experience, use: int, split: Split, part: Part, window: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Compute the loss of a split, and its metrics; of padding, 0 and None.

        Args:
            model: the policy, perhaps wrapped.
            use, window: see ``splits``.
            part: the weight of the split.
        """
        args, models, rollout = self.args, self.models, experience.rollout
        samples = split.samples.to(args.device, non_blocking=True)  # indexing with the host's would wait for the device
        loss_mask = experience.loss_mask[samples]
        num_items = experience.num_items * window / args.steps_per_generation
        distillation = None
        if models.teacher is not None:
            with self.phases("teacher"):
                tokens = loss_mask[rollout.sampled_mask[samples]]
                distillation = models.teacher.term(rollout, split, tokens, num_items)
        batch, masked = models.policy.loss_batch(rollout, split, loss_mask)
        if not self.has_rewards:
            loss, metrics = term_alone(model, batch, distillation, head=models.policy.prepared.head)
            return (0.0 * loss, None) if split.is_padding else (loss, metrics)
        is_on_policy = use < min(args.gradient_accumulation_steps, args.steps_per_generation)
        old_logps = None if is_on_policy else experience.old_logps[samples]
        loss, metrics, logps, _ = completion_loss(
            model,
            batch,
            loss_mask,
            **models.policy.head_arguments,
            advantages=experience.advantages[samples],
            old_logps=old_logps,
            rollout_logps=self.mismatch.rollout_logps(rollout, samples),  # correction for the engine
            ref_logps=None if experience.ref_logps is None else experience.ref_logps[samples],  # divergence from the reference
            masked=masked,  # perception terms
            term=distillation,  # divergence from the teacher
            entropy_threshold=self._entropy_threshold,
            num_items=num_items,
            **part._asdict(),
        )
        if is_on_policy:
            old_logps = torch.zeros_like(loss_mask, dtype=logps.dtype).masked_scatter_(loss_mask, logps)
            if experience.old_logps is not None:
                experience.old_logps[samples] = old_logps
        if split.is_padding:
            return 0.0 * loss, None
        if use < args.steps_per_generation:
            self.mismatch.add(rollout, samples, loss_mask, old_logps)
        return loss, metrics

    @property
    def _entropy_threshold(self) -> partial | None:
        """What gathers the entropies of all processes; None if the loss uses the quantile of each split's entropies."""
        if self.args.top_entropy_quantile == 1 or self.args.world_size == 1:
            return None
        return partial(top_entropy_threshold, self.accelerator, self.args.top_entropy_quantile)

    def combine(self, splits: list[tuple[Split, Part]], metrics: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Combine the metrics of the splits of a micro-batch that are not padding."""
        sizes = [len(split.samples) for split, _ in splits if not split.is_padding]
        return combine_metrics(self.config, sizes, metrics)
