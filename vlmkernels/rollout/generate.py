"""Sampling completions: a batch of them as the trainer holds it, and the engine that makes it."""

from dataclasses import dataclass

import torch
from accelerate.utils import is_peft_model
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from vlmkernels.models.attention import use_group_attention
from vlmkernels.models.families import media_token_ids
from vlmkernels.models.group import ScoringBatch, cut_packs, pack_groups, pad_completions, prompt_positions, why_not_shared
from vlmkernels.models.image_features import once_per_image, takes_features
from vlmkernels.models.inputs import Batch
from vlmkernels.ops.checks import require
from vlmkernels.rollout.decode import Decoded, Sampling, decode_groups, stops

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Rollout:
    """B completions of P prompts.

    prompts: the P prompts, each once. group: (B,) int64 on the CPU, the prompt of each completion.
    completion_ids: (B, C), right-padded. completion_mask: (B, C) bool, up to and with the end-of-sequence token.
    truncated: (B,) bool, no end within the length allowed. logps, log_kept_mass: (B, C) fp32, of the tokens as they were
    sampled (see ``Decoded``), where the engine tells them; NaN for a token that it does not tell them of.
    """

    prompts: Batch
    group: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    truncated: torch.Tensor
    logps: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None

    def parts(self, samples: slice, max_tokens: int | None, *, shared: bool, hidden_size: int) -> list[torch.Tensor]:
        """Some completions, cut so that ``packed`` (or ``padded``) makes at most ``max_tokens`` tokens of each part."""
        chosen = torch.arange(len(self.group))[samples]
        if max_tokens is None:
            return [chosen]
        prefixes = self.prompts.inputs["attention_mask"].sum(1).tolist()
        group, lengths = self.group[samples].tolist(), self.completion_mask[samples].sum(1).tolist()
        if shared:
            return [chosen[pack] for pack in cut_packs(prefixes, group, lengths, max_tokens, hidden_size)]
        prefix, length = max(prefixes[index] for index in group), max(lengths)
        rule = f"be at least {prefix + length}, a prompt of {prefix} tokens and a completion of {length}"
        require(prefix + length <= max_tokens, "max_tokens_per_microbatch", rule, max_tokens)
        return list(chosen.tensor_split(-(-len(chosen) // (max_tokens // (prefix + length)))))

    def padded(self, samples: torch.Tensor) -> ScoringBatch:
        """Some completions, each behind a prompt of its own, less common padding."""
        width = int(self.completion_mask[samples].any(0).sum())
        ids, mask = self.completion_ids[samples, :width], self.completion_mask[samples, :width]
        return pad_completions(self.prompts.select(self.group[samples]).trim().append(ids, mask).inputs, mask)

    def packed(self, samples: torch.Tensor, model) -> ScoringBatch:
        """Some completions behind prompts that those of a group share; ``model`` knows the positions of images."""
        chosen, group = self.group[samples].unique_consecutive(return_inverse=True)
        prompts = self.prompts.select(chosen)
        positions = prompt_positions(model, prompts.inputs)
        inputs = once_per_image(prompts) if takes_features(model) else prompts.inputs
        return pack_groups(inputs, positions, group, self.completion_ids[samples], self.completion_mask[samples])


def tokenizer_of(processor) -> PreTrainedTokenizerBase:
    return processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the model's generation config."""
    declared = model.generation_config.eos_token_id
    declared = [declared] if declared is None or isinstance(declared, int) else declared
    found = [token for token in dict.fromkeys([tokenizer.eos_token_id, *declared]) if token is not None]
    require(bool(found), "eos_token_id", "be one of the tokenizer's or of the model's generation config", None)
    return found


class Generate:
    """Samples completions: with ``decode_groups``, each prompt run and kept once, where the model and all options allow it;
    otherwise with ``model.generate`` on a copy of the prompt for each completion, saying so once.

    ``engine(model, prompts, num_generations, temperature)`` returns a ``Rollout``; the completions of a prompt follow one
    another. Temperature 0 is greedy. Of the model's own generation config the tokens that end a completion count, no more.
    ``uniform``: see ``decode_groups``.
    """

    def __init__(self, model, processor, args):
        self.tokenizer = tokenizer_of(processor)
        given = {name: value for name, value in (args.generation_kwargs or {}).items() if value is not None}
        eos = given.pop("eos_token_id") if "eos_token_id" in given else eos_token_ids(model, self.tokenizer)
        self.eos = [eos] if isinstance(eos, int) else list(eos)
        self.limits = {"max_num_seqs": args.max_num_seqs, "max_tokens": args.max_tokens_per_microbatch}
        self.options = {
            "max_new_tokens": args.max_completion_length,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.eos,
            **given,
        }
        media = media_token_ids(model.config, processor)
        self.options["suppress_tokens"] = [*media, *(self.options.get("suppress_tokens") or ())]
        Sampling(**{name: value for name, value in self.options.items() if name in Sampling.names()})  # refuses bad values now
        plain = model.get_base_model() if is_peft_model(model) else model
        reason = "share_prefix is off" if args.share_prefix is False else why_not_shared(plain)
        if others := sorted(self.options.keys() - Sampling.names()):
            reason = reason or f"generation_kwargs holds {', '.join(others)}"
        self.by_groups = reason is None
        rule = f"be None where generate samples, which tells no log-probabilities: {reason}"
        require(self.by_groups or args.rollout_correction is None, "rollout_correction", rule, repr(args.rollout_correction))
        if self.by_groups:
            use_group_attention(plain)
        else:
            logger.warning("Each completion is generated behind a copy of its prompt and images: %s", reason)

    def _config(self, temperature: float) -> GenerationConfig:
        options = self.options | {"bos_token_id": self.tokenizer.bos_token_id, "use_cache": True, "disable_compile": True}
        options["suppress_tokens"] = options["suppress_tokens"] or None
        if temperature == 0:
            greedy = {k: v for k, v in options.items() if k not in ("top_p", "top_k", "min_p")}
            return GenerationConfig(**greedy, do_sample=False)
        return GenerationConfig(**options, do_sample=True, temperature=temperature)

    def _generated(self, model, prompts: Batch, num_generations: int, temperature: float) -> Decoded:
        inputs = prompts.repeat(num_generations).inputs
        stop_strings = self.options.get("stop_strings") or ()
        more = {"tokenizer": self.tokenizer} if stop_strings else {}
        plain = model.get_base_model() if is_peft_model(model) else model
        declared, plain.generation_config = (
            plain.generation_config,
            GenerationConfig(),
        )  # it would fill in what ours leaves open
        try:
            sequences = model.generate(**inputs, generation_config=self._config(temperature), **more)
        finally:
            plain.generation_config = declared
        ids = sequences[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(ids, torch.tensor(self.eos, device=ids.device))
        for row, tokens in enumerate(ids.tolist() if stop_strings else ()):
            end = next((n for n in range(1, len(tokens) + 1) if stops(tokens[:n], stop_strings, self.tokenizer)), None)
            if end is not None:
                ended[row, end - 1] = True
        mask = ended.cumsum(1) - ended.int() == 0  # up to and with the token that ends it
        width = int(mask.any(0).sum())
        ids, mask, truncated = ids[:, :width], mask[:, :width], ~ended.any(1)
        return Decoded(ids.masked_fill(~mask, self.options["pad_token_id"]), mask, truncated)

    @torch.no_grad()
    def __call__(
        self, model, prompts: Batch, num_generations: int, temperature: float, uniform: torch.Tensor | None = None
    ) -> Rollout:
        require(uniform is None or self.by_groups, "uniform", "be None where generate samples", "a tensor")
        if self.by_groups:
            sampling = Sampling(**self.options | {"temperature": temperature})
            options = {"tokenizer": self.tokenizer, "uniform": uniform, **self.limits}
            decoded = decode_groups(model, prompts, num_generations, sampling, **options)
        else:
            decoded = self._generated(model, prompts, num_generations, temperature)
        group = torch.arange(len(prompts)).repeat_interleave(num_generations)
        return Rollout(prompts, group, *decoded)
