"""TRL: its GRPO trainer, the trainers of ``trl.experimental`` with losses of the same kind, and TRL with our patch.

The trainers are constructed as in a training script, with tiny models where a method of the adapter gets no model. What the
suite provides (log-probabilities, rewards, completions) replaces one part of a trainer: the forward pass of the model, a reward
function, or the call that samples.
"""

import asyncio
import copy
import functools
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
import trl
from accelerate import Accelerator, PartialState
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer, DataCollatorForRollout
from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, _AsyncRolloutLoop
from trl.experimental.async_grpo.packing import TreeRow
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.sdpo import sdpo_trainer
from trl.trainer import grpo_trainer, rloo_trainer, utils

from vlmkernels.conformance import (
    Adapter,
    AdvantageBatch,
    Documented,
    GRPOLossConfig,
    LossBatch,
    NotApplicable,
    Sample,
    Sampled,
)
from vlmkernels.conformance.adapter import group_size
from vlmkernels.conformance.models import captured_positions
from vlmkernels.conformance.synthetic import binary_logits
from vlmkernels.integrations import trl as ours
from vlmkernels.integrations.trl.generation import grouped_generate

MEDIA = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "image_position_ids"),
    *("token_type_ids", "mm_token_type_ids"),
)
# The fields of GRPOLossConfig that GRPOConfig has under the same name.
SAME = (
    *("loss_type", "beta", "use_bias_correction_kl", "delta", "off_policy_mask_threshold", "top_entropy_quantile"),
    *("entropy_coef", "sapo_temperature_pos", "sapo_temperature_neg"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
)
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
FOLDER = os.path.join(tempfile.gettempdir(), "vlmkernels-conformance")  # output_dir is required; nothing is written


class OneProcess:
    """The accelerator of one process, which says that there are ``num_processes``. What a loss gathers is only logged."""

    def __init__(self, num_processes: int) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.num_processes = num_processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)


class Rewards:
    """A reward function that returns given rewards."""

    def __init__(self, rewards: Sequence[float] | None = None) -> None:
        self.rewards = rewards

    def __call__(self, completions: list, **_: Any) -> list[float | None]:
        rewards = [0.0] * len(completions) if self.rewards is None else self.rewards
        return [None if reward != reward else reward for reward in rewards]


@functools.cache
def stand_in() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Return a model and a tokenizer for the methods in which no model runs."""
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, hidden_size=4, intermediate_size=4, vocab_size=3))
    words = Tokenizer(WordLevel({"a": 0, "<end>": 1, "<pad>": 2}, unk_token="a"))
    return model, PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>", padding_side="left")


TRAINERS = {
    GMPOTrainer: (grpo_trainer, GMPOConfig),
    trl.GRPOTrainer: (grpo_trainer, trl.GRPOConfig),
    trl.RLOOTrainer: (rloo_trainer, trl.RLOOConfig),
}


def definition(cls: type) -> tuple[Any, type]:
    """Return the module that defines a trainer, and the class of its configuration."""
    return next(each for base, each in TRAINERS.items() if issubclass(cls, base))


def build(cls: type, model: Any, processor: Any, rewards: Sequence[Callable] = (Rewards(),), **options: Any) -> Any:
    """Return a trainer. It adds attributes to a shallow copy of the model, which has the parameters of the model."""
    module, config = definition(cls)
    defaults = {
        "output_dir": FOLDER, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "num_generations": 2,
        "per_device_train_batch_size": 2, "gradient_checkpointing": False, "num_generations_eval": 1,
    }  # fmt: skip
    with (
        redirect_stdout(None),
        mock.patch.object(module, "VLLMGeneration", mock.MagicMock()),
        # The reference model, which TRL loads from the path of the model.
        mock.patch.object(module, "create_model_from_path", side_effect=lambda *_, **__: copy.deepcopy(model)),
    ):
        trainer = cls(
            copy.copy(model),
            [*rewards],
            args=config(**defaults | options),
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            processing_class=processor,
        )
    trainer.model.training = False  # only of the copy: the trainer then makes one batch of the rows that it gets
    return trainer


class Recorded:
    """A part of a subclass of a trainer that keeps the log-probabilities."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.recorded.append(out[0])
        return out


def rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return the rows of a dataset with these prompts."""
    has_images = any(sample.images for sample in samples)
    images = [{"images": sample.pictures} if has_images else {} for sample in samples]
    return [{"prompt": [{"role": "user", "content": s.text}], **each} for s, each in zip(samples, images, strict=True)]


def completed(trainer: Any, ids: list[list[int]], prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the batch that the trainer makes of rows of a dataset if it samples completions with these ids."""
    trainer._generate_single_turn = lambda *_, **__: ids if isinstance(trainer, trl.RLOOTrainer) else (ids, None)
    return trainer._generate_and_score_completions(prompts)


def tokens(completion_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of a loss that only the model reads, with this mask."""
    mask = completion_mask.long()
    prompt = {"prompt_ids": torch.zeros_like(mask[:, :1]), "prompt_mask": torch.ones_like(mask[:, :1])}
    return prompt | {"completion_ids": torch.zeros_like(mask), "completion_mask": mask}


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return ids up to the first end token, with it."""
    return next((ids[: index + 1] for index, token in enumerate(ids) if token in ends), ids)


class _Trainer(Adapter):
    """The methods that GRPOTrainer and its relatives share."""

    packages = ("trl", "transformers", "torch")
    models = ("text", "qwen2_5_vl", "llava")
    several_rewards = unscored = True
    trainer: ClassVar[type]

    def build(self, *args: Any, **options: Any) -> Any:
        return build(self.trainer, *args, **options)

    def scaling(self, batch: AdvantageBatch) -> dict[str, Any]:
        """Return the options of the trainer for the scale and the baseline of a batch."""
        raise NotImplementedError

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        num_generations, size = group_size(batch), len(batch.rewards)
        if num_generations < 2:
            raise NotApplicable("num_generations must be at least 2")
        trainer = self.build(
            *stand_in(),
            [Rewards(column) for column in batch.rewards.T.tolist()],
            reward_weights=[*batch.weights],
            num_generations=num_generations,
            num_generations_eval=num_generations,
            per_device_train_batch_size=size,
            **self.scaling(batch),
        )
        return completed(trainer, [[0] for _ in range(size)], [{"prompt": "a"} for _ in range(size)])["advantages"]

    def logps(self, model: Any, processor: Any, samples: Sequence[Sample], temperature: float) -> list[torch.Tensor]:
        trainer = build(type("Trainer", (Recorded, self.trainer), {}), model, processor, temperature=temperature)
        batch = completed(trainer, [[*sample.completion_ids] for sample in samples], rows(samples))
        trainer.recorded.clear()
        trainer._compute_loss(trainer.model, batch)
        (logps,) = trainer.recorded
        return [row[: len(sample.completion_ids)] for row, sample in zip(logps, samples, strict=True)]

    def split(
        self, inputs: dict[str, torch.Tensor], num_images: Sequence[int], num_chunks: int
    ) -> list[dict[str, torch.Tensor]]:
        trainer = self.build(*stand_in(), steps_per_generation=num_chunks)
        trainer.model.training = True
        batch = {"input_ids": inputs["input_ids"], **inputs}  # the first entry must have a row per sample
        if "pixel_values" in batch:
            batch["num_images"] = [*num_images]
        trainer._generate_and_score_completions = lambda _: batch
        with mock.patch.object(definition(self.trainer)[0], "shuffle_sequence_dict", side_effect=lambda batch: batch):
            trainer._prepare_inputs(None)
        return [{name: x for name, x in chunk.items() if name in inputs} for chunk in trainer._buffered_inputs]

    def process(self, processor: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        model, _ = stand_in()
        model.config.image_token_id = getattr(processor, "image_token_id", None)
        trainer = self.build(model, processor)
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (torch.zeros(len(samples), 1), None, None)
        batch = completed(trainer, [[trainer.eos_token_ids[0]] for _ in samples], rows(samples))
        width = batch["prompt_ids"].shape[1]
        inputs = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
        inputs |= {name: batch[name] for name in MEDIA if isinstance(batch.get(name), torch.Tensor)}
        return inputs | {name: inputs[name][:, :width] for name in inputs if name.endswith("token_type_ids")}

    def sample(
        self, model: Any, processor: Any, samples: Sequence[Sample], num_generations: int, max_tokens: int, temperature: float
    ) -> list[Sampled]:
        trainer = self.build(
            *(model, processor), temperature=temperature, max_completion_length=max_tokens, num_generations_eval=num_generations
        )
        with self.generated(trainer) as generated:
            batch = trainer._generate_and_score_completions(rows([s for s in samples for _ in range(num_generations)]))
        (ids,) = generated
        width = batch["prompt_ids"].shape[1]
        sampled = [until_end(row, trainer.eos_token_ids) for row in ids[:, width:].tolist()]
        masks = batch["completion_mask"].bool()
        trained = [row[mask].tolist() for row, mask in zip(batch["completion_ids"], masks, strict=True)]
        return [Sampled(*each) for each in zip(sampled, trained, strict=True)]

    @contextmanager
    def generated(self, trainer: Any) -> Iterator[list[torch.Tensor]]:
        """Yield a list to which the results of ``model.generate`` are added."""
        original, results = trainer.model.generate, []

        def generate(*args: Any, **kwargs: Any) -> torch.Tensor:
            results.append(original(*args, **kwargs))
            return results[-1]

        trainer.model.generate = generate
        yield results


class _Positions(_Trainer):
    """Trainers that pass a padded batch to the model."""

    def positions(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        _, tokenizer = stand_in()
        trainer = self.build(model, tokenizer)
        images = inputs.get("image_grid_thw", inputs.get("pixel_values", ()))
        # All rows are one slice, so that only the sum of the numbers of images matters.
        num_images = [len(images)] + [0] * (len(inputs["input_ids"]) - 1)
        run = functools.partial(
            trainer._get_per_token_logps_and_entropies,
            trainer.model,
            logits_to_keep=1,
            num_images=num_images if len(images) else None,
        )
        return captured_positions(model, inputs, run)


LOCAL = Documented(
    ("loss/accumulation[bnpo*]", "loss/processes[bnpo*]"),
    "bnpo divides by the tokens of the local micro-batch",
    "trl.GRPOConfig, loss_type",
)


class _Objective(_Trainer):
    """``loss`` of GRPOTrainer and its subclasses."""

    options: ClassVar = {
        "delta": 1.5,
        "use_bias_correction_kl": True,
        "off_policy_mask_threshold": 0.25,
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.25,
    }
    masks = ("padding", "holes")
    documented = (LOCAL,)

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        trainer = objective(self, config)
        if batch.num_processes > 1 and config.top_entropy_quantile < 1:
            raise NotApplicable("the threshold of the entropies is computed from the tokens of all processes")
        mask = batch.loss_mask
        positions = torch.arange(mask.shape[1]).expand_as(mask)
        attended = positions <= (positions * mask).amax(1, keepdim=True)  # until the last token in the loss
        attended = attended & mask.any(1, keepdim=True)

        def scored(logps: torch.Tensor | None) -> torch.Tensor | None:
            return None if logps is None else logps.masked_fill(~attended, 0)  # as TRL returns them

        inputs = tokens(attended) | {"advantages": batch.advantages, "num_items_in_batch": torch.tensor(batch.tokens)}
        if not torch.equal(attended, mask):
            inputs["tool_mask"] = mask.long()
        if batch.old_logps is not None:
            inputs["old_per_token_logps"] = scored(batch.old_logps)
        if config.beta:
            inputs["ref_per_token_logps"] = scored(batch.ref_logps)
        if batch.rollout_logps is not None:
            inputs["sampling_per_token_logps"] = scored(batch.rollout_logps)
        if config.rollout_correction:
            old = scored(batch.known_old_logps)
            inputs["old_per_token_logps"] = old
            inputs["importance_sampling_ratio"] = rollout_ratio(trainer, old, inputs["sampling_per_token_logps"], mask)
        trainer._metrics["train"].clear()
        trainer.model.training = True
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = batch.accumulation_steps
        trainer.accelerator = OneProcess(batch.num_processes)
        return self.computed(trainer, inputs, scored(batch.logps), scored(batch.entropy))

    def computed(self, trainer: Any, inputs: dict[str, Any], logps: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
        entropy = torch.zeros_like(logps) if entropy is None else entropy
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropy, None)
        return trainer._compute_loss(trainer.model, inputs)

    def objective(self, config: GRPOLossConfig) -> Any:
        """Return a trainer with this objective."""
        if config.beta and config.kl_estimator != "k3":
            raise NotApplicable("the KL estimator is k3")
        if config.rollout_correction and config.rollout_sequence_ratio != "sum":
            raise NotApplicable("the ratio of a sequence is the product of the ratios of its tokens")
        options = {name: getattr(config, name) for name in SAME}
        return self.build(
            *stand_in(),
            **options,
            importance_sampling_level=config.level,
            epsilon=config.epsilon_low,
            epsilon_high=config.clip_high,
            max_completion_length=config.max_completion_length or 256,
            use_vllm=config.rollout_correction is not None,
            vllm_importance_sampling_mode=config.rollout_correction or "token_truncate",
            vllm_importance_sampling_clip_min=config.rollout_clip_min,
            vllm_importance_sampling_clip_max=config.rollout_clip_max,
        )


@functools.lru_cache(maxsize=1024)
def objective(adapter: _Objective, config: GRPOLossConfig) -> Any:
    """Return the trainer of an adapter with this objective. Construction takes longer than a loss."""
    return adapter.objective(config)


def rollout_ratio(trainer: Any, old: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the importance ratio that the trainer computes after sampling."""
    rows, width = mask.shape
    ids = [[0] * width for _ in range(rows)]
    generated = ([[0]] * rows, ids, mask.long().tolist(), [""] * rows, rollout.tolist(), {}, None, [])
    trainer.model.training = False
    trainer._generate = lambda _: generated
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (old, None, None)
    return trainer._generate_and_score_completions([{"prompt": "a"} for _ in ids])["importance_sampling_ratio"]


class TRL(_Objective, _Positions):
    name = "TRL"
    trainer = trl.GRPOTrainer
    dtypes = (torch.float32, torch.bfloat16)
    loss_types = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
    levels = ("token", "sequence")
    kl_estimators = ("k3",)
    corrections = CORRECTIONS
    scales = ("group", "batch", "none")

    def scaling(self, batch: AdvantageBatch) -> dict[str, Any]:
        if batch.baseline != "mean":
            raise NotApplicable("the baseline is the mean of the group")
        return {"scale_rewards": batch.scale}

    def logps_from_logits(self, logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        if not len(logits):
            raise NotApplicable("a batch has at least one completion")
        logps, _ = utils.selective_log_softmax_and_entropy(logits, targets, temperature=temperature)
        return logps

    def logps_from_hidden(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        args = hidden.flatten(0, 1), weight, None, targets.flatten(), temperature, chunk
        return utils._ChunkedLogProbFunction.apply(*args)[0].view_as(targets)


class TRLPatched(_Objective):
    """The subclass of GRPOTrainer with the methods that ``patch_trl`` puts into GRPOTrainer."""

    name = "TRL with vlmkernels"
    packages = ("vlmkernels", "trl", "transformers", "torch")
    trainer = ours.GRPOTrainer
    loss_types, levels, kl_estimators, corrections = TRL.loss_types, TRL.levels, TRL.kl_estimators, TRL.corrections
    scales, scaling = TRL.scales, TRL.scaling

    def objective(self, config: GRPOLossConfig) -> Any:
        if config.loss_type == "vespo" and config.level == "sequence":
            raise NotApplicable("the weight of vespo is per sequence already")
        return super().objective(config)

    def computed(self, trainer: Any, inputs: dict[str, Any], logps: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
        if entropy is not None:
            raise NotApplicable("the entropies are those of the logits, and are no input")

        def run(model: Any, micro: Any, function: Callable) -> tuple[Any, Any]:
            hidden = binary_logits(logps[micro.order][micro.mask])  # the logits, if the output head is the identity
            targets = torch.zeros(len(hidden), dtype=torch.int64)
            return function(hidden, torch.eye(2), targets, **trainer._scorer._arguments), {}

        trainer._scorer.run = run
        return trainer._compute_loss(trainer.model, inputs)

    @contextmanager
    def generated(self, trainer: Any) -> Iterator[list[torch.Tensor]]:
        results: list[torch.Tensor] = []

        def make(*args: Any) -> Callable[..., torch.Tensor]:
            generate = grouped_generate(*args)

            def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
                results.append(generate(*args, **kwargs))
                return results[-1]

            return recorded

        with mock.patch("vlmkernels.integrations.trl.grouped_generate", make):
            yield results


class TRLRLOO(_Positions):
    name = "TRL RLOOTrainer"
    trainer = trl.RLOOTrainer
    scales = ("none",)
    baselines = ("leave_one_out",)

    def scaling(self, batch: AdvantageBatch) -> dict[str, Any]:
        if (batch.scale, batch.baseline) != ("none", "leave_one_out"):
            raise NotApplicable("the baseline is that of RLOO, without a scale")
        return {"beta": 0.0}


class TRLGMPO(_Objective):
    """Only the loss differs from GRPOTrainer."""

    name = "TRL GMPOTrainer"
    trainer = GMPOTrainer
    levels = ("sequence",)
    kl_estimators = ("k3",)
    documented = (
        Documented(
            ("loss/value", "loss/gradient", "loss/long", "loss/extreme_ratios[*-clipped]", "loss/empty[*-one_*]"),
            "The log-ratio of each token is clipped, before the mean; epsilon bounds the log-ratio",
            "https://huggingface.co/docs/trl/gmpo",
        ),
    )
    options: ClassVar = {}
    advantages, logps, split, process, sample = (
        *(Adapter.advantages, Adapter.logps, Adapter.split, Adapter.process, Adapter.sample),
    )


class TRLAsyncGRPO(Adapter):
    """Its rollouts need vLLM and its attention a GPU; the packing, the loss and the advantages run here."""

    name = "TRL AsyncGRPOTrainer"
    packages = ("trl", "transformers", "torch")
    loss_types = ("bnpo",)
    masks = ("padding", "holes")
    unequal_groups = unscored = several_rewards = True
    advantage_eps = 1e-8
    advantage_ddof = 0

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        rows, width = batch.logps.shape
        ids = 1 + torch.arange(rows * (width + 1)).view(rows, width + 1)  # all different, so that no prefix is shared
        old = batch.known_old_logps
        row = TreeRow()
        for index in range(rows):
            sample = {
                "input_ids": ids[index],
                "completion_mask": torch.cat([torch.zeros(1, dtype=torch.bool), batch.loss_mask[index]]).long(),
                "old_log_probs": torch.cat([torch.zeros(1), old[index].float()]),
                "advantage": batch.advantages[index].item(),
                "group_id": 0,
                "metrics": {},
            }
            row.add(sample)
        inputs = DataCollatorForRollout(pad_token_id=0)([[row]])
        if batch.num_processes > 1:
            if batch.accumulation_steps > 1:
                raise NotApplicable("the number of tokens of this micro-batch in all processes is unknown")
            inputs["global_n_tokens"] = torch.tensor([float(batch.tokens)])

        def model(*, shift_labels: torch.Tensor, **_: Any) -> SimpleNamespace:
            values = torch.cat([batch.logps.new_zeros(rows, 1), batch.logps], 1).flatten()
            logps = values[(shift_labels - 1).clamp(min=0)]
            return SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps))

        trainer = SimpleNamespace(
            accelerator=OneProcess(batch.num_processes),
            aux_loss_enabled=False,
            current_gradient_accumulation_steps=batch.accumulation_steps,
            epsilon_low=config.epsilon_low,
            epsilon_high=config.clip_high,
            _metrics=defaultdict(lambda: defaultdict(list)),
            **dict.fromkeys(COUNTERS, 0),
        )
        return AsyncGRPOTrainer.compute_loss(trainer, model, inputs)

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        if set(batch.weights) != {1.0}:
            raise NotApplicable("rewards have no weights")
        PartialState(cpu=True)  # for its logger
        groups = [self.group(rewards) for rewards in batch.rewards.split([*batch.group_sizes])]
        return torch.tensor([sample.advantage for group in groups for sample in group])

    def group(self, rewards: torch.Tensor) -> list[Any]:
        """Return the samples of a group of completions with these rewards."""
        functions = [Rewards(column) for column in rewards.T.tolist()]
        worker = SimpleNamespace(
            reward_funcs=functions,
            reward_func_names=[f"reward{index}" for index in range(len(functions))],
            _env_reward_types=[],
            _provides_rollout_reward=False,
        )
        size = len(rewards)
        sequence = SimpleNamespace(input_ids=[0, 0], completion_mask=[0, 1], old_log_probs=[0.0, 0.0])
        per_completion = {name: [[]] * size for name in ("prompts", "completions", "completions_ids")}
        counts = {name: [0] * size for name in ("tool_call_counts", "tool_failure_counts")}
        others = {"reward_kwargs": {}, "model_version": 0, "group_id": 0, "env_rewards": [], "rollout_rewards": []}
        group = RolloutGroup(**per_completion, **counts, **others, completions_sequences=[[sequence]] * size)
        return asyncio.run(_AsyncRolloutLoop._score_group(worker, group))


COUNTERS = ("_step_forward_tokens", "_step_trained_tokens", "_step_seq_len_weighted", "_step_samples", "_step_forward_s")


class TRLSDPO(Adapter):
    """The policy loss of SDPOTrainer, with which it trains if distillation_weight is 0."""

    name = "TRL SDPOTrainer"
    packages = ("trl", "transformers", "torch")
    loss_types = ("grpo", "bnpo", "dr_grpo", "dapo")
    levels = ("token", "sequence")
    scales = ("group", "batch", "none")
    unscored = several_rewards = True
    documented = (replace(LOCAL, source="trl.experimental.sdpo.SDPOConfig, loss_type"),)

    def loss(self, batch: LossBatch, config: GRPOLossConfig) -> torch.Tensor:
        if not batch.logps[~batch.loss_mask].isfinite().all():
            raise NotApplicable("log-probabilities of padding are those of the model, and finite")
        trainer = SimpleNamespace(
            args=SimpleNamespace(distillation_weight=0.0),
            accelerator=OneProcess(batch.num_processes),
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=batch.accumulation_steps,
            importance_sampling_level=config.level,
            epsilon_low=config.epsilon_low,
            epsilon_high=config.clip_high,
            loss_type=config.loss_type,
            max_completion_length=config.max_completion_length,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _forward_logits=lambda **_: None,
        )
        trainer._compute_policy_loss = functools.partial(sdpo_trainer.SDPOTrainer._compute_policy_loss, trainer)
        inputs = tokens(batch.loss_mask) | {"advantages": batch.advantages, "old_per_token_logps": batch.old_logps}
        with mock.patch.object(sdpo_trainer, "selective_log_softmax", return_value=batch.logps):
            return sdpo_trainer.SDPOTrainer.compute_loss(trainer, None, inputs)

    def advantages(self, batch: AdvantageBatch) -> torch.Tensor:
        if batch.baseline != "mean":
            raise NotApplicable("the baseline is the mean of the group")
        size = len(batch.rewards)
        trainer = mock.MagicMock()
        trainer.accelerator = OneProcess(1)
        trainer.model.training = True
        trainer.num_generations = group_size(batch)
        trainer.scale_rewards = batch.scale
        trainer.reward_weights = torch.tensor(batch.weights)
        trainer.sample_rollouts.return_value = tokens(torch.ones(size, 1))
        trainer.reward_funcs = [Rewards(column) for column in batch.rewards.T.tolist()]
        trainer.reward_processing_classes = [None] * len(trainer.reward_funcs)
        trainer.teacher_context_builder.last_metrics = {}
        trainer._calculate_rewards = functools.partial(sdpo_trainer.SDPOTrainer._calculate_rewards, trainer)
        prepare = sdpo_trainer.SDPOTrainer._prepare_training_batch
        return prepare(trainer, [{"prompt": "a"} for _ in range(size)])["advantages"]
