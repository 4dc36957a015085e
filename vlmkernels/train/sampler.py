"""The order in which training visits prompts."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from vlmkernels.train.config import GRPOConfig


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
        self.num_prompts, self.shuffle, self.global_step = num_prompts, args.shuffle_dataset, global_step
        self.chunk, self.repeats = args.prompts_per_generation * args.world_size, args.steps_per_rollout
        self.seed = args.seed if args.data_seed is None else args.data_seed
        micro_batches = num_prompts // self.chunk * self.repeats
        self.steps_per_epoch = max(-(-micro_batches // args.gradient_accumulation_steps), 1)

    def __len__(self) -> int:
        return self.num_prompts // self.chunk * self.chunk * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = range(self.num_prompts)
        if self.shuffle:
            epoch = self.global_step() // self.steps_per_epoch
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        for start in range(0, self.num_prompts - self.chunk + 1, self.chunk):
            for _ in range(self.repeats):
                yield from order[start : start + self.chunk]


def prompt_dataloader(num_prompts: int, args: GRPOConfig, global_step: Callable[[], int]) -> DataLoader:
    """Return batches of prompt indices, one per micro-batch, so that ``Trainer`` counts micro-batches.

    All micro-batches of a generation batch have the same indices. For the arguments see ``PromptSampler``.
    """
    sampler = PromptSampler(num_prompts, args, global_step)
    return DataLoader(range(num_prompts), batch_size=args.prompts_per_generation, sampler=sampler, collate_fn=list)
