"""The configuration of GRPO training: TRL's field names, on top of ``transformers.TrainingArguments``."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import GenerationConfig, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from vlmkernels.data.images import ImageLimits
from vlmkernels.ops.checks import require, require_one_of, require_positive
from vlmkernels.ops.group_advantages import SCALES
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.rollout.decode import Sampling

ON_FAULT = ("raise", "skip")
ROLLOUT_POLICIES = ("truncated", "full")


# ruff: noqa: RUF009 (_field is dataclasses.field)
def _field(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class GRPOConfig(TrainingArguments):
    """Arguments of ``GRPOTrainer``. Names, meanings and defaults are those of ``trl.GRPOConfig`` 1.16, except that

    - bf16 is on by default only where the GPU supports it, and gradient checkpointing is off, as in ``TrainingArguments``;
    - each process holds whole groups: num_generations divides per_device_train_batch_size * steps_per_generation;
    - importance_sampling_level and epsilon_high default to what suits the loss_type;
    - num_completions_to_print is 64 (None: all);
    - the rollout_* fields serve every engine, and stand for vllm_importance_sampling_* (docs/mismatch.md); off by default;
    - vLLM's server is given by its URL; vllm_request_timeout, vllm_weights_dir and vllm_fingerprint_tolerance are new;
    - eval_temperature, max_num_seqs, kl_estimator, share_prefix, max_tokens_per_microbatch, on_save_error, on_bad_sample,
      on_nonfinite and the limits of images are new;
    - fields of TRL's that are not listed do not exist: every field here is honoured.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    learning_rate: float = _field(1e-6, "The initial learning rate.")
    logging_steps: float = _field(10, "Log every this many steps; below 1, a share of all steps.")
    bf16: bool | None = _field(None, "bfloat16 mixed precision; by default on where the GPU supports it and fp16 is off.")
    resume_from_checkpoint: str | None = _field(
        None, "On the command line: a checkpoint's folder, or 'last' for the last complete one in output_dir."
    )
    remove_unused_columns: bool | None = _field(False, "Give reward functions the prompt and image columns alone.")

    model_init_kwargs: dict[str, Any] | str | None = _field(None, "Arguments of from_pretrained, for a model given by path.")
    disable_dropout: bool = _field(False, "Set every dropout probability of the model to 0.")

    num_generations: int = _field(8, "Completions per prompt, at least 2.")
    num_generations_eval: int | None = _field(None, "Completions per prompt in evaluation; by default num_generations.")
    max_completion_length: int = _field(512, "The most tokens of a completion.")
    shuffle_dataset: bool = _field(True, "Visit the training prompts in a new random order in each epoch.")
    generation_batch_size: int | None = _field(None, "Completions sampled at a time, over all processes.")
    steps_per_generation: int | None = _field(
        None, "Micro-batches sampled at a time; by default gradient_accumulation_steps. Excludes generation_batch_size."
    )
    temperature: float = _field(1.0, "Sampling temperature; log-probabilities are taken at it.")
    eval_temperature: float | None = _field(None, "Temperature in evaluation, 0 = greedy; by default temperature.")
    top_p: float = _field(1.0, "Sample among the most probable tokens that hold this probability.")
    top_k: int = _field(0, "Sample among this many most probable tokens; 0 = all.")
    min_p: float | None = _field(None, "Drop tokens less probable than this times the most probable one.")
    repetition_penalty: float = _field(1.0, "Above 1, tokens that occurred before become less probable.")
    max_num_seqs: int | None = _field(None, "The most completions decoded at a time; by default all of a generation batch.")
    generation_kwargs: dict[str, Any] | str | None = _field(None, "Further arguments of transformers.GenerationConfig.")
    chat_template_kwargs: dict[str, Any] | str | None = _field(None, "Further arguments of apply_chat_template.")

    use_vllm: bool = _field(False, "Sample with vLLM.")
    vllm_mode: str = _field("colocate", "vLLM as a server, or in the trainer's process: server, colocate.")
    vllm_server_base_url: str = _field("http://127.0.0.1:8000", "server: its URL.")
    vllm_server_timeout: float = _field(240.0, "server: seconds to wait for it to come up, or to come back.")
    vllm_request_timeout: float = _field(600.0, "server: seconds for each request, a prompt's completions or an update.")
    vllm_weights_dir: str | None = _field(
        None, "The folder that updates of weights go through; vLLM must see it. By default vllm-weights in output_dir."
    )
    vllm_fingerprint_tolerance: float | None = _field(
        None, "Greatest relative difference between vLLM's and the trainer's log-probabilities of a fixed prompt; by dtype."
    )
    vllm_gpu_memory_utilization: float = _field(0.3, "colocate: the share of the GPU's memory that vLLM may use.")
    vllm_max_model_length: int | None = _field(
        None, "colocate: the most tokens of prompt and completion; by default the model's."
    )

    beta: float = _field(0.0, "Weight of the KL term; above 0 a reference model is kept (with LoRA: no copy).")
    use_bias_correction_kl: bool = _field(True, "Multiply the KL term by the ratio, so that its gradient is unbiased.")
    kl_estimator: str = _field("k3", "Estimator of the KL divergence: k1, k2, k3.")
    share_prefix: str = _field("auto", "Run a prompt and its images once for all its completions: auto, true, false.")
    max_tokens_per_microbatch: int | None = _field(
        None,
        "Run a micro-batch in parts of at most this many tokens, each prompt counted once a part; by default whole.",
    )
    num_iterations: int = _field(1, "Optimisation passes over each generation batch.")
    loss_type: str = _field("dapo", "The objective: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo.")
    importance_sampling_level: str | None = _field(None, "Ratio per token or sequence; by default the loss's own.")
    epsilon: float = _field(0.2, "The ratio is clipped from below at 1 - epsilon.")
    epsilon_high: float | None = _field(None, "... from above at 1 + epsilon_high, by default epsilon; cispo: at it, 5.")
    delta: float | None = _field(None, "Also cap the ratio at this (two-sided clipping).")
    sapo_temperature_pos: float = _field(1.0, "sapo: temperature for advantages > 0.")
    sapo_temperature_neg: float = _field(1.05, "sapo: temperature for advantages <= 0.")
    vespo_k_pos: float = _field(2.0, "vespo: exponent for advantages >= 0.")
    vespo_lambda_pos: float = _field(3.0, "vespo: decay for advantages >= 0.")
    vespo_k_neg: float = _field(3.0, "vespo: exponent for advantages < 0.")
    vespo_lambda_neg: float = _field(2.0, "vespo: decay for advantages < 0.")
    rollout_correction: str | None = _field(
        None,
        "Weight the loss by the ratio of the trainer's policy to the one that sampled: token_truncate, token_mask, "
        "sequence_truncate, sequence_mask. Its metrics are there without it.",
    )
    rollout_clip_min: float | None = _field(None, "rollout_correction: the least ratio that is not truncated or masked.")
    rollout_clip_max: float | None = _field(3.0, "... and the greatest.")
    rollout_sequence_ratio: str = _field("sum", "... of a sequence: exp of the sum or of the mean of its log-ratios.")
    rollout_policy: str = _field(
        "truncated", "... to the policy that sampled, truncated by top_p, top_k, min_p and bans, or the full one before that."
    )
    off_policy_mask_threshold: float | None = _field(None, "Leave out bad completions that the policy has moved this far from.")
    top_entropy_quantile: float = _field(1.0, "The share of tokens, those of greatest entropy, that the loss takes.")
    entropy_coef: float = _field(0.0, "Weight of an entropy bonus.")
    scale_rewards: str = _field("group", "Divide advantages by the standard deviation of: group, batch, none.")
    reward_weights: list[float] | None = _field(None, "A weight per reward function; by default its own, or 1.")
    mask_truncated_completions: bool = _field(False, "Leave completions that were cut off out of the loss.")

    on_save_error: str = _field("raise", "A checkpoint that cannot be written (a full disk): raise, skip it.")
    on_bad_sample: str = _field("raise", "A row that cannot be read (a corrupt image): raise, skip (another takes its place).")
    on_nonfinite: str = _field("raise", "A loss or gradient that is NaN or infinite: raise, skip the optimiser step.")
    max_image_pixels: int = _field(ImageLimits.max_pixels, "The most pixels of an image, or of a frame of a video.")
    max_image_bytes: int = _field(ImageLimits.max_bytes, "The most bytes of an image's file.")
    allow_image_urls: bool = _field(False, "Fetch images whose path is an http or https address.")

    log_completions: bool = _field(False, "Store completions and a page of them at each log, and show them in report_to.")
    num_completions_to_print: int | None = _field(64, "The most completions stored at a log.")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_reward"
        super().__post_init__()
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        self.share_prefix = {"true": True, "false": False}.get(str(self.share_prefix).lower(), self.share_prefix)
        self.num_generations_eval = self.num_generations_eval or self.num_generations
        self.eval_temperature = self.temperature if self.eval_temperature is None else self.eval_temperature
        self._check_values()
        if self.use_vllm:
            self._check_vllm()
        self._derive_batches()
        self.loss_config()
        self.image_limits()

    def _check_values(self) -> None:
        require(self.num_generations >= 2, "num_generations", "be >= 2, to compare completions", self.num_generations)
        for name in ("num_generations_eval", "max_completion_length", "num_iterations"):
            require(getattr(self, name) >= 1, name, "be >= 1", getattr(self, name))
        require(self.temperature > 0, "temperature", "be > 0", self.temperature)
        require(self.eval_temperature >= 0, "eval_temperature", "be >= 0", self.eval_temperature)
        require(0 < self.top_p <= 1, "top_p", "be in (0, 1]", self.top_p)
        require(self.top_k >= 0, "top_k", "be >= 0", self.top_k)
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "be in [0, 1]", self.min_p)
        require(self.repetition_penalty > 0, "repetition_penalty", "be > 0", self.repetition_penalty)
        for name in ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs"):
            value = getattr(self, name)
            require(value is None or isinstance(value, dict), name, "map names to values (in JSON)", repr(value))
        unknown = [name for name in self.generation_kwargs or {} if not hasattr(GenerationConfig(), name)]
        require(not unknown, "generation_kwargs", "hold arguments of GenerationConfig alone", ", ".join(unknown))
        fixed = sorted({"temperature", "do_sample"} & (self.generation_kwargs or {}).keys())
        require(not fixed, "generation_kwargs", "leave these to temperature and eval_temperature", ", ".join(fixed))
        require(self.max_num_seqs is None or self.max_num_seqs >= 1, "max_num_seqs", "be >= 1", self.max_num_seqs)
        budget = self.max_tokens_per_microbatch
        require(budget is None or budget >= 1, "max_tokens_per_microbatch", "be >= 1", budget)
        rule = "be None with top_entropy_quantile < 1 on several processes, whose parts differ in number"
        require(
            budget is None or self.top_entropy_quantile == 1 or self.world_size == 1, "max_tokens_per_microbatch", rule, budget
        )
        require(0 <= self.epsilon <= 1, "epsilon", "be in [0, 1]", self.epsilon)
        self._check_correction()
        require(self.scale_rewards in SCALES, "scale_rewards", f"be one of {', '.join(SCALES)}", repr(self.scale_rewards))
        require(self.share_prefix in ("auto", True, False), "share_prefix", "be auto, true or false", repr(self.share_prefix))
        for name in ("on_save_error", "on_bad_sample", "on_nonfinite"):
            require_one_of(name, getattr(self, name), ON_FAULT)
        require(not self.auto_find_batch_size, "auto_find_batch_size", "be off: groups must stay whole", True)

    def _check_correction(self) -> None:
        require_one_of("rollout_policy", self.rollout_policy, ROLLOUT_POLICIES)
        given = {name: value for name, value in (self.generation_kwargs or {}).items() if value is not None}
        top_p, top_k, min_p = (given.get(name, getattr(self, name)) for name in ("top_p", "top_k", "min_p"))
        truncates = top_p < 1 or top_k > 0 or bool(min_p)
        product = (self.rollout_correction or "").startswith("sequence") and self.rollout_sequence_ratio == "sum"
        rule = (
            "be 'mean', or rollout_policy 'full', with a correction per sequence of sampling with top_p, top_k or min_p: the "
            "product of what they keep of each token vanishes with the length"
        )
        vanishes = truncates and product and self.rollout_policy == "truncated"
        require(not vanishes, "rollout_sequence_ratio", rule, repr(self.rollout_sequence_ratio))
        rule = "be 'full' with rollout_correction and use_vllm, which does not tell what sampling left of the vocabulary"
        unknown = self.use_vllm and self.rollout_correction is not None and self.rollout_policy != "full"
        require(not unknown, "rollout_policy", rule, repr(self.rollout_policy))

    def _check_vllm(self) -> None:
        modes = "server", "colocate"
        require(self.vllm_mode in modes, "vllm_mode", f"be one of {', '.join(modes)}", repr(self.vllm_mode))
        url = self.vllm_server_base_url
        require(url.startswith(("http://", "https://")), "vllm_server_base_url", "begin with http:// or https://", repr(url))
        for name in ("vllm_server_timeout", "vllm_request_timeout"):
            require_positive(name, getattr(self, name))
        share, tolerance = self.vllm_gpu_memory_utilization, self.vllm_fingerprint_tolerance
        require(0 < share <= 1, "vllm_gpu_memory_utilization", "be in (0, 1]", share)
        require(tolerance is None or tolerance > 0, "vllm_fingerprint_tolerance", "be None or > 0", tolerance)
        unknown = sorted((self.generation_kwargs or {}).keys() - Sampling.names())
        require(not unknown, "generation_kwargs", "hold only what vLLM knows with use_vllm", ", ".join(unknown))
        rule = (
            "be 1 with use_vllm and top_p, top_k, min_p, a repetition penalty or min_new_tokens: vLLM tells log-probabilities"
        )
        rule += " either before the temperature or after such limits"
        require(bool(self.vllm_logprobs_modes), "temperature", rule, self.temperature)
        if self.vllm_mode == "server":
            rule = "be None with a vLLM server, whose own it is (--max-num-seqs)"
            require(self.max_num_seqs is None, "max_num_seqs", rule, self.max_num_seqs)
        else:
            rule = "be 'server' on several processes"
            require(self.world_size == 1, "vllm_mode", rule, f"{self.vllm_mode!r} on {self.world_size}")

    @property
    def sampling_is_restricted(self) -> bool:
        """Whether tokens are drawn from other probabilities than the model's at the temperature."""
        options = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        options |= {"repetition_penalty": self.repetition_penalty, "min_new_tokens": 0} | (self.generation_kwargs or {})
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
        return any((options[name] or value) != value for name, value in neutral.items())

    @property
    def vllm_logprobs_modes(self) -> list[str]:
        """vLLM's logprobs_mode under which log-probabilities over the whole vocabulary at the temperature can be had, the best
        first: raw ones are at temperature 1, processed ones of what limits leave."""
        modes = {"raw_logprobs": self.temperature == 1, "processed_logprobs": not self.sampling_is_restricted}
        return [mode for mode, serves in modes.items() if serves]

    def _derive_batches(self) -> None:
        """Fill in generation_batch_size and steps_per_generation, each from the other."""
        step_size = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is None:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = self.steps_per_generation * step_size
        elif self.steps_per_generation is None:
            rule = f"be a multiple of per_device_train_batch_size * processes = {step_size}"
            require(self.generation_batch_size % step_size == 0, "generation_batch_size", rule, self.generation_batch_size)
            self.steps_per_generation = self.generation_batch_size // step_size
        require(
            self.generation_batch_size == self.steps_per_generation * step_size,
            "generation_batch_size",
            f"equal steps_per_generation * per_device_train_batch_size * processes = {self.steps_per_generation * step_size}",
            self.generation_batch_size,
        )
        local = self.per_device_train_batch_size * self.steps_per_generation
        rule = f"divide per_device_train_batch_size * steps_per_generation = {local}"
        require(local % self.num_generations == 0, "num_generations", rule, self.num_generations)
        reuse, window = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        rule = f"divide, or be a multiple of, steps_per_generation * num_iterations = {reuse}"
        require(reuse % window == 0 or window % reuse == 0, "gradient_accumulation_steps", rule, window)

    @property
    def prompts_per_generation(self) -> int:
        """Prompts that one process samples at a time."""
        return self.per_device_train_batch_size * self.steps_per_generation // self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Micro-batches (forward and backward passes) between two generations."""
        return self.steps_per_generation * self.num_iterations

    def image_limits(self) -> ImageLimits:
        return ImageLimits(self.max_image_pixels, self.max_image_bytes, self.allow_image_urls)

    def loss_config(self) -> GRPOLossConfig:
        """What ``grpo_loss`` needs to know: the one place where training arguments become a loss."""
        shared = {f.name: getattr(self, f.name) for f in fields(GRPOLossConfig) if f.init and hasattr(self, f.name)}
        return GRPOLossConfig(**shared, epsilon_low=self.epsilon)
