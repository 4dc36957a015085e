"""Division of a generation batch into micro-batches, and of these into splits within a token budget."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from vlmkernels.rollout.base import Rollout
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.parallel import max_over_ranks, requires_lockstep
from vlmkernels.train.prepare import PreparedModel


class Split(NamedTuple):
    """Completions of a micro-batch that run in one forward pass.

    Args:
        samples: (n,) int64, indices of completions of the generation batch.
        is_padding: whether the pass repeats another split to keep ranks in lockstep. Its loss is not used.
    """

    samples: torch.Tensor
    is_padding: bool


class MicroBatches:
    """Divides generation batches into splits, which all models of a run have in common.

    Args:
        models: how the models run that read the splits, the policy first. If one of them runs copies of the prompts, splits are
            cut as copies, which take more tokens than packs.

    Attributes:
        shares_prefix: whether splits are cut as packs.
    """

    def __init__(self, models: Sequence[PreparedModel], args: GRPOConfig, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.shares_prefix = all(prepared.shares_prefix for prepared in models)
        self._hidden_size = models[0].model.config.get_text_config().hidden_size

    def splits(self, rollout: Rollout, index: int, *, branches: bool = False) -> list[Split]:
        """Split micro-batch ``index`` of a generation batch within ``max_tokens_per_microbatch``.

        If ranks must run in lockstep, every rank returns the same number of splits.

        Args:
            branches: whether the splits run with masked images too.
        """
        size, budget = self.args.per_device_train_batch_size, self.args.max_tokens_per_microbatch
        micro_batch = slice(index * size, (index + 1) * size)
        options = {"shared": self.shares_prefix, "hidden_size": self._hidden_size, "branches": branches}
        parts = rollout.parts(micro_batch, budget, **options)
        splits = [Split(samples, False) for samples in parts]
        if budget is not None and requires_lockstep(self.accelerator):
            splits += [Split(parts[-1], True)] * (max_over_ranks(self.accelerator, len(parts)) - len(parts))
        return splits
