"""Steps of ``GRPOTrainer.__init__``: check the datasets, load the model, prepare the policy, the reference and the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils import logging

from vlmkernels.data.dataset import RowChecks, SampleDataset, check_dataset
from vlmkernels.data.resolution import LengthCheck, Resolution
from vlmkernels.data.samples import Sample, SampleError, encode, read_sample, tokenizer_of
from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.deterministic import use_deterministic
from vlmkernels.models.families import (
    TEXT,
    Family,
    family_of,
    media_token_ids,
    missing_token_ids,
    prefix_sharing_unsupported,
)
from vlmkernels.models.head import logit_arguments, output_head
from vlmkernels.models.hunyuan import number_images_per_sample
from vlmkernels.models.image_features import accepts_image_features, feature_reuse_unsupported, use_image_features
from vlmkernels.models.image_processor import with_fast_images
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import (
    base_model,
    disable_dropout,
    embedding_rows,
    freeze_vision,
    frozen_copy,
    load_config,
    load_model,
    load_processor,
)
from vlmkernels.models.offload import use_activation_offloading
from vlmkernels.models.quantized import is_quantized, prepare_quantized, quantized_arguments
from vlmkernels.models.router_replay import use_router_replay
from vlmkernels.models.vision import use_vision_ops
from vlmkernels.rewards import Rewards
from vlmkernels.rewards.compose import environment_reward
from vlmkernels.rollout.agent import Agent
from vlmkernels.rollout.base import Engine
from vlmkernels.rollout.generate import Generate, report_prefix_sharing
from vlmkernels.rollout.make import make_engine
from vlmkernels.tools.functions import Tools
from vlmkernels.train import reference
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.parallel import gathered_zero3, prepare_head, prepare_reference, requires_lockstep
from vlmkernels.train.saving import check_saving

logger = logging.get_logger(__name__)


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


def unwanted_tokens(model: PreTrainedModel, processor: Any, eos_token_id: Sequence[int], num_embeddings: int) -> torch.Tensor:
    """Return which ids no completion should have, (V,) bool, where V is greater than any id.

    They are image and video tokens, ids without a token, and padding, except those that end a completion.
    """
    config = model.config
    ids = {*media_token_ids(config, processor), *missing_token_ids(config, processor), tokenizer_of(processor).pad_token_id}
    unwanted = torch.zeros(max(num_embeddings, *(token + 1 for token in ids)), dtype=torch.bool)
    unwanted[sorted(ids - {*eos_token_id})] = True
    return unwanted


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


# Datasets

_PROMPT = [{"role": "user", "content": ""}]  # to which an environment that owns the data appends its observation


def with_prompts(train_dataset: Any, eval_dataset: Any, agent: Agent | None, args: GRPOConfig) -> tuple[Any, Any]:
    """Return the datasets; with environments, rows without a prompt get an empty one, and there can be no training dataset.

    Raises:
        ValueError: there is no training dataset, and the environment of a row or the number of steps is not known.
    """
    if agent is None or not agent.tools.has_environments:
        return train_dataset, eval_dataset
    only_evaluates = eval_dataset is not None and (agent.tools.multi_environment or args.max_steps <= 0)
    if train_dataset is None and not only_evaluates:
        if agent.tools.multi_environment:
            raise ValueError(
                "train_dataset must be given with several environments: its column environment names that of each row, got None"
            )
        if args.max_steps <= 0:
            raise ValueError(f"max_steps must be > 0 without train_dataset, got {args.max_steps}")
        train_dataset = [{"prompt": _PROMPT}] * (args.prompts_per_round * args.world_size)
    if isinstance(eval_dataset, dict):
        eval_dataset = type(eval_dataset)({name: _with_prompt(dataset) for name, dataset in eval_dataset.items()})
    else:
        eval_dataset = _with_prompt(eval_dataset)
    return _with_prompt(train_dataset), eval_dataset


def _with_prompt(dataset: Any) -> Any:
    """Return a dataset with an empty prompt in each row, if none has a prompt."""
    if hasattr(dataset, "add_column"):
        missing = "prompt" not in dataset.column_names
        return dataset.add_column("prompt", [_PROMPT] * len(dataset)) if missing else dataset
    if isinstance(dataset, (list, tuple)) and all(isinstance(row, dict) and "prompt" not in row for row in dataset):
        return [{"prompt": _PROMPT} | row for row in dataset]
    return dataset


@dataclass(frozen=True)
class CheckedDatasets:
    """The result of ``check_datasets``.

    Args:
        media: the kinds of media that training can have, of "image" and "video".
        columns: for each dataset, the union of the columns of its rows.
        unusable: for each dataset, the indices of its rows that cannot be used, with the reasons.
        args: the arguments of the run.
    """

    media: set[str]
    columns: dict[str, list[str]]
    unusable: dict[str, dict[int, str]]
    args: GRPOConfig

    def samples(self, dataset: Any, name: str) -> SampleDataset:
        """Return the samples of a checked dataset. With ``on_bad_sample="skip"``, unusable rows are replaced."""
        known = self.unusable.get(name), self.columns.get(name, ())
        return SampleDataset(dataset, name, self.args.image_limits(), self.args.on_bad_sample, *known)

    def evaluation(self, eval_dataset: Any, choice: Any = None) -> SampleDataset:
        """Return the samples to evaluate on.

        Args:
            eval_dataset: the evaluation dataset of the trainer, or a dict of datasets.
            choice: a key of ``eval_dataset``, or another dataset, or None for ``eval_dataset``.
        """
        if isinstance(choice, str):
            return self.samples(eval_dataset[choice], f"eval_dataset[{choice!r}]")
        dataset = eval_dataset if choice is None else choice
        if dataset is None:
            raise ValueError("eval_dataset must be given to evaluate, got None")
        # Only the trainer's dataset was checked: the unusable rows of another one are not known.
        return self.samples(dataset, "eval_dataset" if dataset is eval_dataset else "the given eval_dataset")


def check_datasets(
    data: tuple[Any, Any],
    processor: Any,
    family: Family,
    num_embeddings: int,
    rewards: Rewards,
    agent: Agent | None,
    args: GRPOConfig,
) -> CheckedDatasets:
    """Check every row of the datasets.

    Args:
        data: the training and the evaluation dataset, or None, or a dict of evaluation datasets.
        processor, family, num_embeddings: see ``load_processing``.
        rewards: the reward functions.
        agent: the tools, or None.
        args: the arguments of the run.

    Raises:
        ValueError, TypeError: a row cannot be used and ``on_bad_sample`` is "raise", a column that a reward function needs is
            missing, a dataset mixes images and videos that the model cannot run in one batch, or the training dataset has too
            few rows for one generation batch.
    """
    train_dataset, eval_dataset = data
    media: set[str] = set()
    columns: dict[str, list[str]] = {}
    unusable: dict[str, dict[int, str]] = {}
    datasets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        datasets |= {f"eval_dataset[{key!r}]": dataset for key, dataset in eval_dataset.items()}
    else:
        datasets["eval_dataset"] = eval_dataset

    def check_row(row: dict[str, Any], where: str) -> None:
        if agent is not None:
            agent.check_row(row, where)
        if not args.remove_unused_columns:
            rewards.check_row(row, where)

    def check_columns(names: list[str], name: str) -> None:
        rewards.check_columns([] if args.remove_unused_columns else names, name)

    check_length, schedule = None, args.resolution_schedule()
    if schedule is not None:
        schedule.check(processor)
        if args.max_prompt_length is not None:  # otherwise, a prompt would become too long in the middle of the run
            check_length = LengthCheck(processor, schedule, args.max_prompt_length)
    for name, dataset in datasets.items():
        if dataset is None:
            continue
        bad = unusable[name] = {}
        skipped = bad if args.on_bad_sample == "skip" else None
        checks = RowChecks(partial(check_columns, name=name), check_row, num_embeddings, family, check_length)
        kinds, columns[name] = check_dataset(
            dataset, name, processor, args.chat_template_kwargs, checks, bad=skipped, limits=args.image_limits()
        )
        if name == "train_dataset":
            media = kinds if agent is None or family is TEXT else kinds | {"image"}  # tools can return images
        if bad:
            reason = next(iter(bad.values()))
            message = "%s: %d of %d samples are not used (on_bad_sample='skip'); the first: %s"
            logger.warning(message, name, len(bad), len(dataset), reason)
    num_prompts, batch = args.prompts_per_round * args.world_size, "one generation batch"
    if args.oversampling > 1:
        batch = f"the first round of a generation batch with oversampling = {args.oversampling:g}"
    if train_dataset is not None and len(train_dataset) < num_prompts:
        raise ValueError(f"train_dataset must hold at least the {num_prompts} prompts of {batch}, got {len(train_dataset)}")
    return CheckedDatasets(media, columns, unusable, args)


# Models


@dataclass(frozen=True)
class PreparedPolicy:
    """The policy as the trainer runs it.

    Args:
        model: the model without its PEFT wrapper.
        family: the model's family.
        head: the language-model head, perhaps with LoRA.
        logit_arguments: see ``vlmkernels.models.head.logit_arguments``.
        processor_arguments: arguments of every call of the processor; see ``use_vision_ops``.
        copies_reason: why each completion of a group runs after its own copy of the prompt, or None if they share one.
        reuses_image_features: whether images are encoded once per generation batch. Needs shared prefixes and a frozen vision
            tower.
        idle_media: by kind, a small image or video on which a rank runs its vision tower if its micro-batch has none; see
            ``vlmkernels.models.image_features``. None if ranks need not run in lockstep.
    """

    model: PreTrainedModel
    family: Family
    head: torch.nn.Module
    logit_arguments: dict[str, float]
    processor_arguments: dict[str, dict]
    copies_reason: str | None
    reuses_image_features: bool
    idle_media: dict[str, dict[str, torch.Tensor]] | None = None

    def encoding_arguments(self, processor: Any, resolution: Resolution | None) -> dict[str, dict]:
        """Return the arguments of a call of the processor, with the limits of image sizes if there is a schedule."""
        if resolution is None:
            return self.processor_arguments
        size = {"size": resolution.size(processor)}
        return self.processor_arguments | {"images_kwargs": self.processor_arguments.get("images_kwargs", {}) | size}

    @property
    def shares_prefix(self) -> bool:
        """Whether the completions of a group run after one shared copy of their prompt."""
        return self.copies_reason is None


def prepare_policy(
    model: PreTrainedModel,
    processor: Any,
    args: GRPOConfig,
    accelerator: Accelerator,
    media: set[str],
    *,
    is_teacher: bool = False,
) -> PreparedPolicy:
    """Let the policy use the ops of this package and choose how it runs. Changes the model in place.

    Args:
        model: the policy, perhaps with adapters, before Trainer wraps it.
        processor: the policy's processor or tokenizer.
        media: the kinds of media that training can have.
        is_teacher: whether the model is a teacher instead, which always reads pixels, and does not replay routers.
    """
    plain, head = base_model(model), output_head(model)
    family = family_of(plain.config)
    if requires_lockstep(accelerator):
        _check_unsharded(model, args)
    prepare_head(accelerator, head)
    with gathered_zero3(model):
        arguments = logit_arguments(model, head)
    processor_arguments = use_vision_ops(plain, processor) if media or not is_teacher else {}  # it may have another family
    copies_reason = _choose_prefix_sharing(plain, args)
    if args.router_replay and not is_teacher:
        use_router_replay(plain)
    if args.deterministic:
        use_deterministic(plain)
    if args.activation_offloading:
        use_activation_offloading(plain)
    can_reuse = copies_reason is None and family is not TEXT and feature_reuse_unsupported(plain) is None
    reuses_features = can_reuse and not is_teacher
    use_image_features(plain)  # even if this run reuses no features, because a checkpoint's generation batch may hold some
    policy = PreparedPolicy(plain, family, head, arguments, processor_arguments, copies_reason, reuses_features)
    kinds = media - {"image"} if reuses_features else media
    if not requires_lockstep(accelerator) or family is TEXT or not kinds:
        return policy
    if not accepts_image_features(plain):
        name = type(plain).__name__
        raise ValueError(f"FSDP2 and ZeRO need a {name} that accepts mm_encoder_outputs (transformers >= 5.18); use DDP")
    idle_media = {kind: encode_prompts([_idle_sample(kind)], processor, policy, args).inputs for kind in sorted(kinds)}
    return replace(policy, idle_media=idle_media)


def _check_unsharded(model: PreTrainedModel, args: GRPOConfig) -> None:
    """Raise ValueError for what saves memory on one GPU and does not work with sharded parameters."""
    if is_quantized(model):
        raise ValueError("quantization_config must be None under FSDP2 and DeepSpeed: use DDP, got a quantized model")
    if args.activation_offloading:
        raise ValueError(
            "activation_offloading must be False under FSDP2 and DeepSpeed, as it would also copy gathered weights, got True"
        )


def _choose_prefix_sharing(model: PreTrainedModel, args: GRPOConfig) -> str | None:
    """Prepare the model for packs, or return why completions run after copies of their prompt."""
    reason = prefix_sharing_unsupported(model)
    if args.share_prefix is True and reason is not None:
        raise ValueError(f"share_prefix must be 'auto' or False: {reason}, got True")
    if args.share_prefix is False:
        return "share_prefix is False"
    if reason is None:
        use_tree_attention(model)
    return reason


def _idle_sample(kind: str) -> Sample:
    """Return a sample with one small image or video."""
    image = Image.new("RGB", (64, 64))
    media = {"images": [image]} if kind == "image" else {"videos": [[image, image]]}
    return read_sample({"prompt": [{"role": "user", "content": "?"}], **media}, 0)


def encode_prompts(
    samples: list[Sample],
    processor: Any,
    policy: PreparedPolicy,
    args: GRPOConfig,
    arguments: dict[str, dict] | None = None,
) -> ModelInputs:
    """Return the model inputs of the samples' prompts on the device of the run.

    Args:
        arguments: the processor's arguments; by default those of ``policy``.

    Raises:
        SampleError: a sample cannot be encoded, or is longer than ``max_prompt_length``.
    """
    arguments = policy.processor_arguments if arguments is None else arguments
    prompts = encode(samples, processor, policy.family, args.chat_template_kwargs, **arguments)
    lengths = prompts.inputs["attention_mask"].sum(1).tolist()
    for sample, length in zip(samples, lengths, strict=True):
        if args.max_prompt_length is not None and length > args.max_prompt_length:
            raise SampleError(
                sample, f"the prompt must have at most max_prompt_length = {args.max_prompt_length} tokens, got {length}"
            )
    return prompts.to(args.device)


def load_reference(
    model: PreTrainedModel, policy: PreparedPolicy, args: GRPOConfig, accelerator: Accelerator
) -> tuple[torch.nn.Module | None, torch.nn.Module]:
    """Copy the reference model from the policy before training.

    Returns:
        The reference and its language-model head; None and the policy's head if beta is 0, or if the reference is the policy
        with other adapters or without adapters.
    """
    if args.beta == 0 or is_peft_model(model):
        return None, policy.head
    with gathered_zero3(model):
        copied = frozen_copy(model)
    head = output_head(copied)
    return prepare_reference(accelerator, copied), head


def prepare_engine(
    model: PreTrainedModel,
    processor: Any,
    policy: PreparedPolicy,
    args: GRPOConfig,
    accelerator: Accelerator,
    *,
    keeps_pixels: bool = False,
) -> Engine:
    """Make the engine that ``args`` select and check that it supports the rollout correction; see ``make_engine``.

    The main process reports whether training and sampling share prefixes.

    Args:
        keeps_pixels: whether rollouts must have the pixels of images that tools return, for a teacher.
    """
    if args.use_vllm and is_quantized(model):
        raise ValueError(
            "rollout_engine must be 'transformers' with a quantized model, whose weights vLLM engines do not load, "
            f"got {args.rollout_engine!r}"
        )
    engine = make_engine(
        model,
        processor,
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
        engine.reuses_image_features = policy.reuses_image_features and not keeps_pixels
    if accelerator.is_main_process:
        sampling = {"sampling": policy.copies_reason or engine.copies_reason} if isinstance(engine, Generate) else {}
        report_prefix_sharing({"training": policy.copies_reason, **sampling})
    return engine
