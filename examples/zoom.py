"""GRPO with a tool that returns images: python examples/zoom.py path/to/Qwen3-VL train.jsonl"""

import sys

from datasets import Image, load_dataset

from vlmkernels.train import GRPOConfig, GRPOTrainer  # the same from trl import GRPOConfig, GRPOTrainer


class Magnifier:
    """The environment of one completion. Its public methods are tools."""

    def reset(self, image, **row):
        self.image, self.calls = image, 0

    def zoom(self, index: int) -> list:
        """Look at a quarter of the image at twice its size.

        Args:
            index: 0 upper left, 1 upper right, 2 lower left, 3 lower right.
        """
        if index not in range(4):
            raise ValueError(f"index must be 0, 1, 2 or 3, got {index}")  # the model gets this text and can try again
        self.calls += 1
        width, height = self.image.size
        left, top = index % 2 * width // 2, index // 2 * height // 2
        quarter = self.image.crop((left, top, left + width // 2, top + height // 2)).resize((width, height))
        return [{"type": "text", "text": f"quarter {index}:"}, {"type": "image", "image": quarter}]


def correct(completions, answer, environments, **columns):
    """1 if the last turn has the answer, minus 0.05 for each look."""
    answers = [completion[-1]["content"].strip() for completion in completions]
    return [(a == b) - 0.05 * e.calls for a, b, e in zip(answers, answer, environments, strict=True)]


dataset = load_dataset("json", data_files=sys.argv[2], split="train").cast_column("image", Image())
config = GRPOConfig("zoom", max_completion_length=2048, max_tool_calling_iterations=4)
trainer = GRPOTrainer(sys.argv[1], correct, config, dataset, environment_factory=Magnifier)
trainer.train()
