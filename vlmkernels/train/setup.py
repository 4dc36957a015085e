"""The set-up of a run: the steps of ``GRPOTrainer.__init__``, in their order.

    load_run            loads and checks all that the constructor was given, the weights last
    check_processes     whether the processes fit together
    prepare_models      how the policy, its reference and its teacher run (``vlmkernels.train.run_models``)
    prepare_engine      what samples completions, and its tools
    BatchImages         what training adds to the images of a rollout (``vlmkernels.train.batch_images``)
    describe_run        what ``run.json`` says about the run

``load_run`` runs before ``Trainer.__init__``, and the others after it, with the accelerator that it makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from vlmkernels.data.samples import tokenizer_of
from vlmkernels.models.families import TEXT, Family, family_of, media_token_ids, missing_token_ids
from vlmkernels.models.hunyuan import number_images_per_sample
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.loading import (
    base_model,
    disable_dropout,
    embedding_rows,
    freeze_vision,
    load_config,
    load_model,
    load_processor,
)
from vlmkernels.models.quantized import is_quantized, prepare_quantized, quantized_arguments
from vlmkernels.rewards import Rewards
from vlmkernels.rewards.compose import environment_reward
from vlmkernels.rollout.agent import Agent
from vlmkernels.rollout.base import Engine
from vlmkernels.rollout.generate import Generate, report_prefix_sharing
from vlmkernels.rollout.make import make_engine
from vlmkernels.tools.functions import Tools
from vlmkernels.train import distillation, reference
from vlmkernels.train.agreement import Agreement
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.datasets import CheckedDatasets, check_datasets, with_prompts
from vlmkernels.train.masks import check_perception
from vlmkernels.train.parallel import check_parallelism
from vlmkernels.train.prepare import PreparedModel
from vlmkernels.train.processes import Processes, describe_process
from vlmkernels.train.run_details import run_details
from vlmkernels.train.run_models import Models
from vlmkernels.train.saving import check_saving

# Loading


@dataclass(frozen=True)
class LoadedRun:
    """What a run is made of: the result of ``load_run``.

    Args:
        processor, family, num_embeddings: see ``load_processing``.
        agent: the tools, or None.
        datasets: the datasets, and what their checks found.
        model: the policy, perhaps with adapters.
        teacher: the teacher, or None.
    """

    processor: Any
    family: Family
    num_embeddings: int
    agent: Agent | None
    rewards: Rewards
    datasets: CheckedDatasets
    model: PreTrainedModel
    teacher: distillation.LoadedTeacher | None


def load_run(
    model: str | PreTrainedModel,
    reward_funcs: Any,
    args: GRPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    peft_config: Any,
    tools: Any,
    environment_factory: Any,
    teacher: str | PreTrainedModel | None,
) -> LoadedRun:
    """Load and check what ``GRPOTrainer`` was given; for the arguments see there.

    What is cheap comes first: a bad row is reported before a model is loaded, and the workers of tools are forked before.
    """
    processor, family, num_embeddings = load_processing(model, processing_class, args)
    agent = make_agent(tools, environment_factory, args)
    rewards = make_rewards(reward_funcs, agent, args, has_teacher=teacher is not None)
    distillation.check_arguments(teacher, model, rewards, args)
    data = with_prompts(train_dataset, eval_dataset, agent, args)
    datasets = check_datasets(*data, processor, family, num_embeddings, rewards, agent, args)
    check_perception(args, family, datasets.media, has_tools=agent is not None)
    policy = load_policy(model, processor, peft_config, args)
    loaded = None
    if teacher is not None:
        loaded = distillation.load_teacher(teacher, policy, processor, datasets.media, args)
    return LoadedRun(processor, family, num_embeddings, agent, rewards, datasets, policy, loaded)


def load_processing(model: str | PreTrainedModel, processor: Any, args: GRPOConfig) -> tuple[Any, Family, int]:
    """Load the processor or tokenizer of a model, unless it is given, and complete ``args`` for the model.

    The weights are not loaded, so that the datasets are checked before.

    Returns:
        The processor, with a padding token and, if one is available, a fast image processor, the family of the model and the
        number of rows of its input embedding.
    """
    is_path = isinstance(model, str)
    config = load_config(model, args.model_init_kwargs) if is_path else model.config
    if processor is None:
        processor = load_processor(model if is_path else config._name_or_path, args.model_init_kwargs)
    processor = with_fast_images(processor)
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("processing_class must have a pad_token or an eos_token, got neither")
        tokenizer.pad_token = tokenizer.eos_token
    family = family_of(config)
    if family is not TEXT and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = True  # a micro-batch without images leaves the vision tower without gradients
    return processor, family, embedding_rows(config if is_path else model)


def load_policy(model: str | PreTrainedModel, processor: Any, peft_config: Any, args: GRPOConfig) -> PreTrainedModel:
    """Load the model unless it is given, add the adapters of ``peft_config`` if there are any, and disable dropout if ``args``
    says so. With beta > 0, a model that is given with adapters gets a frozen copy of them; see ``vlmkernels.train.reference``.

    Raises:
        ValueError, TypeError: the model and ``peft_config`` do not fit together, nothing is trained, or the model could not be
            saved.
    """
    if isinstance(model, str):
        model = load_model(model, quantized_arguments(args.model_init_kwargs, args.compute_dtype))
    else:
        number_images_per_sample(base_model(model))
    if peft_config is not None:
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}")
        if is_peft_model(model):
            raise ValueError("peft_config must be None for a model that has adapters (or merge_and_unload them), got both")
        model = get_peft_model(model, peft_config)
    if args.freeze_vision:
        freeze_vision(model)
    prepare_quantized(model)
    if args.beta != 0 and is_peft_model(model) and (peft_config is None or reference.changes_base(peft_config)):
        reference.add_adapter(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have parameters that require gradients (load adapters with is_trainable=True), got none")
    check_saving(model, processor, args)
    if args.disable_dropout:
        disable_dropout(model)
    return model


def make_agent(tools: Any, environment_factory: Any, args: GRPOConfig) -> Agent | None:
    """Build the agent of ``tools`` and ``environment_factory``; None without either. Its workers are forked here."""
    found = Tools(tools, environment_factory)
    return Agent(found, args.tool_options()) if found else None


def make_rewards(reward_funcs: Any, agent: Agent | None, args: GRPOConfig, *, has_teacher: bool = False) -> Rewards:
    """Build the rewards of ``reward_funcs`` and of the environments that have ``get_reward``.

    Args:
        has_teacher: whether the run has a teacher, with which it needs no rewards.
    """
    names = [] if agent is None else agent.tools.reward_names
    if reward_funcs is None and not names:
        if has_teacher:
            return Rewards(None, args.reward_weights)
        raise ValueError("reward_funcs must be given without a teacher or an environment that has get_reward, got None")
    functions = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    weights = args.reward_weights
    if weights is not None and len(weights) == len(functions):  # TRL's list has no weights of environments either
        weights = [*weights, *[1.0] * len(names)]
    return Rewards([*functions, *map(environment_reward, names)], weights)


def check_processes(run: LoadedRun, args: GRPOConfig, accelerator: Accelerator, processes: Processes) -> None:
    """Check that the run supports this kind of parallelism, and that all processes have loaded the same."""
    teacher = None if run.teacher is None else run.teacher.model
    check_parallelism(accelerator, run.model, teacher, args)
    common = run.model, tokenizer_of(run.processor), run.rewards, run.datasets.train_dataset
    processes.compare(**describe_process(args, *common, teacher))


# Preparing


def prepare_engine(run: LoadedRun, policy: PreparedModel, args: GRPOConfig, accelerator: Accelerator) -> Engine:
    """Make the engine that ``args`` select, prepare the tools for it, and check that it supports the rollout correction.

    The main process reports whether training and sampling share prefixes.

    Args:
        policy: how the policy runs.
    """
    if args.use_vllm and is_quantized(run.model):
        raise ValueError(
            "rollout_engine must be 'transformers' with a quantized model, whose weights vLLM engines do not load, "
            f"got {args.rollout_engine!r}"
        )
    engine = make_engine(
        run.model,
        run.processor,
        args.sampling(),
        accelerator,
        vllm=args.vllm_config(),
        share_prefix=policy.shares_prefix,
        max_num_seqs=args.max_num_seqs,
        max_tokens=args.max_tokens_per_microbatch,
        router_replay=args.router_replay,
        deterministic=args.deterministic,
    )
    if args.rollout_correction is not None and not engine.returns_logps:
        raise ValueError(
            "rollout_correction must be None with an engine that returns no log-probabilities, such as model.generate, "
            f"got {args.rollout_correction!r}"
        )
    if isinstance(engine, Generate):
        engine.reuses_image_features = policy.reuses_image_features and run.teacher is None  # which reads pixels
    if accelerator.is_main_process:
        sampling = {"sampling": policy.copies_reason or engine.copies_reason} if isinstance(engine, Generate) else {}
        report_prefix_sharing({"training": policy.copies_reason, **sampling})
    if run.agent is not None:
        options = args.chat_template_kwargs, policy.processor_arguments, engine.sampling.eos_token_id
        run.agent.prepare(run.processor, run.family, *options)
    return engine


def unwanted_tokens(model: PreTrainedModel, processor: Any, eos_token_id: Sequence[int], num_embeddings: int) -> torch.Tensor:
    """Return which ids no completion should have, (V,) bool, where V is greater than any id.

    They are image and video tokens, ids without a token, and padding, except those that end a completion.
    """
    config = model.config
    ids = {*media_token_ids(config, processor), *missing_token_ids(config, processor), tokenizer_of(processor).pad_token_id}
    unwanted = torch.zeros(max(num_embeddings, *(token + 1 for token in ids)), dtype=torch.bool)
    unwanted[sorted(ids - {*eos_token_id})] = True
    return unwanted


def describe_run(run: LoadedRun, models: Models, agreement: Agreement | None) -> dict[str, Any]:
    """Return what ``run.json`` says about the run; see ``run_details``."""
    data = run.datasets
    details = run_details(data.train_dataset, data.eval_dataset, data.columns, run.rewards, run.model)
    details["model"]["shares prefix"] = models.policy.prepared.shares_prefix
    if agreement is not None:
        details["model"]["agreement of rollout and training"] = agreement._asdict()
    if run.teacher is not None and models.teacher is not None:
        details["teacher"] = run.teacher.about | {"shares prefix": models.teacher.prepared.shares_prefix}
    return details
