"""``vlmkernels train``: train a model with GRPO."""

import argparse
import re
from dataclasses import fields
from typing import TYPE_CHECKING

from vlmkernels.cli.flags import (
    DATASET,
    ENVIRONMENT,
    REWARD,
    REWARDS,
    TOOL,
    Help,
    Repeated,
    add_flag,
    environment_factory,
    json_list,
    parse_arguments,
    read_yaml,
    require_given,
    tool_functions,
    user_errors,
)

if TYPE_CHECKING:
    from peft import LoraConfig

    from vlmkernels.train import GRPOConfig, GRPOTrainer

# Arguments of transformers.TrainingArguments that --help shows; --help-all also shows the others.
COMMON = {
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "max_grad_norm",
    "activation_checkpointing",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "save_steps",
    "save_total_limit",
    "report_to",
    "seed",
}


def build_parser(show_all: bool = False) -> argparse.ArgumentParser:
    """Build the parser from the fields of ``GRPOConfig``.

    Args:
        show_all: whether --help lists every argument of transformers.TrainingArguments.
    """
    from transformers import HfArgumentParser

    from vlmkernels.train.config import GRPOConfig

    parser = HfArgumentParser(
        GRPOConfig,
        prog="vlmkernels train",
        usage="vlmkernels train --model PATH --dataset PATH --reward NAME [--config FILE.yaml] [--ARGUMENT VALUE ...]",
        description="Train a model with GRPO.",
        formatter_class=Help,
        allow_abbrev=False,
    )
    shown = COMMON | set(GRPOConfig.__annotations__)
    for action in parser._actions:
        if action.dest == "use_vllm":  # argparse would need a value, because None is allowed too
            action.nargs, action.const = "?", True
        if any(option.startswith("--no_") for option in action.option_strings):
            action.help = f"disable {action.dest}"
        if action.dest not in (*shown, "help") and not show_all:
            action.help = argparse.SUPPRESS
    own = parser.add_argument_group("model, data and rewards")
    own.add_argument("--config", help="a YAML file with values for any of these arguments; flags override it")
    add_flag(own, "model", help="path of the model and its processor")
    add_flag(own, "dataset", help=f"training prompts: {DATASET}")
    add_flag(own, "eval_dataset", help=f"evaluation prompts: {DATASET}")
    add_flag(own, "split", default="train", help="the split of --dataset, if it has several")
    add_flag(own, "eval_split", default="test", help="the split of --eval_dataset, if it has several")
    add_flag(own, "reward", action=Repeated, help=REWARD)
    add_flag(own, "rewards", type=json_list, help=f"{REWARDS}; in --config a list")
    add_flag(own, "tools", action=Repeated, help=f"{TOOL}; in --config a list")
    add_flag(own, "environment", action=Repeated, help=f"{ENVIRONMENT}; in --config a list")
    add_flag(own, "teacher", help="path of a model to distill from, besides the rewards or instead of them")
    lora = parser.add_argument_group("LoRA")
    add_flag(lora, "lora_r", type=int, help="rank of the LoRA adapters; without it, all parameters of the model are trained")
    add_flag(lora, "lora_alpha", type=int, default=32, help="LoRA alpha; the adapters are scaled by lora_alpha / lora_r")
    add_flag(lora, "lora_dropout", type=float, default=0.0, help="dropout probability of the LoRA layers")
    add_flag(
        lora,
        "lora_target_modules",
        nargs="+",
        default="all-linear",
        help="names of the modules to which LoRA adapters are added, or one regular expression",
    )
    parser.add_argument("--help-all", action="help", help="also show every argument of transformers.TrainingArguments")
    return parser


def main(argv: list[str]) -> int:
    """Train, save the model in ``--output_dir``, and return 0. Invalid arguments end the program with exit code 2."""
    from vlmkernels.train.config import TRL_FIELDS

    parser = build_parser(show_all="--help-all" in argv)
    if path := parser.parse_known_args(argv)[0].config:
        read_yaml(parser, path, TRL_FIELDS)
    args = parse_arguments(parser, argv, TRL_FIELDS)
    needs_reward = not (args.rewards or args.environment or args.teacher)
    require_given(parser, args, "model", "dataset", *(["reward"] if needs_reward else []))
    if args.rewards and args.reward:
        parser.error("--reward must not be used together with --rewards")
    trainer, checkpoint = build_trainer(parser, args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model saved in {trainer.args.output_dir}")
    return 0


def build_trainer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple["GRPOTrainer", str | None]:
    """Load the data and the model, and check everything that can be checked before the first step.

    Returns:
        The trainer, and the checkpoint to resume from; None to start at step 0.
    """
    from transformers.utils import logging

    from vlmkernels.data.dataset import load_dataset
    from vlmkernels.models.loading import load_processor
    from vlmkernels.rollout.base import RolloutError
    from vlmkernels.train import GRPOConfig, GRPOTrainer
    from vlmkernels.train.checkpoint import check_checkpoint

    with user_errors(parser):
        config = GRPOConfig(**{field.name: getattr(args, field.name) for field in fields(GRPOConfig) if field.init})
        if config.process_index:
            logging.disable_progress_bar()
        checkpoint = resumed_checkpoint(config)
    with user_errors(parser, "--dataset"):
        dataset = load_dataset(args.dataset, args.split)
    with user_errors(parser, "--eval_dataset"):
        eval_dataset = load_dataset(args.eval_dataset, args.eval_split) if args.eval_dataset else None
    with user_errors(parser, "--model"):
        processor = load_processor(args.model, config.model_init_kwargs)
    with user_errors(parser, "--tools"):
        tools = tool_functions(args.tools)
    with user_errors(parser, "--environment"):
        environments = environment_factory(args.environment)
    with user_errors(parser, more=(RolloutError,)):  # the trainer loads the model after it has checked the datasets
        data = dataset, eval_dataset, processor
        more = {"peft_config": lora_config(args), "tools": tools, "environment_factory": environments, "teacher": args.teacher}
        trainer = GRPOTrainer(args.model, args.rewards or args.reward, config, *data, **more)
        if checkpoint:
            check_checkpoint(checkpoint, trainer.policy, config.world_size)
    return trainer, checkpoint


def resumed_checkpoint(config: "GRPOConfig") -> str | None:
    """Return the checkpoint of ``resume_from_checkpoint``: a path, or "last" (or "true") for the newest complete checkpoint."""
    from vlmkernels.train.checkpoint import find_checkpoint

    wanted = config.resume_from_checkpoint
    if not wanted:
        return None
    with config.main_process_first(local=config.save_on_each_node, desc="the checkpoint"):  # it may rename a checkpoint
        return find_checkpoint(True if wanted.lower() in ("last", "true") else wanted, config.output_dir)


def lora_config(args: argparse.Namespace) -> "LoraConfig | None":
    """Return the LoRA configuration that the flags describe, or None without --lora_r."""
    if not args.lora_r:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_modules(args.lora_target_modules),
        task_type="CAUSAL_LM",
    )


def target_modules(given: str | list[str]) -> str | list[str]:
    """Return the value of --lora_target_modules for PEFT, which takes a list for names, and a string for what selects them."""
    only = given[0] if isinstance(given, list) and len(given) == 1 else None
    return only if only is not None and (only == "all-linear" or not re.fullmatch(r"[\w.]+", only)) else given
