"""Unsloth: its loss of GRPO, its log-probabilities, and how it cuts images of a batch. Advantages are those of TRL."""

import os
import tempfile
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from trl import GRPOTrainer

from vlmkernels.conformance import Adapter, Documented, GRPOLossConfig, LossBatch, NotApplicable, Sample, pad
from vlmkernels.conformance.models import encode

# Unsloth asks for its other package, whose import needs a GPU. Compiled functions would take minutes on a CPU.
_SETTINGS = {
    "UNSLOTH_IS_PRESENT": "1",
    "UNSLOTH_COMPILE_DISABLE": "1",
    "UNSLOTH_COMPILE_LOCATION": os.path.join(tempfile.gettempdir(), "unsloth_compiled_cache"),
}
# The code for shared prompts is in the other package, and so are the models for images that find the samples of a pack.
_FORWARD = {"UNSLOTH_GRPO_PREFIX_GROUPER": "0"}
_WITHOUT_PACKS = {"UNSLOTH_GRPO_SEQ_PACKING": "0"}
with mock.patch.dict(os.environ, _SETTINGS):
    from unsloth_zoo import rl_replacements as unsloth


class Unsloth(Adapter):
    name = "Unsloth"
    packages = ("unsloth_zoo", "trl")
    dtypes = (torch.float32, torch.bfloat16)
    loss_types = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
    levels = ("token", "sequence")
    kl_estimators = ("k3",)
    corrections = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    options: ClassVar = {
        "delta": 4.0,
        "use_bias_correction_kl": True,
        "off_policy_mask_threshold": 0.5,
        "top_entropy_quantile": 0.5,
        "rollout_sequence_ratio": "mean",
        "rollout_clip_min": 0.5,
        "sapo_temperature_neg": 2.0,
    }
    masks = ("padding", "holes", "nonfinite")
    models = ("text", "qwen2_5_vl", "llava")
    documented = (
        Documented(
            ("loss/accumulation[bnpo-*]", "loss/processes[bnpo-*]"),
            "bnpo is normalized by the tokens of the micro-batch",
            "comment in unsloth_zoo/rl_replacements.py, line 1227",
        ),
    )

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        settings = _settings(batch, config)
        sampled = batch.rollout_logps if "vllm_importance_sampling_mode" in settings or _masks(config) else None
        ids = torch.zeros_like(batch.logps, dtype=torch.long)
        with torch.compiler.set_stance("force_eager"):
            out = unsloth.UnslothEfficientGRPO.apply(
                *(batch.logps, batch.old_logps, batch.ref_logps if config.beta else None, sampled),
                *(None, ids, batch.loss_mask.int(), batch.advantages),
                *(config.beta, None, 1, settings),
                1.0,  # as with DeepSpeed: otherwise the gradient ignores factors that are applied to the loss
            )
        return out[0]

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        return unsloth.chunked_selective_log_softmax(logits, targets, temperature=temperature)

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        return unsloth.grpo_chunked_hidden_states_logprobs(hidden, weight, targets, temperature=temperature)

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        inputs = encode(processor, samples)
        tokenizer = getattr(processor, "tokenizer", processor)
        processor.pad_token_id = tokenizer.pad_token_id  # of processors, Unsloth reads it from there as well
        completions = [torch.tensor(sample.completion_ids) for sample in samples]
        ids = pad(completions, tokenizer.pad_token_id)
        mask = pad([torch.ones_like(row) for row in completions])
        vision = {name: inputs.get(name) for name in ("pixel_values", "image_grid_thw")}
        if "mm_token_type_ids" in inputs and vision["pixel_values"] is not None:
            vision["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], 0 * ids], 1)
        settings = _FORWARD | (_WITHOUT_PACKS if hasattr(model.config, "vision_config") else {})
        with mock.patch.dict(os.environ, settings), mock.patch.object(unsloth, "UnslothEfficientGRPO", _Captured):
            try:
                unsloth.grpo_accumulated_loss(
                    _trainer(model, processor),
                    torch.cat([inputs["input_ids"], ids], 1),
                    torch.cat([inputs["attention_mask"], mask], 1),
                    ids.shape[1],
                    mask,
                    torch.zeros(len(samples)),
                    None,
                    None,
                    temperature=temperature,
                    num_images=[len(sample.images) for sample in samples],
                    **vision,
                )
            except _Captured as captured:
                logps, kept = captured.args
        # Unsloth may shift a row to the right. It moves pad tokens to the end, where they have no log-probability: here 0.
        starts = kept.int().argmax(1).tolist()
        return [row[start:][: len(ids)] for row, start, ids in zip(logps * kept, starts, completions, strict=True)]

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        count = len(num_images) // num_chunks
        vision = unsloth.grpo_shared_vision_inputs({**inputs, "num_images": [*num_images]})
        parts = unsloth.grpo_vision_chunks(vision, len(num_images), count)
        texts = {name: inputs[name].split(count) for name in ("input_ids", "attention_mask")}
        return [{**{name: rows[index] for name, rows in texts.items()}, **part} for index, part in enumerate(parts)]


class _Captured(Exception):
    """Takes the place of the loss, and raises itself with the log-probabilities and the mask."""

    @classmethod
    def apply(cls, *arguments: Any) -> None:
        raise cls(arguments[0], arguments[6])


def _trainer(model: Any, processor: Any) -> Any:
    """Return what Unsloth reads from the trainer of TRL to run the model: two mini-batches, no autocast."""
    arguments = {"unsloth_grpo_mini_batch": 2, "unsloth_logit_chunk_multiplier": None, "top_entropy_quantile": 1.0}
    return SimpleNamespace(
        model=model,
        processing_class=processor,
        args=SimpleNamespace(**arguments, steps_per_generation=1),
        accelerator=SimpleNamespace(unwrap_model=lambda model, **_: model, scaler=None, num_processes=1),
        use_vllm=False,
        beta=0.0,
        _autocast_dtype=None,
    )


def _masks(config: GRPOLossConfig) -> bool:
    return config.off_policy_mask_threshold is not None


def _off_policy_mask(**arguments: Any) -> torch.Tensor:
    return GRPOTrainer.get_off_policy_mask(**arguments)


def _settings(batch: LossBatch, config: GRPOLossConfig) -> dict[str, Any]:
    """Return the arguments of Unsloth's loss, which it reads from the trainer of TRL."""
    if config.entropy_coef:
        raise NotApplicable("the entropy bonus is no part of this function")
    out: dict[str, Any] = {
        "loss_type": config.loss_type,
        "importance_sampling_level": config.level,
        "epsilon_low": config.epsilon_low,
        "epsilon_high": config.clip_high,
        "delta": config.delta,
        "max_completion_length": config.max_completion_length,
        "use_bias_correction_kl": config.use_bias_correction_kl,
        "num_items_in_batch": batch.tokens,
        "current_gradient_accumulation_steps": batch.accumulation_steps,
        "steps_per_generation": batch.accumulation_steps,  # the tokens are those of one step of the optimizer
        "num_processes": batch.num_processes,
        "get_gamma_weights": GRPOTrainer.get_gamma_weights,
    }
    names = [name for name in GRPOLossConfig.__dataclass_fields__ if name.startswith(("sapo_", "vespo_"))]
    out |= {name: getattr(config, name) for name in names}
    if _masks(config):
        out |= {"off_policy_mask_threshold": config.off_policy_mask_threshold, "get_off_policy_mask": _off_policy_mask}
    if config.top_entropy_quantile < 1:
        accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, pad_across_processes=lambda x, **_: x)
        trainer = SimpleNamespace(accelerator=accelerator)
        trainer.get_high_entropy_mask = lambda *args: GRPOTrainer.get_high_entropy_mask(trainer, *args)
        out["entropy_mask"] = unsloth.grpo_high_entropy_mask(
            trainer, batch.entropy, batch.loss_mask, 1 - config.top_entropy_quantile
        )
    if config.rollout_correction:
        if batch.old_logps is None:
            raise NotApplicable("TRL and Unsloth compute old log-probabilities whenever a rollout correction is on")
        mode = config.rollout_correction
        if config.rollout_sequence_ratio == "mean":
            mode = mode.replace("sequence", "geometric")
        out |= {
            "use_vllm": True,
            "vllm_importance_sampling_correction": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_min": config.rollout_clip_min,
            "vllm_importance_sampling_clip_max": config.rollout_clip_max,
        }
    return out
