"""How far the log-probabilities of the rollout are from those of training, measured on a few tokens before training."""

from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from vlmkernels.data.samples import tokenizer_of
from vlmkernels.models.head import completion_logps
from vlmkernels.models.loading import inference
from vlmkernels.models.trajectories import text_inputs
from vlmkernels.rollout.base import Engine
from vlmkernels.rollout.generate import Generate
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.parallel import requires_lockstep
from vlmkernels.train.prepare import PreparedModel

COMPLETIONS, TOKENS = 2, 4  # of one prompt
PROMPT = "The quick brown fox"


class Agreement(NamedTuple):
    """Differences of log-probabilities, \\|rollout - training\\|, over some sampled tokens."""

    mean: float
    max: float
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"Agreement of rollout and training: log-probabilities differ by {self.mean:.1e} on average, at most "
            f"{self.max:.1e} ({self.tokens} tokens, {self.dtype})"
        )


@torch.no_grad()
def measure_agreement(
    model: PreTrainedModel,
    processor: object,
    engine: Engine,
    policy: PreparedModel,
    args: GRPOConfig,
    accelerator: Accelerator,
) -> Agreement | None:
    """Sample a few tokens with the engine, compute their log-probabilities as in training, and print how far they differ.

    It changes no random state. The metrics ``sampling/sampling_logp_difference`` measure the same over all tokens of a step.

    Returns:
        None if the engine is not the trainer's own or returns no log-probabilities, if parameters are sharded, on other
        processes than the main one, and if ``processor`` cannot encode the prompt, for which it prints the reason.
    """
    is_own = isinstance(engine, Generate) and engine.returns_logps
    if not is_own or requires_lockstep(accelerator) or not accelerator.is_main_process:
        return None
    # Without the processor, as that of PaliGemma only accepts text with images.
    ids = tokenizer_of(processor)(PROMPT)["input_ids"]
    if not ids:  # a tokenizer need not know English
        print(f"Agreement of rollout and training: not measured. The tokenizer encodes {PROMPT!r} as no token", flush=True)
        return None
    prompts = text_inputs([ids], policy.family, args.device, pad_token_id=0)
    uniform = torch.rand(COMPLETIONS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampling = engine.sampling
    engine.sampling = replace(sampling, max_new_tokens=TOKENS, min_new_tokens=0)
    try:
        with inference(model), accelerator.autocast():
            rollout = engine(model, prompts, COMPLETIONS, args.temperature, uniform=uniform)
            samples = torch.arange(COMPLETIONS)
            batch = rollout.packed(samples, policy.model) if policy.shares_prefix else rollout.padded(samples)
            options = {"head": policy.head, "arguments": policy.logit_arguments, "temperature": args.temperature}
            logps = completion_logps(model, batch, **options)
    finally:
        engine.sampling = sampling
    assert rollout.logps is not None
    difference = (logps - rollout.logps[rollout.completion_mask]).abs()
    dtype = torch.get_autocast_dtype(args.device.type) if accelerator.mixed_precision in ("bf16", "fp16") else model.dtype
    found = Agreement(difference.mean().item(), difference.max().item(), len(difference), str(dtype).removeprefix("torch."))
    print(found, flush=True)
    return found
