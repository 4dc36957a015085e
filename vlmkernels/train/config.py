"""The configuration of GRPO training: TRL's field names, on top of ``transformers.TrainingArguments``."""

import json
import math
import os
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, get_args

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from vlmkernels.data.images import ImageLimits
from vlmkernels.data.resolution import ResolutionSchedule
from vlmkernels.models.masked_images import MASK_RATIO, check_mask_ratio
from vlmkernels.models.quantized import json_values, quantized_arguments
from vlmkernels.ops.checks import did_you_mean, require_number, require_one_of
from vlmkernels.ops.group_advantages import SCALES
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import PERCEPTION_WEIGHTS, PRESETS
from vlmkernels.ops.linear_kl.check import check_beta
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.make import engine_name
from vlmkernels.rollout.vllm.config import MAX_TEMPERATURE, VLLMConfig, check_sampling
from vlmkernels.tools.options import ToolOptions
from vlmkernels.train.optimizers import check_optimizer

_NUMBERS = {int: ("be an integer", Integral), float: ("be a number", Real)}
_BATCHES = {"per_device_train_batch_size": int, "gradient_accumulation_steps": int}  # fields of TrainingArguments
_COUNTS = (
    "num_generations", "num_generations_eval", "max_completion_length", "num_iterations", "max_prompt_length", "max_num_seqs",
    "max_tokens_per_microbatch", "generation_batch_size", "steps_per_generation", "max_resample_times", "image_use_steps",
    "distillation_top_k",
)  # fmt: skip
_CHOICES = {
    "scale_rewards": SCALES,
    "rollout_policy": ("truncated", "full"),
    **dict.fromkeys(("on_save_error", "on_bad_sample", "on_nonfinite"), ("raise", "skip")),
}
_JSON_OBJECTS = ("model_init_kwargs", "teacher_model_init_kwargs", "generation_kwargs", "chat_template_kwargs")

# Fields of trl.GRPOConfig, of this and of earlier versions, that GRPOConfig does not have, and what serves instead.
_CORRECTION = "use rollout_correction, rollout_clip_min and rollout_clip_max (docs/mismatch.md)"
_SERVER = "use vllm_server_base_url, the URL of the server"
_ENTROPY = "use entropy_coef, which is constant"
_REFERENCE = "the reference is fixed; to move it, start another run from a checkpoint"
TRL_FIELDS = {
    "trust_remote_code": "use model_init_kwargs={'trust_remote_code': True}",
    "router_aux_loss_coef": "there is no auxiliary loss of routers",
    "cast_lm_head_to_fp32": "log-probabilities are always accumulated in float32",
    "ds3_gather_for_generation": "ZeRO-3 always gathers the weights for sampling",
    "pad_to_multiple_of": "batches need no padding to a multiple",
    "cache_implementation": "the engine has its own cache of keys and values",
    "vllm_model_impl": "give the option to `vllm serve`, and use vllm_mode='server'",
    "vllm_tensor_parallel_size": "give the option to `vllm serve`, and use vllm_mode='server'",
    "vllm_enable_sleep_mode": "use vllm_gpu_memory_utilization, or vllm_mode='server'",
    "vllm_structured_outputs_regex": "completions are sampled without a grammar",
    "vllm_guided_decoding_regex": "completions are sampled without a grammar",
    "vllm_server_host": _SERVER,
    "vllm_server_port": _SERVER,
    "vllm_group_port": "a free port is chosen where weights go to the server by NCCL",
    "vllm_max_model_len": "use vllm_max_model_length",
    "multi_objective_aggregation": "rewards are summed with reward_weights, then normalized",
    "sync_ref_model": _REFERENCE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "use_adaptive_entropy": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
    "vllm_importance_sampling_correction": _CORRECTION,
    "vllm_importance_sampling_mode": _CORRECTION,
    "vllm_importance_sampling_clip_max": _CORRECTION,
    "vllm_importance_sampling_clip_min": _CORRECTION,
    "vllm_importance_sampling_cap": _CORRECTION,
    "log_multimodal": "use log_completions, which stores images too",
    "log_unique_prompts": "use log_completions, which stores a prompt once per group",
    "wandb_log_unique_prompts": "use log_completions, which stores a prompt once per group",
    "log_completions_hub_repo": "use log_completions, and upload the folder completions",
    "use_transformers_continuous_batching": "use max_num_seqs, which replaces completions that have ended by new ones",
    "transformers_continuous_batching_config": "use max_num_seqs, which replaces completions that have ended by new ones",
    "use_transformers_paged": "use max_num_seqs, which replaces completions that have ended by new ones",
    "use_liger_loss": "the loss is always computed without the full logits",
    "epsilon_low": "use epsilon",
}


# ruff: noqa: RUF009 (_field is dataclasses.field)
def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class GRPOConfig(TrainingArguments):
    """Arguments of ``GRPOTrainer``. Names, meanings and defaults are those of ``trl.GRPOConfig`` 1.16, with these differences:

    - bf16 is on by default only if the GPU supports it. Gradient checkpointing is off, as in ``TrainingArguments``.
    - Every process holds whole groups: num_generations divides per_device_train_batch_size * steps_per_generation.
    - The defaults of importance_sampling_level and epsilon_high depend on loss_type.
    - num_completions_to_print is 64; None stores all completions. diagnose is new.
    - The rollout_* fields replace vllm_importance_sampling_* and work with every engine. They are off by default; see
      docs/mismatch.md.
    - rollout_engine names the engine; use_vllm and vllm_mode are synonyms for it, and their defaults follow from it.
    - vllm_server_base_url is the only address of a vLLM server. vllm_request_timeout, vllm_weight_transfer, vllm_weights_dir
      and vllm_fingerprint_tolerance are new.
    - tool_timeout, max_tool_images and tool_format are new. max_completion_length counts the results of tools too, as in TRL.
    - eval_temperature, max_num_seqs, dynamic_sampling, max_resample_times, oversampling, kl_estimator, share_prefix,
      max_tokens_per_microbatch, on_save_error, on_bad_sample, on_nonfinite, max_image_pixels, max_image_bytes,
      allow_image_urls, deterministic and router_replay are new.
    - perception_loss_weight, der_loss_weight1, der_loss_weight2 and mask_ratio have the names of TRL's former ``PAPOConfig``;
      the objective is that of the paper (docs/objective.md). image_use_steps is new.
    - teacher_model_init_kwargs and the distillation_* fields belong to the argument ``teacher`` of the trainer, which TRL's
      ``GRPOTrainer`` does not have; see docs/distillation.md.
    - freeze_vision and image_resolution_schedule are new. activation_offloading is a field of TRL's SFTConfig.
    - preset sets the fields of a row of ``vlmkernels.ops.grpo_loss.config.PRESETS`` that have their default values.
    - max_prompt_length never cuts a prompt: a longer one is an error, or is skipped under on_bad_sample.
    - Fields of TRL that are not listed here do not exist; ``TRL_FIELDS`` says what serves instead.

    Raises:
        TypeError: there is no field of a name.
        ValueError: a value is out of range, or two values are incompatible.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        *_JSON_OBJECTS,
    ]

    def __new__(cls, *args: Any, **kwargs: Any) -> "GRPOConfig":
        """Check the names of the arguments."""
        names = [field.name for field in fields(cls) if field.init]
        for name in kwargs:
            if name not in names:
                hint = f": {TRL_FIELDS[name]}" if name in TRL_FIELDS else did_you_mean(name, names)
                raise TypeError(f"{cls.__name__} must get names of its fields, got {name}{hint}")
        return super().__new__(cls)

    preset: str | None = _field(None, "Settings of a paper: dapo, gspo, ...; fields that are set to other values override it.")
    learning_rate: float = _field(1e-6, "Initial learning rate.")
    logging_steps: float = _field(10, "Number of optimizer steps between logs. A value below 1 is a fraction of all steps.")
    bf16: bool | None = _field(None, "Use bfloat16 mixed precision. By default on if the GPU supports it and fp16 is off.")
    resume_from_checkpoint: str | None = _field(None, "On the command line: a checkpoint, or 'last' for the last complete one.")
    remove_unused_columns: bool | None = _field(False, "Pass only prompts and images to reward functions, no other columns.")

    model_init_kwargs: dict[str, Any] | str | None = _field(None, "from_pretrained arguments, if the model is given by path.")
    disable_dropout: bool = _field(False, "Set all dropout probabilities of the model to 0.")

    num_generations: int = _field(8, "Number of completions per prompt, at least 2; 1 with a teacher and no reward functions.")
    num_generations_eval: int | None = _field(None, "Completions per prompt in evaluation; by default num_generations.")
    max_prompt_length: int | None = _field(
        None,
        "Maximum number of tokens of a prompt with its images; a longer prompt is an unusable row (on_bad_sample).",
    )
    max_completion_length: int = _field(512, "Maximum number of tokens of a completion.")
    shuffle_dataset: bool = _field(True, "Visit the training prompts in a new random order in each epoch.")
    generation_batch_size: int | None = _field(None, "Completions per generation batch, over all processes.")
    steps_per_generation: int | None = _field(None, "Micro-batches per generation; by default gradient_accumulation_steps.")
    dynamic_sampling: bool = _field(
        False, "Sample further prompts until all groups of a generation batch have different rewards (DAPO)."
    )
    max_resample_times: int = _field(10, "Maximum number of further rounds of dynamic_sampling.")
    oversampling: float = _field(
        1.0, "Prompts sampled per prompt of a generation batch, which keeps groups with different rewards; first round only."
    )
    temperature: float = _field(1.0, "Sampling temperature. Log-probabilities in the loss use it too.")
    eval_temperature: float | None = _field(None, "Temperature in evaluation, 0 for greedy decoding; by default temperature.")
    top_p: float | None = _field(
        1.0, "Sample from the most probable tokens whose probabilities add up to top_p. 1 keeps all tokens."
    )
    top_k: int | None = _field(0, "Sample from the top_k most probable tokens. 0 keeps all tokens.")
    min_p: float | None = _field(None, "Drop tokens less probable than min_p times the most probable one; by default none.")
    repetition_penalty: float | None = _field(1.0, "Above 1, tokens that occurred before become less probable; 1 is off.")
    max_num_seqs: int | None = _field(None, "Maximum completions decoded at the same time; by default the whole batch.")
    generation_kwargs: dict[str, Any] | str | None = _field(None, "Further arguments of transformers.GenerationConfig.")
    chat_template_kwargs: dict[str, Any] | str | None = _field(None, "Further arguments of apply_chat_template.")

    rollout_engine: str | None = _field(
        None, "What samples completions: 'transformers' (the default: the trainer's model), 'vllm_server' or 'vllm_colocate'."
    )
    use_vllm: bool | None = _field(None, "Sample completions with vLLM; by default as rollout_engine says.")
    vllm_mode: str | None = _field(
        None, "'server' for a separate vLLM server, 'colocate' (the default) for vLLM in the trainer's process."
    )
    vllm_server_base_url: str = _field("http://127.0.0.1:8000", "URL of the vLLM server.")
    vllm_server_timeout: float = _field(240.0, "Seconds to wait for the vLLM server to start or to restart.")
    vllm_request_timeout: float = _field(600.0, "Seconds before a request to the vLLM server, or a weight sync, fails.")
    vllm_weight_transfer: str = _field(
        "auto", "How weights go to vLLM: in 'memory', through a 'folder', or 'auto', in memory where it is possible."
    )
    vllm_weights_dir: str | None = _field(
        None, "Folder for weights that do not go to vLLM in memory; by default vllm-weights in output_dir."
    )
    vllm_fingerprint_tolerance: float | None = _field(
        None,
        "Maximum relative error of vLLM's log-probabilities of a fixed prompt after a weight sync; default by dtype.",
    )
    vllm_gpu_memory_utilization: float = _field(0.3, "Fraction of the GPU's memory for vLLM if vllm_mode is 'colocate'.")
    vllm_max_model_length: int | None = _field(None, "Maximum tokens of a sequence in colocated vLLM; by default the model's.")

    max_tool_calling_iterations: int | None = _field(
        None, "Maximum number of turns whose tool calls are run; None for no limit."
    )
    tool_timeout: float | None = _field(60.0, "Seconds before a tool call fails; None for no limit.")
    max_tool_images: int = _field(16, "Maximum number of images that a tool call may return.")
    tool_format: str | None = _field(None, "How the model writes tool calls; by default found in the chat template.")

    beta: float = _field(0.0, "Weight of the KL term. Above 0 a reference model is needed; with LoRA it is not a copy.")
    use_bias_correction_kl: bool = _field(True, "Multiply the KL term by the ratio, which makes its gradient unbiased.")
    kl_estimator: str = _field("k3", "Estimator of the KL divergence: k1, k2 or k3.")
    share_prefix: str = _field("auto", "Run a prompt and its images once per group: true, false, or auto (if supported).")
    max_tokens_per_microbatch: int | None = _field(None, "Maximum tokens of a forward pass; by default no maximum.")
    num_iterations: int = _field(1, "Number of passes over each generation batch.")
    loss_type: str = _field("dapo", "Loss: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.")
    importance_sampling_level: str | None = _field(None, "Ratio per 'token' or 'sequence'; by default that of the loss_type.")
    epsilon: float = _field(0.2, "Clip probability ratios from below at 1 - epsilon.")
    epsilon_high: float | None = _field(
        None,
        "Clip probability ratios from above at 1 + epsilon_high. By default epsilon. The cispo loss clips ratios at "
        "epsilon_high, by default 5.",
    )
    delta: float | None = _field(None, "Upper bound of the unclipped ratio (two-sided clipping); by default no bound.")
    sapo_temperature_pos: float = _field(1.0, "Temperature of the sapo loss for advantages > 0.")
    sapo_temperature_neg: float = _field(1.05, "Temperature of the sapo loss for advantages <= 0.")
    vespo_k_pos: float = _field(2.0, "Exponent k of the vespo loss for advantages >= 0.")
    vespo_lambda_pos: float = _field(3.0, "Decay lambda of the vespo loss for advantages >= 0.")
    vespo_k_neg: float = _field(3.0, "Exponent k of the vespo loss for advantages < 0.")
    vespo_lambda_neg: float = _field(2.0, "Decay lambda of the vespo loss for advantages < 0.")
    rollout_correction: str | None = _field(
        None,
        "Weight the loss by the ratio of the trainer's to the engine's probabilities: token_truncate, token_mask, "
        "sequence_truncate or sequence_mask. By default there is no correction; its metrics are logged anyway.",
    )
    rollout_clip_min: float | None = _field(None, "Lower bound of the correction ratio; by default no bound.")
    rollout_clip_max: float | None = _field(3.0, "Upper bound of the correction ratio; None for no bound.")
    rollout_sequence_ratio: str = _field("sum", "Correction ratio of a sequence: exp of the 'sum' or 'mean' of log-ratios.")
    rollout_policy: str = _field(
        "truncated", "Probabilities in the correction ratio: 'truncated' by top_p, top_k, min_p, or of the 'full' vocabulary."
    )
    deterministic: bool = _field(
        False, "Let log-probabilities not depend on the batch, bit for bit; slower. See docs/mismatch.md."
    )
    router_replay: bool = _field(
        False, "Use the experts that routers chose in the rollout in training too. Only for mixtures of experts."
    )
    off_policy_mask_threshold: float | None = _field(
        None, "Exclude completions with advantage < 0 and a mean of log(sampling / current policy) above this; default none."
    )
    top_entropy_quantile: float = _field(1.0, "Fraction of tokens that enter the loss, those with the highest entropy.")
    entropy_coef: float = _field(0.0, "Weight of the entropy bonus.")
    perception_loss_weight: float = _field(
        0.0, "Weight gamma of the KL divergence from the policy with masked images, which is maximized (PAPO)."
    )
    der_loss_weight1: float = _field(0.0, "Weight eta1 of the entropy with the images, which is minimized (PAPO).")
    der_loss_weight2: float = _field(0.0, "Weight eta2 of the entropy with masked images, which is minimized (PAPO).")
    mask_ratio: float = _field(
        MASK_RATIO, "Probability with which a patch of an image is masked (black) in the perception terms."
    )
    image_use_steps: int | None = _field(
        None,
        "Optimizer steps between measurements of image use (docs/perception.md); by default 10 with diagnose, otherwise never.",
    )
    scale_rewards: str = _field("group", "Standard deviation that advantages are divided by: 'group', 'batch' or 'none'.")
    reward_weights: list[float] | None = _field(None, "Weight per reward function; by default the function's own, or 1.")
    mask_truncated_completions: bool = _field(False, "Exclude completions cut off at max_completion_length from the loss.")

    teacher_model_init_kwargs: dict[str, Any] | str | None = _field(
        None, "from_pretrained arguments, if the teacher is given by path; the default dtype is that of its files."
    )
    distillation_coef: float = _field(1.0, "Weight of the divergence from the teacher in the loss.")
    distillation_beta: float = _field(
        1.0,
        "Divergence from the teacher: 0 is KL(teacher || policy), 1 is KL(policy || teacher), and a value between them is the "
        "generalized Jensen-Shannon divergence.",
    )
    distillation_top_k: int | None = _field(
        None, "Compare only this many of the teacher's most probable tokens, and all others as one; by default the vocabulary."
    )

    on_save_error: str = _field("raise", "What to do if a checkpoint cannot be written: 'raise', or 'skip' it.")
    on_bad_sample: str = _field("raise", "What to do with an unreadable row: 'raise', or 'skip' to the next row.")
    on_nonfinite: str = _field("raise", "What to do if a loss or gradient is not finite: 'raise', or 'skip' the step.")
    max_image_pixels: int = _field(ImageLimits.max_pixels, "Maximum number of pixels of an image or of a video frame.")
    max_image_bytes: int = _field(ImageLimits.max_bytes, "Maximum size of an image file in bytes.")
    allow_image_urls: bool = _field(False, "Allow images that are given by an http or https URL, and fetch them.")

    freeze_vision: bool = _field(False, "Do not train the vision tower and what connects it to the decoder.")
    activation_offloading: bool = _field(
        False, "Keep the activations of forward passes in host memory until the backward pass."
    )
    image_resolution_schedule: list[dict[str, Any]] | str | None = _field(
        None,
        "Limits of image sizes by optimizer step: a JSON list of {step, min_pixels, max_pixels}; by default the processor's.",
    )

    log_completions: bool = _field(False, "Store completions and a page of them at each log, and send them to report_to.")
    diagnose: bool = _field(False, "Check every log with the rules of `vlmkernels doctor`, and warn about what they find.")
    num_completions_to_print: int | None = _field(64, "Maximum number of completions stored at a log. None stores all.")

    def __post_init__(self) -> None:
        self._check_types()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_reward"
        super().__post_init__()
        self._apply_preset()
        self._normalize()
        self._check_values()
        self._check_combinations()
        if self.use_vllm:
            self._check_vllm()
        self._derive_batches()
        check_optimizer(self)

    def _check_types(self) -> None:
        """Check the types of numbers and flags, because a flag "false" would count as true."""
        for name, hint in {**GRPOConfig.__annotations__, **_BATCHES}.items():
            hints, value = get_args(hint) or (hint,), getattr(self, name, None)
            if value is None and {bool, type(None)} & {*hints}:
                continue
            if bool in hints and value not in (True, False):
                raise TypeError(f"{name} must be true or false, got {value!r}")
            for kind, (rule, number) in _NUMBERS.items():
                if kind in hints:
                    require_number(name, value, rule, number)

    def _apply_preset(self) -> None:
        """Set the fields of the preset that have their default values."""
        if self.preset is None:
            return
        require_one_of("preset", self.preset, PRESETS)
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in PRESETS[self.preset].items():
            name = {"epsilon_low": "epsilon"}.get(name, name)
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)

    def _normalize(self) -> None:
        """Replace synonyms, and defaults that depend on other fields."""
        self.rollout_engine = engine_name(self.rollout_engine, self.use_vllm, self.vllm_mode)
        self.use_vllm = self.rollout_engine != "transformers"
        self.vllm_mode = self.rollout_engine.removeprefix("vllm_") if self.use_vllm else self.vllm_mode or "colocate"
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        self.share_prefix = {"true": True, "false": False}.get(str(self.share_prefix).lower(), self.share_prefix)
        self.num_generations_eval = self.num_generations if self.num_generations_eval is None else self.num_generations_eval
        self.eval_temperature = self.temperature if self.eval_temperature is None else self.eval_temperature
        if isinstance(self.image_resolution_schedule, str):
            try:
                self.image_resolution_schedule = json.loads(self.image_resolution_schedule)
            except ValueError as error:
                raise ValueError(
                    f"image_resolution_schedule must be a JSON list, got {self.image_resolution_schedule!r} ({error})"
                ) from error

    def _check_values(self) -> None:
        """Check each value by itself. The configurations that are built from fields check theirs."""
        for name in (*_BATCHES, *_COUNTS):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.eval_temperature < 0:
            raise ValueError(f"eval_temperature must be >= 0, got {self.eval_temperature}")
        if not 0 <= self.epsilon <= 1:  # epsilon_low of the loss
            raise ValueError(f"epsilon must be in [0, 1], got {self.epsilon}")
        if not 1 <= self.oversampling < math.inf:
            raise ValueError(f"oversampling must be finite and >= 1, got {self.oversampling}")
        if not 0 < self.distillation_coef < math.inf:
            raise ValueError(f"distillation_coef must be a finite number > 0, got {self.distillation_coef}")
        check_beta(self.distillation_beta, "distillation_beta")
        if self.share_prefix not in ("auto", True, False):
            raise ValueError(f"share_prefix must be auto, true or false, got {self.share_prefix!r}")
        for name, values in _CHOICES.items():
            require_one_of(name, getattr(self, name), values)
        check_mask_ratio(self.mask_ratio)
        for name in _JSON_OBJECTS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} must map names to values (in JSON), got {value!r}")
        reserved = sorted({"temperature", "do_sample"} & (self.generation_kwargs or {}).keys())
        if reserved:
            names = ", ".join(reserved)
            raise ValueError(
                f"generation_kwargs must not hold temperature or do_sample: use temperature and eval_temperature, got {names}"
            )
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size must be False, because a smaller batch would split groups, got True")
        self.loss_config()
        self.sampling()
        self.resolution_schedule()
        self.tool_options()
        self.model_init_kwargs = json_values(self.model_init_kwargs)
        quantized_arguments(self.model_init_kwargs, self.compute_dtype)

    def _check_combinations(self) -> None:
        """Check values that exclude each other, whatever model, data and processes the run has."""
        if self.max_tokens_per_microbatch is not None and self.top_entropy_quantile < 1 and self.world_size > 1:
            raise ValueError(
                "max_tokens_per_microbatch must be None with top_entropy_quantile < 1 and several processes, which may split a "
                f"micro-batch into different numbers of parts, got {self.max_tokens_per_microbatch}"
            )
        multiplies = (self.rollout_correction or "").startswith("sequence") and self.rollout_sequence_ratio == "sum"
        if multiplies and self.rollout_policy == "truncated" and self.sampling().truncates:
            raise ValueError(
                "rollout_sequence_ratio must be 'mean', or rollout_policy 'full', with a correction per sequence and top_p, "
                "top_k or min_p, because the product of the kept probability masses approaches 0 for long completions, "
                f"got {self.rollout_sequence_ratio!r}"
            )

    def _check_vllm(self) -> None:
        """Check what vLLM engines do not support."""
        if self.deterministic:
            raise ValueError("deterministic must be False with use_vllm, whose log-probabilities depend on batches, got True")
        if self.image_resolution_schedule is not None:
            raise ValueError(
                "image_resolution_schedule must be None with use_vllm, whose engines resize images by settings of their own, "
                f"got {self.image_resolution_schedule!r}"
            )
        config = self.vllm_config()
        check_sampling(self.sampling(), config.policy)
        if self.eval_temperature > MAX_TEMPERATURE:
            raise ValueError(f"eval_temperature must be at most {MAX_TEMPERATURE:g} with use_vllm, got {self.eval_temperature}")
        if self.vllm_mode == "colocate" and self.world_size > 1:
            raise ValueError(f"vllm_mode must be 'server' on several processes, got 'colocate' on {self.world_size}")

    def _derive_batches(self) -> None:
        """Derive generation_batch_size from steps_per_generation, or the reverse, and check that batches divide evenly."""
        step_size = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is None:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = self.steps_per_generation * step_size
        elif self.steps_per_generation is None:
            if self.generation_batch_size % step_size:
                raise ValueError(
                    f"generation_batch_size must be a multiple of per_device_train_batch_size * processes = {step_size}, "
                    f"got {self.generation_batch_size}"
                )
            self.steps_per_generation = self.generation_batch_size // step_size
        expected = self.steps_per_generation * step_size
        if self.generation_batch_size != expected:
            raise ValueError(
                "generation_batch_size must equal steps_per_generation * per_device_train_batch_size * processes = "
                f"{expected}, got {self.generation_batch_size}"
            )
        local_size = self.per_device_train_batch_size * self.steps_per_generation
        if local_size % self.num_generations:
            raise ValueError(
                f"num_generations must divide per_device_train_batch_size * steps_per_generation = {local_size}, "
                f"got {self.num_generations}"
            )
        window = self.gradient_accumulation_steps
        if self.steps_per_rollout % window and window % self.steps_per_rollout:
            raise ValueError(
                "gradient_accumulation_steps must divide, or be a multiple of, steps_per_generation * num_iterations = "
                f"{self.steps_per_rollout}, got {window}"
            )

    @property
    def masks_images(self) -> bool:
        """Whether the loss has terms of masked images."""
        return any(getattr(self, name) for name in PERCEPTION_WEIGHTS)

    @property
    def prompts_per_generation(self) -> int:
        """Number of prompts in the generation batch of one process."""
        return self.per_device_train_batch_size * self.steps_per_generation // self.num_generations

    @property
    def chooses_groups(self) -> bool:
        """Whether more prompts than ``prompts_per_generation`` may be sampled for a generation batch."""
        return self.dynamic_sampling or self.oversampling > 1

    @property
    def prompts_per_round(self) -> int:
        """Number of prompts that one process samples first for a generation batch."""
        return math.ceil(round(self.prompts_per_generation * self.oversampling, 6))  # 1.1 * 10 is a little more than 11

    @property
    def steps_per_rollout(self) -> int:
        """Number of micro-batches that are trained on between two generations."""
        return self.steps_per_generation * self.num_iterations

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    def sampling(self) -> Sampling:
        """Return how completions are sampled in training. Values of ``generation_kwargs`` replace the fields' values."""
        options = {"max_new_tokens": self.max_completion_length, "temperature": self.temperature}
        options |= {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        options |= {n: v for n, v in (self.generation_kwargs or {}).items() if v is not None or n not in options}
        return Sampling.from_kwargs(**options)

    def _compared_policy(self) -> str | None:
        """Return ``VLLMConfig.policy``, for the correction and for the mask of off-policy completions."""
        if self.rollout_correction is not None:
            return self.rollout_policy
        return None if self.off_policy_mask_threshold is None else "full"

    def vllm_config(self) -> VLLMConfig | None:
        """Return the options of the vLLM engine; None without ``use_vllm``."""
        if not self.use_vllm:
            return None
        shared = {f.name: getattr(self, f"vllm_{f.name}") for f in fields(VLLMConfig) if hasattr(self, f"vllm_{f.name}")}
        shared["weights_dir"] = self.vllm_weights_dir or os.path.join(self.output_dir, "vllm-weights")
        return VLLMConfig(
            **shared,
            max_num_seqs=self.max_num_seqs,
            autocast_dtype=self.compute_dtype,
            seed=self.seed,
            num_generations=max(self.num_generations, self.num_generations_eval),
            chat_template_kwargs=self.chat_template_kwargs or {},
            policy=self._compared_policy(),
            routed_experts=self.router_replay,
        )

    def image_limits(self) -> ImageLimits:
        """Return the limits of images."""
        return ImageLimits(self.max_image_pixels, self.max_image_bytes, self.allow_image_urls)

    def resolution_schedule(self) -> ResolutionSchedule | None:
        """Return the sizes of images by step; None for the processor's own."""
        given = self.image_resolution_schedule
        return None if given is None else ResolutionSchedule.from_list(given)

    def tool_options(self) -> ToolOptions:
        """Return how tools are called."""
        return ToolOptions(
            max_tool_calling_iterations=self.max_tool_calling_iterations,
            tool_timeout=self.tool_timeout,
            max_tool_images=self.max_tool_images,
            limits=self.image_limits(),
            tool_format=self.tool_format,
        )

    def loss_config(self) -> GRPOLossConfig:
        """Return the configuration of the loss. Fields with the same name have the same meaning; epsilon is epsilon_low."""
        shared = {f.name: getattr(self, f.name) for f in fields(GRPOLossConfig) if f.init and hasattr(self, f.name)}
        return GRPOLossConfig(**shared, epsilon_low=self.epsilon)
