"""``grouped_generate``: replaces ``model.generate`` in TRL's trainers by a decoder that runs each prompt once."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from vlmkernels.integrations.trl.scoring import Scorer
from vlmkernels.integrations.trl.sequences import Sequences
from vlmkernels.models.loading import base_model, sampling_override
from vlmkernels.rollout.base import Sampling, pad_token_ids

logger = logging.get_logger(__name__)

# Fields of a generation configuration that are handled here or have no effect, besides the fields of Sampling.
_READ = {
    "do_sample",
    "bos_token_id",
    "max_length",
    "use_cache",
    "disable_compile",
    "transformers_version",
    "_from_model_config",
}
# Values that disable a feature. A falsy value disables it too.
_OFF = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "length_penalty"), 1.0),
}


def _suppress(missing: list[int], config: GenerationConfig, model_config: GenerationConfig) -> GenerationConfig:
    """Return ``config`` with ids without a token among ``suppress_tokens``, except those that end a completion."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    banned = [token for token in missing if token not in eos]
    if not banned:
        return config
    config = copy.deepcopy(config)
    config.suppress_tokens = [*(config.suppress_tokens or model_config.suppress_tokens or ()), *banned]
    return config


def _sampling(config: GenerationConfig, model_config: GenerationConfig) -> Sampling | str:
    """Return ``config``, with the defaults of ``model_config``, as ``Sampling``, or the reason why it is not supported."""
    given = {**model_config.to_diff_dict(), **config.to_diff_dict()}
    given = {name: value for name, value in given.items() if value and value != _OFF.get(name)}
    if others := sorted(given.keys() - (Sampling.names() - {"stop_strings"}) - _READ):
        return f"the generation configuration sets {', '.join(others)}"
    if not given.get("do_sample"):
        given["temperature"] = 0.0
    eos = config.eos_token_id
    given |= {"pad_token_id": config.pad_token_id, "eos_token_id": [eos] if isinstance(eos, int) else eos}
    return Sampling(**{name: value for name, value in given.items() if name in Sampling.names()})


def sampling_unsupported(trainer: Any, model: torch.nn.Module) -> str | None:
    """Return why a TRL trainer must sample with ``model.generate``, or None. ``model`` is its policy, unwrapped."""
    if trainer.is_fsdp_enabled:
        return "under FSDP2 every rank must run the model the same number of times"
    if reason := sampling_override(model):
        return reason
    sampling = _sampling(trainer.generation_config, model.generation_config)
    return sampling if isinstance(sampling, str) else None


def grouped_generate(
    scorer: Scorer, model: torch.nn.Module, num_images: list[int] | None, unsupported: str | None
) -> Callable[..., torch.Tensor]:
    """Return a function that replaces ``model.generate`` and runs each prompt once for all its completions.

    If that is not possible, it calls ``model.generate``, and logs a warning with the reason unless it is
    ``scorer.sampling_reason``, which the trainer has reported.

    Args:
        scorer: the scorer of the trainer.
        model: the policy.
        num_images: the number of images of each row, or None without images.
        unsupported: from ``sampling_unsupported``.
    """
    generate = model.generate

    def decode(*, generation_config: GenerationConfig, **inputs: torch.Tensor) -> torch.Tensor:
        generation_config = _suppress(scorer.missing_tokens, generation_config, model.generation_config)
        sampling = unsupported or _sampling(generation_config, model.generation_config)
        if isinstance(sampling, str):
            if sampling != scorer.sampling_reason:
                logger.warning_once(f"Prefix sharing: disabled in sampling ({sampling})")
            return generate(**inputs, generation_config=generation_config)
        base, tokens = base_model(model), None
        if scorer.sequences is not None:
            tokens = scorer.sequences.resume(scorer.rows(inputs, num_images), partial(scorer.encoded, base))
            if tokens is None:
                logger.warning_once(
                    "Prefix sharing: earlier turns run again in sampling, because the prompts do not continue them"
                )
        if tokens is None:
            prompts, group = scorer.groups(base, inputs, num_images)
            sequences = Sequences(model, prompts, group.tolist(), sampling, keep=scorer.has_tools)
            scorer.sequences = sequences if scorer.has_tools else None
            tokens = sequences.begin()
        ids, _ = pad_token_ids(tokens, sampling.pad_token_id)
        return torch.cat([inputs["input_ids"], ids.to(inputs["input_ids"])], 1)

    return decode
