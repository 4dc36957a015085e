"""The order in which training visits prompts."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer import TRAINER_STATE_NAME

from vlmkernels.train.config import GRPOConfig


def order_of_epoch(num_prompts: int, args: GRPOConfig, epoch: int) -> Sequence[int]:
    """Return the indices of all prompts in the order in which an epoch visits them. It depends only on seed and epoch."""
    if not args.shuffle_dataset:
        return range(num_prompts)
    seed = args.seed if args.data_seed is None else args.data_seed
    return torch.randperm(num_prompts, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


class PromptSampler(Sampler):
    """Yields indices of prompts in chunks of one generation batch. Each chunk repeats once per micro-batch made of it.

    The order of an epoch depends only on the seed and the number of the epoch, which follows from ``global_step()``: a resumed
    run visits the prompts that the uninterrupted run would have visited. Prompts that do not fill the last chunk are left out
    of the epoch.

    Args:
        num_prompts: length of the dataset.
        global_step: returns the number of optimizer steps done.
    """

    def __init__(self, num_prompts: int, args: GRPOConfig, global_step: Callable[[], int]) -> None:
        self.num_prompts, self.args, self.global_step = num_prompts, args, global_step
        self.chunk, self.repeats = args.prompts_per_generation * args.world_size, args.steps_per_rollout
        micro_batches = num_prompts // self.chunk * self.repeats
        self.steps_per_epoch = max(-(-micro_batches // args.gradient_accumulation_steps), 1)

    def __len__(self) -> int:
        return self.num_prompts // self.chunk * self.chunk * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = order_of_epoch(self.num_prompts, self.args, self.global_step() // self.steps_per_epoch)
        for start in range(0, self.num_prompts - self.chunk + 1, self.chunk):
            for _ in range(self.repeats):
                yield from order[start : start + self.chunk]


def prompt_dataloader(num_prompts: int, args: GRPOConfig, global_step: Callable[[], int]) -> DataLoader:
    """Return batches of prompt indices, one per micro-batch, so that ``Trainer`` counts micro-batches.

    All micro-batches of a generation batch have the same indices. For the arguments see ``PromptSampler``.
    """
    sampler = PromptSampler(num_prompts, args, global_step)
    return DataLoader(range(num_prompts), batch_size=args.prompts_per_generation, sampler=sampler, collate_fn=list)


class PromptStream:
    """The order of prompts if the number of prompts of a batch varies: the epochs of ``PromptSampler``, one after another.

    Every epoch visits every prompt once. All processes take their prompts from one stream.

    Args:
        num_prompts: length of the dataset.

    Attributes:
        position: the number of prompts that all processes have taken together since training began.
    """

    FILE = "prompt_stream.json"  # in a checkpoint

    def __init__(self, num_prompts: int, args: GRPOConfig) -> None:
        self.num_prompts, self.args, self.position = num_prompts, args, 0
        self._epoch, self._order = 0, order_of_epoch(num_prompts, args, 0)

    @property
    def epochs(self) -> float:
        """The number of passes over the dataset so far."""
        return self.position / self.num_prompts

    def take(self, counts: Sequence[int]) -> list[int]:
        """Return the next prompts of this process.

        Args:
            counts: how many prompts each process takes now, the same on all processes.
        """
        start = self.position + sum(counts[: self.args.process_index])
        self.position += sum(counts)
        return [self._prompt(place) for place in range(start, start + counts[self.args.process_index])]

    def _prompt(self, place: int) -> int:
        epoch, index = divmod(place, self.num_prompts)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, order_of_epoch(self.num_prompts, self.args, epoch)
        return self._order[index]

    def save(self, checkpoint: str) -> None:
        """Write the position to a checkpoint."""
        Path(checkpoint, self.FILE).write_text(json.dumps({"position": self.position}))

    def restore(self, checkpoint: str) -> None:
        """Continue after the prompts of the run of a checkpoint. If it had no stream, ``PromptSampler`` visited them."""
        file = Path(checkpoint, self.FILE)
        if file.exists():
            self.position = json.loads(file.read_text())["position"]
            return
        step = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"]
        sampler = PromptSampler(self.num_prompts, self.args, lambda: step)
        epoch, steps = divmod(step, sampler.steps_per_epoch)
        batches = -(-steps * self.args.gradient_accumulation_steps // sampler.repeats)
        self.position = epoch * self.num_prompts + batches * sampler.chunk
