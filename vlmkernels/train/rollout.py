"""Sampling completions: ``transformers``' ``generate`` behind one class."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from vlmkernels.models.batch import Batch
from vlmkernels.models.families import media_token_ids
from vlmkernels.train.config import GRPOConfig


@dataclass(frozen=True)
class Rollout:
    """B completions of P prompts.

    prompts: the P prompts, each once. group: (B,) int64 on the CPU, the prompt of each completion.
    completion_ids: (B, C), right-padded. completion_mask: (B, C) bool, up to and with the end-of-sequence token.
    truncated: (B,) bool, no end-of-sequence token within the length allowed.
    """

    prompts: Batch
    group: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    truncated: torch.Tensor

    def take(self, samples: slice) -> tuple[dict[str, torch.Tensor], int]:
        """Model inputs of some completions with their prompts, less common padding, and their width in completion tokens."""
        width = int(self.completion_mask[samples].any(0).sum())
        ids, mask = self.completion_ids[samples, :width], self.completion_mask[samples, :width]
        return self.prompts.select(self.group[samples]).trim().append(ids, mask).inputs, width


def tokenizer_of(processor) -> PreTrainedTokenizerBase:
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the model's generation config."""
    declared = model.generation_config.eos_token_id
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return list(dict.fromkeys([tokenizer.eos_token_id, *declared]))


class Generate:
    """Samples completions with ``model.generate``.

    ``engine(model, prompts, num_generations, temperature)`` returns a ``Rollout``; the completions of a prompt follow one
    another. Temperature 0 is greedy.
    """

    def __init__(self, model, processor, args: GRPOConfig):
        tokenizer = tokenizer_of(processor)
        self.eos = torch.tensor(eos_token_ids(model, tokenizer))
        options = {
            "max_new_tokens": args.max_completion_length,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": self.eos.tolist(),
            "use_cache": True,
            "disable_compile": True,
            **(args.generation_kwargs or {}),
        }
        options["suppress_tokens"] = [*media_token_ids(model.config, processor), *options.get("suppress_tokens", ())] or None
        self.options = options

    def _config(self, temperature: float) -> GenerationConfig:
        if temperature == 0:
            greedy = {k: v for k, v in self.options.items() if k not in ("top_p", "top_k", "min_p")}
            return GenerationConfig(**greedy, do_sample=False)
        return GenerationConfig(**self.options, do_sample=True, temperature=temperature)

    @torch.no_grad()
    def __call__(self, model, prompts: Batch, num_generations: int, temperature: float) -> Rollout:
        group = torch.arange(len(prompts)).repeat_interleave(num_generations)
        inputs = prompts.select(group).inputs
        sequences = model.generate(**inputs, generation_config=self._config(temperature))
        ids = sequences[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(ids, self.eos.to(ids.device))
        mask = ended.cumsum(1) - ended.int() == 0  # up to and with the first end-of-sequence token
        width = int(mask.any(0).sum())
        ids, mask, truncated = ids[:, :width], mask[:, :width], ~ended.any(1)
        return Rollout(prompts, group, ids.masked_fill(~mask, self.options["pad_token_id"]), mask, truncated)
