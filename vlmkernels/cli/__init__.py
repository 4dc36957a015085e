"""The command line: ``vlmkernels demo | train | report | eval | plan | env``. What a command needs is imported when it runs."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmkernels.version import __version__

# Arguments of transformers.TrainingArguments that `train --help` shows; the others need --help-all.
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
DATASET = "a .jsonl or .parquet file, or a folder written by datasets' save_to_disk"
REWARD = "a built-in reward (exact_match, cer, iou, ...) or module:function; give it again for more"
REWARDS = "in place of --reward, a JSON list (in --config, a list) of {name, weight, options of that reward}"


class Help(argparse.HelpFormatter):
    """One spelling of each flag, no shouted placeholders, and a default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = "" if action.nargs in (0, "?") else " ..." if action.nargs == "+" else " VALUE"
        return ", ".join(action.option_strings[:1]) + values

    def _get_help_string(self, action: argparse.Action) -> str:
        return f"{action.help} [%(default)s]" if action.default not in (None, argparse.SUPPRESS, [], False) else action.help


@contextmanager
def user_errors(parser: argparse.ArgumentParser, argument: str = "", more: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Errors in what the user gave end the program with exit code 2 and one line that names the argument."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, *more) as error:
        parser.error(f"{argument}: {error}" if argument else str(error))


def json_list(text: str) -> list:
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError
    return value


def add_flag(parser, name: str, **options) -> None:
    """``--some_name`` and ``--some-name``, as ``transformers`` spells its own."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), dest=name, **options)


def read_yaml(parser: argparse.ArgumentParser, path: str) -> None:
    """Make the file's values the parser's defaults, so that flags go before them."""
    import yaml

    with user_errors(parser, f"--config {path}"):
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"must be YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"must map names to values, got {type(values).__name__}")
        valid = sorted(action.dest for action in parser._actions if action.dest not in ("help", "help_all", "config"))
        for key in values:
            if key not in valid:
                near = difflib.get_close_matches(str(key), valid, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"unknown key {key!r}{hint}; valid keys: {', '.join(valid)}")
    parser.set_defaults(**values)


def train_parser(argv: list[str]) -> argparse.ArgumentParser:
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
        if any(option.startswith("--no_") for option in action.option_strings):
            action.help = f"turn {action.dest} off"
        if action.dest not in (*shown, "help") and "--help-all" not in argv:
            action.help = argparse.SUPPRESS
    own = parser.add_argument_group("model, data and rewards")
    own.add_argument("--config", help="a YAML file with values for any of these arguments; flags go before it")
    add_flag(own, "model", help="path of the model and its processor")
    add_flag(own, "dataset", help=f"training prompts: {DATASET}")
    add_flag(own, "eval_dataset", help="evaluation prompts, likewise")
    add_flag(own, "split", default="train", help="the split of --dataset, where it has several")
    add_flag(own, "eval_split", default="test", help="the split of --eval-dataset, where it has several")
    add_flag(own, "reward", action="append", help=REWARD)
    add_flag(own, "rewards", type=json_list, help=REWARDS)
    lora = parser.add_argument_group("LoRA")
    add_flag(lora, "lora_r", type=int, help="rank of the adapters to train in place of the model; by default none")
    add_flag(lora, "lora_alpha", type=int, default=32, help="their scale is lora_alpha / lora_r")
    add_flag(lora, "lora_dropout", type=float, default=0.0, help="dropout before them")
    add_flag(lora, "lora_target_modules", nargs="+", default="all-linear", help="names of the modules that get them")
    parser.add_argument("--help-all", action="help", help="show every argument of transformers.TrainingArguments too")
    return parser


def require_given(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if not getattr(args, name):
            parser.error(f"--{name} must be given")


def train(argv: list[str]) -> int:
    parser = train_parser(argv)
    if path := parser.parse_known_args(argv)[0].config:
        read_yaml(parser, path)
    args = parser.parse_args(argv)
    require_given(parser, args, "model", "dataset", *([] if args.rewards else ["reward"]))
    if args.rewards and args.reward:
        parser.error("--reward must be absent where --rewards is given")

    from dataclasses import fields

    from transformers.utils import logging

    from vlmkernels.data.samples import load_dataset
    from vlmkernels.models.loading import load_model
    from vlmkernels.rollout.base import RolloutError
    from vlmkernels.train import GRPOConfig, GRPOTrainer
    from vlmkernels.train.checkpoint import check_checkpoint, find_checkpoint

    with user_errors(parser):
        config = GRPOConfig(**{field.name: getattr(args, field.name) for field in fields(GRPOConfig) if field.init})
        if config.process_index:
            logging.disable_progress_bar()
        resume = config.resume_from_checkpoint
        if resume:
            with config.main_process_first(local=config.save_on_each_node, desc="the checkpoint"):  # it may rename one
                resume = find_checkpoint(True if resume.lower() in ("last", "true") else resume, config.output_dir)
    with user_errors(parser, "--dataset"):
        dataset = load_dataset(args.dataset, args.split)
    with user_errors(parser, "--eval_dataset"):
        eval_dataset = load_dataset(args.eval_dataset, args.eval_split) if args.eval_dataset else None
    with user_errors(parser, "--model"):
        model = load_model(args.model, config.model_init_kwargs)
    with user_errors(parser, more=(RolloutError,)):
        trainer = GRPOTrainer(model, args.rewards or args.reward, config, dataset, eval_dataset, peft_config=lora_config(args))
        if resume:
            check_checkpoint(resume, trainer.policy, config.world_size)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"model saved in {config.output_dir}")
    return 0


def lora_config(args: argparse.Namespace):
    if not args.lora_r:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def evaluate(argv: list[str]) -> int:
    from vlmkernels.cli.evaluate import main

    return main(argv)


def report(argv: list[str]) -> int:
    from vlmkernels.cli.report import main

    return main(argv)


def demo(argv: list[str]) -> int:
    from vlmkernels.demo import main

    return main(argv) or 0


def env(argv: list[str]) -> int:
    argparse.ArgumentParser("vlmkernels env", description="Versions, devices, and which backend serves each op.").parse_args(
        argv
    )
    from vlmkernels.env import main

    return main() or 0


def plan(argv: list[str]) -> int:
    from vlmkernels.cli.plan import main

    return main(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "demo": (demo, "train a small VLM to read handwritten numbers, on the CPU"),
    "train": (train, "train a model with GRPO"),
    "report": (report, "one HTML page of a training run, finished or not"),
    "eval": (evaluate, "metrics of a model, or of saved predictions, on a dataset"),
    "plan": (plan, "time and memory of a step, before it is run, and what limits it"),
    "env": (env, "versions, devices, and which backend serves each op"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    lines = "\n".join(f"  {name:7}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "vlmkernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fused kernels and a trainer for GRPO of vision-language models.",
        epilog=f"commands:\n{lines}\n\nvlmkernels COMMAND --help shows a command's arguments.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(argv[:1]).command
    return COMMANDS[command][0](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
