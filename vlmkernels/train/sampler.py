"""The order in which prompts are visited."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class PromptSampler(Sampler):
    """Indices of prompts, in chunks; each chunk repeated, one time per micro-batch made of its completions.

    The order of an epoch depends on the seed and the epoch's number alone, and that number on ``global_step()``: a resumed run
    sees what the uninterrupted one would have seen. Prompts left over by the last chunk wait for another epoch's order.
    """

    def __init__(
        self,
        num_prompts: int,
        *,
        chunk: int,
        repeats: int,
        shuffle: bool,
        seed: int,
        global_step: Callable[[], int],
        gradient_accumulation_steps: int,
    ):
        self.num_prompts, self.chunk, self.repeats = num_prompts, chunk, repeats
        self.shuffle, self.seed, self.global_step = shuffle, seed, global_step
        micro_batches = num_prompts // chunk * repeats
        self.steps_per_epoch = max(-(-micro_batches // gradient_accumulation_steps), 1)

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
