"""A fixed prompt whose log-probabilities show whether vLLM has the trainer's weights and image processor."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from vlmkernels.data.samples import Sample, encode, read_sample
from vlmkernels.models.families import TEXT, family_of
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.rollout.base import Rollout

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}
"""Default bound of ``relative_difference``, by the dtype that vLLM runs in."""


@dataclass(frozen=True)
class Fingerprint:
    """A fixed prompt, with an image if the model takes images, and the 16 tokens after it.

    Args:
        sample: the prompt.
        prompt: the encoded prompt.
        tokens: ids of the tokens after the prompt, spread over the vocabulary.
    """

    sample: Sample
    prompt: ModelInputs
    tokens: list[int]

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, processor: Any, banned: list[int], chat_template_kwargs: dict[str, Any]
    ) -> "Fingerprint":
        """Build the fingerprint of a model. ``banned`` tokens are not among its 16 tokens."""
        family = family_of(model.config)
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": "what is in the image?"}]}
        if family is not TEXT:
            # Noise at two scales, in a size that the processor must change: the result depends on its resize and normalization.
            rng = torch.Generator().manual_seed(0)
            coarse, fine = (torch.randint(0, 256, (h, w, 3), generator=rng).byte() for h, w in ((9, 13), (180, 260)))
            pixels = (coarse.repeat_interleave(20, 0).repeat_interleave(20, 1) // 2 + fine // 2).numpy()
            row["images"] = [Image.fromarray(pixels)]
        sample = read_sample(row, 0)
        size = model.config.get_text_config().vocab_size
        allowed = sorted({*range(size)} - {*banned})
        tokens = [allowed[place] for place in torch.linspace(0, len(allowed) - 1, 16).long().tolist()]
        return cls(sample, encode([sample], processor, family, chat_template_kwargs), tokens)

    @torch.no_grad()
    def logps(self, model: PreTrainedModel) -> list[float]:
        """Return the log-probabilities of the tokens under the trainer's model at temperature 1."""
        training = model.training
        model.eval()
        head = output_head(model)
        ids = torch.tensor([self.tokens], device=head.weight.device)
        prompts, mask = self.prompt.to(ids.device), torch.ones_like(ids, dtype=torch.bool)
        rollout = Rollout(prompts, torch.zeros(1, dtype=torch.int64), ids, mask, mask[:, 0])
        try:
            batch = rollout.padded(torch.arange(1))
            options = {"head": head, "arguments": logit_arguments(model, head), "temperature": 1.0}
            return completion_logps(model, batch, **options).tolist()
        finally:
            model.train(training)


def relative_difference(first: list[float], second: list[float]) -> float:
    """Return mean |first - second| / mean (1 + |first|) of log-probabilities; infinity if one is not finite."""
    pairs = list(zip(first, second, strict=True))
    relative = sum(abs(a - b) for a, b in pairs) / sum(1 + abs(a) for a, _ in pairs)
    return relative if math.isfinite(relative) else math.inf
