"""The policy of a run, its reference and its teacher, as the trainer runs them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from vlmkernels.models.head import output_head
from vlmkernels.models.loading import frozen_copy
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.distillation import LoadedTeacher, Teacher, prepare_teacher
from vlmkernels.train.micro_batches import MicroBatches
from vlmkernels.train.parallel import gathered_zero3, prepare_reference
from vlmkernels.train.passes import Passes, policy_view, reference_view
from vlmkernels.train.prepare import PreparedModel, prepare_model
from vlmkernels.train.token_counts import TokenCounts


@dataclass(frozen=True)
class Models:
    """The models of a run as the trainer runs them: the result of ``prepare_models``.

    Args:
        policy: the inputs of the policy.
        reference: the inputs of the reference, or None.
        ref_model: the reference, if it is a copy. None: it is the policy with other adapters or without adapters.
        teacher: the teacher, or None.
        micro_batches: the splits that all of them run on.
        token_counts: the tokens and images of all their passes.
    """

    policy: Passes
    reference: Passes | None
    ref_model: torch.nn.Module | None
    teacher: Teacher | None
    micro_batches: MicroBatches
    token_counts: TokenCounts


def prepare_models(
    model: PreTrainedModel,
    teacher: LoadedTeacher | None,
    processor: Any,
    media: set[str],
    args: GRPOConfig,
    accelerator: Accelerator,
) -> Models:
    """Prepare the policy, its reference, if beta > 0, and its teacher, if it has one. Changes the models in place.

    Args:
        model: the policy, perhaps with adapters, before ``Trainer`` wraps it.
        processor: the policy's processor or tokenizer.
        media: the kinds of media that training can have.
    """
    token_counts = TokenCounts()
    policy = prepare_model(model, processor, args, accelerator, media)
    ref_model, reference, prepared_teacher = None, None, None
    if args.beta > 0:
        ref_model, head = _load_reference(model, policy, accelerator)
        reference = Passes(replace(policy, head=head), args, token_counts, reference_view)
    if teacher is not None:
        prepared_teacher = prepare_teacher(teacher, policy, processor, media, args, accelerator, token_counts)
    prepared = [policy] if prepared_teacher is None else [policy, prepared_teacher.prepared]
    return Models(
        policy=Passes(policy, args, token_counts, policy_view),
        reference=reference,
        ref_model=ref_model,
        teacher=prepared_teacher,
        micro_batches=MicroBatches(prepared, args, accelerator),
        token_counts=token_counts,
    )


def _load_reference(
    model: PreTrainedModel, policy: PreparedModel, accelerator: Accelerator
) -> tuple[torch.nn.Module | None, torch.nn.Module]:
    """Copy the reference model from the policy before training.

    Returns:
        The reference and its language-model head; None and the policy's head if the reference is the policy with other adapters
        or without adapters.
    """
    if is_peft_model(model):
        return None, policy.head
    with gathered_zero3(model):
        copied = frozen_copy(model)
    head = output_head(copied)
    return prepare_reference(accelerator, copied), head
