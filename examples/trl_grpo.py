"""A TRL script with one extra line, which enables prefix sharing and a loss without materialized logits.

    python examples/prepare.py digits
    python examples/trl_grpo.py --model digits/model --dataset digits/train.jsonl

The script works with any vision-language model that TRL supports and any JSONL file with ``prompt``, ``image`` and ``answer``.
Without the extra line, it runs TRL's own code. Needs ``pip install '.[trl]'``.
"""

import argparse

import torch
from datasets import Dataset, Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from vlmkernels.data.dataset import load_dataset
from vlmkernels.integrations.trl import patch_trl

patch_trl()  # the extra line


def exact_match(completions, answer, **kwargs) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(text.strip() == expected) for text, expected in zip(texts, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path or hub name of a vision-language model")
    parser.add_argument("--dataset", required=True, help="JSONL file with prompt, image and answer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="trl-output")
    args = parser.parse_args()

    dataset = Dataset.from_list(load_dataset(args.dataset)).cast_column("image", Image())
    config = GRPOConfig(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=16,
        learning_rate=5e-4 if args.model == "digits/model" else 1e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    trainer = GRPOTrainer(
        # The default dtype is that of the file. In bf16, a learning rate of 1e-6 changes hardly any weight.
        model=AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=exact_match,
        args=config,
        train_dataset=dataset,
        processing_class=AutoProcessor.from_pretrained(args.model, padding_side="left"),
    )
    trainer.train()


if __name__ == "__main__":
    main()
