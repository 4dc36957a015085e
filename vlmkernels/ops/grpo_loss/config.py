"""What defines the objective: its variants as rows of tables, and the configuration that names them."""

import json
import math
import numbers
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple, get_args

from vlmkernels.ops.checks import require, require_number, require_one_of

MAX_LOG_RATIO = 20.0  # log-ratios count as at most this, either way: e^20 times any advantage is finite in fp32
MIN_LOGP = -1e4  # log-probabilities count as at least this, so that differences of two are finite
VESPO_MIN_LOG_WEIGHT = math.log(1e-8)


class Loss(NamedTuple):
    """A loss type: a surrogate (a row of ``SURROGATES`` in reference.py, triton.py and csrc/common/surrogate.h), how its
    tokens are weighted (a row of ``AGGREGATIONS``), and where it comes from."""

    surrogate: str
    aggregation: str
    source: str
    level: str = "token"  # of the ratio, unless the configuration names one
    epsilon_high: float | None = None  # unless the configuration gives one; None = epsilon_low
    low: str | None = None  # the metrics that the surrogate's two statistics are reported under
    high: str | None = None


_CLIP = {"low": "clip_ratio/low", "high": "clip_ratio/high"}

LOSSES = {
    "grpo": Loss("ppo_clip", "sequence_mean", "2402.03300", **_CLIP),
    "bnpo": Loss("ppo_clip", "token_mean", "2402.03300", **_CLIP),
    "dr_grpo": Loss("ppo_clip", "max_length", "2503.20783", **_CLIP),
    "dapo": Loss("ppo_clip", "num_items", "2503.14476", **_CLIP),
    "cispo": Loss("cispo", "num_items", "2506.13585", epsilon_high=5.0, high="cispo_clip_ratio"),
    "sapo": Loss("sapo", "sequence_mean", "2511.20347"),
    "luspo": Loss("ppo_clip", "sequence_sum", "2602.05261", level="sequence", **_CLIP),
    "vespo": Loss("vespo", "num_items", "2602.10693", high="vespo/phi_seq_mean"),
}


class Aggregation(NamedTuple):
    """The weight of a token is ``m / |y|`` (``per_length``) or ``m``, divided by a number that the whole call shares."""

    weight: str
    per_length: bool = False
    sequences: bool = False  # the divisor has the factor B
    max_length: bool = False  # ... max_completion_length
    tokens: bool = False  # ... the sum of m
    num_items: bool = False  # ... num_items, where it is given; else the sum of m


AGGREGATIONS = {
    "sequence_mean": Aggregation("m / (B max(|y|, 1))", per_length=True, sequences=True),
    "sequence_sum": Aggregation("m / B", sequences=True),
    "token_mean": Aggregation("m / Σm", tokens=True),
    "max_length": Aggregation("m / (B max_completion_length)", sequences=True, max_length=True),
    "num_items": Aggregation("m / num_items", num_items=True),
}

LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SEQUENCE_RATIOS = ("sum", "mean")

# Settings of the papers, by name; see GRPOLossConfig.preset.
PRESETS = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "two_sided": {"loss_type": "grpo", "delta": 4.0, "beta": 0.001},
    "high_entropy": {"loss_type": "dapo", "epsilon_high": 0.28, "top_entropy_quantile": 0.2},
}
PRESET_SOURCES = {"gspo": "2507.18071", "two_sided": "2505.07291", "high_entropy": "2506.01939"}


class Scalars(NamedTuple):
    """The numbers that kernels take, all of them at run time."""

    epsilon_low: float
    epsilon_high: float
    delta: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    beta: float
    rollout_log_min: float
    rollout_log_max: float
    off_policy_threshold: float


@dataclass(frozen=True)
class GRPOLossConfig:
    """What defines the objective. Field names and meanings are TRL's (``trl.GRPOConfig``) where it has them.

    Args:
        loss_type: a row of ``LOSSES``: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.
        importance_sampling_level: "token": a ratio per token; "sequence": the exponential of a completion's mean log-ratio
            (GSPO); None: the loss's own, "sequence" for luspo and "token" for the rest.
        beta: weight of the KL term against ``ref_logps``; >= 0.
        kl_estimator: k1, k2 or k3 (http://joschu.net/blog/kl-approx.html).
        use_bias_correction_kl: multiply the KL term by the (differentiable) ratio, https://arxiv.org/abs/2512.02556. Off by
            default, as in the GRPO paper; TRL's default is on.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]; for cispo it is clipped from
            above at epsilon_high. None: epsilon_low, or 5 for cispo.
        delta: also cap the unclipped ratio at this, https://arxiv.org/abs/2505.07291.
        max_completion_length: the constant by which dr_grpo divides.
        sapo_temperature_pos, sapo_temperature_neg: τ of sapo for advantages > 0 and <= 0.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and λ of vespo for advantages >= 0 and < 0.
        rollout_correction: weight the policy term by the ratio of ``old_logps`` to ``rollout_logps``, per token or per
            sequence, "truncate"d to [rollout_clip_min, rollout_clip_max] or, outside of it, "mask"ed to 0.
        rollout_clip_min, rollout_clip_max: the bounds; None = none.
        rollout_sequence_ratio: a sequence's ratio is the exponential of the "sum" of its log-ratios, as in TRL, or of their
            "mean", which does not depend on the length.
        off_policy_mask_threshold: leave tokens with a negative advantage out of the policy term in sequences whose mean of
            log(sampling policy / policy) exceeds this, https://arxiv.org/abs/2512.02556.
        top_entropy_quantile: only the tokens of this share with the greatest entropy enter the policy term,
            https://arxiv.org/abs/2506.01939.
        entropy_coef: subtract this times the mean entropy of those tokens from the loss.
        check_finite: raise on an input that is not finite. Waits for the device.

    Raises:
        ValueError, TypeError: a value is out of range or of another type, or two do not go together; the message names
            argument, rule and value.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    use_bias_correction_kl: bool = False
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    rollout_correction: str | None = None
    rollout_clip_min: float | None = None
    rollout_clip_max: float | None = 3.0
    rollout_sequence_ratio: str = "sum"
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name, rows in (
            ("loss_type", LOSSES),
            ("kl_estimator", KL_ESTIMATORS),
            ("rollout_sequence_ratio", SEQUENCE_RATIOS),
        ):
            require_one_of(name, getattr(self, name), rows)
        for name, rows in (("importance_sampling_level", LEVELS), ("rollout_correction", CORRECTIONS)):
            if getattr(self, name) is not None:
                require_one_of(name, getattr(self, name), rows, "None or ")
        self._check_types()
        self._check_numbers()
        self._check_combinations()
        # The fields as JSON: how a configuration passes the dispatcher as one argument (``parse`` reads it). No field, so that
        # dataclasses.asdict gives back the arguments; made here, because torch.compile cannot trace how it is made.
        object.__setattr__(self, "text", json.dumps(asdict(self)))

    def _check_types(self) -> None:
        """Flags are bools and numbers finite; those of other libraries become Python's, which JSON and the dispatcher take."""
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            kind, *or_none = get_args(field.type) or (field.type,)
            if kind is str or (or_none and value is None):
                continue
            if kind is bool:
                require(isinstance(value, bool), name, "be a bool", repr(value), TypeError)
                continue
            rule, numeric = ("be an integer", numbers.Integral) if kind is int else ("be a finite number", numbers.Real)
            require_number(name, value, rule, numeric)
            require(math.isfinite(value), name, rule, value)
            object.__setattr__(self, name, kind(value))

    def _check_numbers(self) -> None:
        for name in ("beta", "epsilon_high", "rollout_clip_min", "off_policy_mask_threshold"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, "be >= 0", value)
        positive = [name for name in self.__dataclass_fields__ if name.startswith(("sapo_", "vespo_"))]
        for name in ("delta", "max_completion_length", "rollout_clip_max", *positive):
            value = getattr(self, name)
            require(value is None or value > 0, name, "be > 0", value)
        for name in ("epsilon_low", "top_entropy_quantile"):
            require(0 <= getattr(self, name) <= 1, name, "be in [0, 1]", getattr(self, name))
        low, high = self.rollout_clip_min, self.rollout_clip_max
        require(None in (low, high) or low <= high, "rollout_clip_min", f"be <= rollout_clip_max = {high}", low)

    def _check_combinations(self) -> None:
        needs_length = AGGREGATIONS[self.loss.aggregation].max_length
        rule = f"be given with loss_type = {self.loss_type!r}"
        require(not needs_length or self.max_completion_length is not None, "max_completion_length", rule, None)
        if self.loss.surrogate == "vespo":
            # Its weight is that of the sequence already, and the correction enters as a product over tokens.
            for name, value in (("importance_sampling_level", self.level), ("rollout_correction", self.rollout_correction)):
                rule = "be one of the token level with loss_type = 'vespo'"
                require(value is None or value.startswith("token"), name, rule, repr(value))

    @property
    def loss(self) -> Loss:
        return LOSSES[self.loss_type]

    @property
    def aggregation(self) -> Aggregation:
        return AGGREGATIONS[self.loss.aggregation]

    @property
    def level(self) -> str:
        """Of the ratio: "token" or "sequence"."""
        return self.importance_sampling_level or self.loss.level

    @property
    def kl(self) -> str:
        """The row of the table of KL estimators: "none" without a KL term."""
        return self.kl_estimator if self.beta else "none"

    @property
    def clip_high(self) -> float:
        """epsilon_high, or what stands for it where it is None."""
        candidates = (self.epsilon_high, self.loss.epsilon_high, self.epsilon_low)
        return next(value for value in candidates if value is not None)

    @property
    def scalars(self) -> Scalars:
        def log(value: float | None, default: float) -> float:
            return default if value is None else math.log(value) if value else -math.inf

        threshold = self.off_policy_mask_threshold
        shared = {name: getattr(self, name) for name in Scalars._fields if name in self.__dataclass_fields__}
        return Scalars(
            **shared
            | {
                "epsilon_high": self.clip_high,
                "delta": math.inf if self.delta is None else self.delta,
                "rollout_log_min": log(self.rollout_clip_min, -math.inf),
                "rollout_log_max": log(self.rollout_clip_max, math.inf),
                "off_policy_threshold": math.inf if threshold is None else threshold,
            }
        )

    @classmethod
    def preset(cls, name: str, **changes) -> "GRPOLossConfig":
        """The settings of a paper (a row of ``PRESETS``), with ``changes``."""
        require_one_of("preset", name, PRESETS)
        return cls(**PRESETS[name] | changes)

    def replace(self, **changes) -> "GRPOLossConfig":
        return replace(self, **changes)

    @classmethod
    def from_trl(cls, args) -> "GRPOLossConfig":
        """The objective that ``args``, a ``trl.GRPOConfig``, asks of ``trl.GRPOTrainer``.

        Not in it, because they shape the inputs: mask_truncated_completions, scale_rewards, reward_weights.

        Raises:
            ValueError: ``args`` asks for something that this objective does not have; the message names it.
            TypeError: ``args`` is no ``trl.GRPOConfig``.
        """
        try:
            rule = "be false: whoever holds entropy_coef changes it, between steps, with GRPOLossConfig.replace"
            require(not args.use_adaptive_entropy, "use_adaptive_entropy", rule, args.use_adaptive_entropy)
            rule = "be None or 0: the router's loss comes from the model, to be added to this one"
            require(not args.router_aux_loss_coef, "router_aux_loss_coef", rule, args.router_aux_loss_coef)
            corrected = args.use_vllm and args.vllm_importance_sampling_correction
            special = {"epsilon_high", "max_completion_length"}
            same = set(cls.__dataclass_fields__) & set(args.__dataclass_fields__) - special
            return cls(
                **{name: getattr(args, name) for name in same},
                epsilon_low=args.epsilon,
                epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
                max_completion_length=args.max_completion_length if args.loss_type == "dr_grpo" else None,
                rollout_correction=args.vllm_importance_sampling_mode if corrected else None,
                rollout_clip_min=args.vllm_importance_sampling_clip_min,
                rollout_clip_max=args.vllm_importance_sampling_clip_max,
            )
        except AttributeError as error:
            raise TypeError(f"args must be a trl.GRPOConfig, got {type(args).__name__}: {error}") from error


@lru_cache(maxsize=256)
def parse(text: str) -> GRPOLossConfig:
    """The configuration whose ``text`` this is."""
    return GRPOLossConfig(**json.loads(text))


DEFAULT = GRPOLossConfig()
