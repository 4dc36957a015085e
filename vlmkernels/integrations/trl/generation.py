"""``generate`` where TRL calls it: by ``decode_groups``, each prompt run and kept once for all its completions."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from vlmkernels.integrations.trl.scoring import base_of
from vlmkernels.rollout.decode import Sampling, decode_groups

logger = logging.get_logger(__name__)

# What a generation configuration may hold beside the fields of Sampling: what is read here or changes nothing, and values that
# switch a feature off, as falsy ones do.
_READ = {
    "do_sample",
    "bos_token_id",
    "max_length",
    "use_cache",
    "disable_compile",
    "transformers_version",
    "_from_model_config",
}
_OFF = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "length_penalty"), 1.0),
}


def _sampling(config: GenerationConfig, of_model: GenerationConfig) -> Sampling | str:
    """What ``generate`` is asked for: by ``config`` and, where it says nothing, by the model's own; or why not."""
    given = {**of_model.to_diff_dict(), **config.to_diff_dict()}
    given = {name: value for name, value in given.items() if value and value != _OFF.get(name)}
    if others := sorted(given.keys() - (Sampling.names() - {"stop_strings"}) - _READ):
        return f"its generation configuration holds {', '.join(others)}"
    if not given.get("do_sample"):
        given["temperature"] = 0.0
    eos = config.eos_token_id
    given |= {"pad_token_id": config.pad_token_id, "eos_token_id": [eos] if isinstance(eos, int) else eos}
    return Sampling(**{name: value for name, value in given.items() if name in Sampling.names()})


def generate_of(scoring, model: torch.nn.Module, num_images: list[int] | None, reason: str | None) -> Callable:
    """``model.generate``, by groups where rows of its prompts are the same, one behind another and equally many of each.

    reason: why not by groups, where that is known.
    """
    generate = model.generate

    def by_groups(*, generation_config: GenerationConfig, **inputs) -> torch.Tensor:
        sampling = reason or _sampling(generation_config, model.generation_config)
        if isinstance(sampling, Sampling):
            prompts, group = scoring.groups(base_of(model), inputs, num_images)
            sizes = group.bincount()
            if not torch.equal(group, torch.arange(len(sizes)).repeat_interleave(sizes[0])):
                sampling = "its completions are not equally many per prompt in this process"
        if isinstance(sampling, str):
            logger.warning_once(f"Each completion is generated behind a copy of its prompt and images: {sampling}")
            return generate(**inputs, generation_config=generation_config)
        decoded = decode_groups(model, prompts, int(sizes[0]), sampling, as_generate=True)
        return torch.cat([inputs["input_ids"], decoded.ids], 1)

    return by_groups
