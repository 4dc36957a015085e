"""Models of transformers, run as its documentation shows: the plain way, with which a trainer can be compared."""

from collections.abc import Sequence
from typing import Any

import torch

from vlmkernels.conformance import Adapter, Documented, Sample, Sampled
from vlmkernels.conformance.models import captured_positions


def inputs_of(processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Return the inputs of the model for the prompts, padded on the left."""
    messages = [sample.messages for sample in samples]
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
    if hasattr(processor, "tokenizer"):
        options = {"processor_kwargs": options}
    options |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return dict(processor.apply_chat_template(messages, **options))


def with_completions(
    processor: Any, samples: Sequence[Sample], device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs of the model, with prompts padded on the left and completions on the right, and the completions."""
    inputs = {name: x.to(device) for name, x in inputs_of(processor, samples).items()}
    rows = [torch.tensor(sample.completion_ids, dtype=torch.int64, device=device) for sample in samples]
    completions = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    attended = torch.arange(completions.shape[1], device=device) < lengths[:, None]
    following = {"input_ids": completions, "attention_mask": attended.long()}
    for name, x in inputs.items():
        if x.shape == inputs["input_ids"].shape and name not in following:
            following[name] = torch.zeros_like(completions)
    return {**inputs, **{name: torch.cat([inputs[name], x], 1) for name, x in following.items()}}, completions


class Transformers(Adapter):
    name = "transformers"
    packages = ("transformers", "torch")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    models = ("text", "qwen2_5_vl", "llava")
    documented = (
        Documented(
            "sample/image-token",
            "generate samples any token, unless its caller passes suppress_tokens, which is None by default",
            "transformers, GenerationConfig.suppress_tokens",
        ),
    )

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (wide / temperature).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        return self.logps_from_logits(torch.nn.functional.linear(hidden, weight), targets, temperature)

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        inputs, completions = with_completions(processor, samples, model.device)
        count = completions.shape[1]
        logits = model(**inputs, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
        logps = self.logps_from_logits(logits, completions, temperature)
        return [row[: len(sample.completion_ids)] for row, sample in zip(logps, samples, strict=True)]

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return captured_positions(model, {**inputs, "use_cache": False})

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return inputs_of(processor, samples)

    def sample(
        self, model: Any, processor: Any, samples: Sequence[Sample], num_generations: int, max_tokens: int, temperature: float
    ) -> list[Sampled]:
        inputs = {name: x.to(model.device) for name, x in inputs_of(processor, samples).items()}
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        out = model.generate(**inputs, max_new_tokens=max_tokens, num_return_sequences=num_generations, **sampling)
        end = model.generation_config.eos_token_id
        rows = [row.tolist() for row in out[:, inputs["input_ids"].shape[1] :]]
        rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
        return [Sampled(row, row) for row in rows]
