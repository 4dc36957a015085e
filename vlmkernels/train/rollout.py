"""Sampling completions: ``transformers``' ``generate`` behind one class."""

from dataclasses import dataclass

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, PreTrainedTokenizerBase

from vlmkernels.models.batch import Batch
from vlmkernels.models.families import media_token_ids
from vlmkernels.models.group import ScoringBatch, pack_groups, pad_completions, prompt_positions, why_not_shared
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

    def padded(self, samples: slice) -> ScoringBatch:
        """Some completions, each behind a prompt of its own, less common padding."""
        width = int(self.completion_mask[samples].any(0).sum())
        ids, mask = self.completion_ids[samples, :width], self.completion_mask[samples, :width]
        return pad_completions(self.prompts.select(self.group[samples]).trim().append(ids, mask).inputs, mask)

    def packed(self, samples: slice, model) -> ScoringBatch:
        """Some completions behind prompts that those of a group share; ``model`` knows the positions of images."""
        chosen, group = self.group[samples].unique_consecutive(return_inverse=True)
        prompts = self.prompts.select(chosen).inputs
        positions = prompt_positions(model, prompts)
        return pack_groups(prompts, positions, group, self.completion_ids[samples], self.completion_mask[samples])


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
        media = media_token_ids(model.config, processor)
        self.media = torch.tensor(media)
        self.shares_prefill = why_not_shared(model.get_base_model() if is_peft_model(model) else model) is None
        options["suppress_tokens"] = [*media, *options.get("suppress_tokens", ())] or None
        self.options = options

    def _config(self, temperature: float) -> GenerationConfig:
        if temperature == 0:
            greedy = {k: v for k, v in self.options.items() if k not in ("top_p", "top_k", "min_p")}
            return GenerationConfig(**greedy, do_sample=False)
        return GenerationConfig(**self.options, do_sample=True, temperature=temperature)

    def _prefilled(self, model, prompts: Batch, num_generations: int) -> dict:
        """Arguments of ``generate``: every prompt ``num_generations`` times, behind a cache that each prompt filled once.

        The cache holds all but the last token, so that ``generate`` goes on from there. Where that one stands for an image, or
        there is no other, or where prompt tokens see later ones (``why_not_shared``), each copy is filled by itself.
        """
        ids = prompts.inputs["input_ids"]
        if not self.shares_prefill or ids.shape[1] < 2 or torch.isin(ids[:, -1], self.media.to(ids.device)).any():
            return prompts.repeat(num_generations).inputs
        inner = (model.get_base_model() if is_peft_model(model) else model).base_model
        positions = prompt_positions(inner, prompts.inputs)
        head = {name: x[:, :-1] if prompts.family.axis(name) == "token" else x for name, x in prompts.inputs.items()}
        cache = model(**head, position_ids=positions[..., :-1], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(num_generations)
        if hasattr(inner, "rope_deltas"):
            # How far a prompt's positions are ahead of its tokens: where ``generate`` looks for it when it goes on.
            ahead = positions.view(-1, *ids.shape).amax((0, 2)) + 1 - prompts.inputs["attention_mask"].sum(1)
            inner.rope_deltas = ahead.repeat_interleave(num_generations).unsqueeze(1)
        repeated = {
            name: prompts.inputs[name].repeat_interleave(num_generations, 0) for name in ("input_ids", "attention_mask")
        }
        return {**repeated, "past_key_values": cache}

    @torch.no_grad()
    def __call__(self, model, prompts: Batch, num_generations: int, temperature: float) -> Rollout:
        group = torch.arange(len(prompts)).repeat_interleave(num_generations)
        inputs = self._prefilled(model, prompts, num_generations)
        sequences = model.generate(**inputs, generation_config=self._config(temperature))
        ids = sequences[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(ids, self.eos.to(ids.device))
        mask = ended.cumsum(1) - ended.int() == 0  # up to and with the first end-of-sequence token
        width = int(mask.any(0).sum())
        ids, mask, truncated = ids[:, :width], mask[:, :width], ~ended.any(1)
        return Rollout(prompts, group, ids.masked_fill(~mask, self.options["pad_token_id"]), mask, truncated)
