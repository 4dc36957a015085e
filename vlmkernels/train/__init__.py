"""A thin GRPO trainer for vision-language models on ``transformers.Trainer``. Needs the extra ``train``."""

from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
