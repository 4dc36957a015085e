"""The variants of the objective as rows of tables, and the configuration that selects among them."""

import json
import math
import numbers
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, get_args

from vlmkernels.ops.checks import require_number, require_one_of

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to [-20, 20]: e^20 times any advantage is finite in fp32
MIN_LOGP = -1e4  # log-probabilities are clamped to at least this, so that their differences are finite
VESPO_MIN_LOG_WEIGHT = math.log(1e-8)
MAX_PERCEPTION_KL = 10.0  # bound of a token's perception KL, as in the code of its authors: it is maximized


class Loss(NamedTuple):
    """The parts of a loss type."""

    surrogate: str  # a row of SURROGATES in reference.py, triton.py and csrc/common/surrogate.h
    aggregation: str  # a row of AGGREGATIONS: the weights of the tokens
    source: str  # the paper on arXiv
    level: str = "token"  # the default level of the ratio
    epsilon_high: float | None = None  # the default; None: epsilon_low
    low: str | None = None  # the metrics that report the two statistics of the surrogate
    high: str | None = None


_LOW, _HIGH = "clip_ratio/low", "clip_ratio/high"

LOSSES = {
    "grpo": Loss("ppo_clip", "sequence_mean", "2402.03300", low=_LOW, high=_HIGH),
    "bnpo": Loss("ppo_clip", "token_mean", "2402.03300", low=_LOW, high=_HIGH),
    "dr_grpo": Loss("ppo_clip", "max_length", "2503.20783", low=_LOW, high=_HIGH),
    "dapo": Loss("ppo_clip", "num_items", "2503.14476", low=_LOW, high=_HIGH),
    "cispo": Loss("cispo", "num_items", "2506.13585", epsilon_high=5.0, high="cispo_clip_ratio"),
    "sapo": Loss("sapo", "sequence_mean", "2511.20347"),
    "luspo": Loss("ppo_clip", "sequence_sum", "2602.05261", level="sequence", low=_LOW, high=_HIGH),
    "vespo": Loss("vespo", "num_items", "2602.10693", high="vespo/phi_seq_mean"),
}


class Aggregation(NamedTuple):
    """The weights of the tokens: m, or m / |y| with ``per_length``, divided by a number that is the same for all tokens.

    m is the loss mask, and |y| is the number of tokens of the completion that are in the mask.
    """

    weight: str  # the formula, for the table in the docs
    per_length: bool = False
    sequences: bool = False  # B is a factor of the divisor
    max_length: bool = False  # max_completion_length is a factor
    tokens: bool = False  # the sum of m is a factor
    num_items: bool = False  # num_items is a factor if it is given; else the sum of m is


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
PERCEPTION_WEIGHTS = ("perception_loss_weight", "der_loss_weight1", "der_loss_weight2")

# The settings of papers; see GRPOLossConfig.preset.
PRESETS: dict[str, dict[str, Any]] = {
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
    "papo": {"loss_type": "grpo", "beta": 0.01, "epsilon_high": 0.3, "perception_loss_weight": 0.01},
    "papo_d": {
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "perception_loss_weight": 0.01,
        "der_loss_weight1": 0.03,
        "der_loss_weight2": 0.03,
    },
}
PRESET_SOURCES = {
    "gspo": "2507.18071",
    "two_sided": "2505.07291",
    "high_entropy": "2506.01939",
    "papo": "2507.06448",
    "papo_d": "2507.06448",
}


class Scalars(NamedTuple):
    """The numbers that kernels take as arguments."""

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
    perception_loss_weight: float
    der_loss_weight1: float
    der_loss_weight2: float
    rollout_log_min: float
    rollout_log_max: float
    off_policy_threshold: float


@dataclass(frozen=True)
class GRPOLossConfig:
    """The configuration of the objective. A field that ``trl.GRPOConfig`` also has keeps its name and meaning.

    Args:
        loss_type: a row of ``LOSSES``: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo.
        importance_sampling_level: "token": one ratio per token; "sequence": one ratio per completion, the exponential of its
            mean log-ratio (GSPO); None: the default of the loss, "sequence" for luspo and "token" for the others.
        beta: the weight of the KL term against ``ref_logps``; >= 0.
        kl_estimator: k1, k2 or k3 (http://joschu.net/blog/kl-approx.html).
        use_bias_correction_kl: multiply the KL term by the (differentiable) ratio, https://arxiv.org/abs/2512.02556. The
            default is False, as in the GRPO paper; the default of TRL is True.
        epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]; cispo clips it from above at
            epsilon_high. None: epsilon_low, or 5 for cispo.
        delta: upper bound of the unclipped ratio, https://arxiv.org/abs/2505.07291. None: no bound.
        max_completion_length: the constant by which dr_grpo divides.
        sapo_temperature_pos, sapo_temperature_neg: τ of sapo for advantages > 0 and <= 0.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and λ of vespo for advantages >= 0 and < 0.
        rollout_correction: multiply the policy term by the ratio exp(old_logps - rollout_logps), per token or per sequence:
            "token_truncate" and "sequence_truncate" clamp the ratio to [rollout_clip_min, rollout_clip_max], "token_mask" and
            "sequence_mask" replace a ratio outside of this interval by 0.
        rollout_clip_min, rollout_clip_max: the bounds of this interval; None: no bound.
        rollout_sequence_ratio: the ratio of a sequence is the exponential of the "sum" of its log-ratios, as in TRL, or of
            their "mean", which does not depend on the length.
        off_policy_mask_threshold: in sequences whose mean of log(sampling policy / policy) exceeds this, leave tokens with a
            negative advantage out of the policy term, https://arxiv.org/abs/2512.02556.
        top_entropy_quantile: the fraction of tokens, those with the highest entropy, that enter the policy term,
            https://arxiv.org/abs/2506.01939.
        entropy_coef: subtract this times the mean entropy of these tokens from the loss.
        perception_loss_weight: γ of PAPO, https://arxiv.org/abs/2507.06448: subtract this times an estimate of
            KL(policy || policy given masked images) from the loss of each token: k3 of ``masked_logps``, at most 10.
        der_loss_weight1, der_loss_weight2: η1 and η2 of PAPO: add these times -logps and -masked_logps, which estimate the
            entropies of the two policies, to the loss of each token.
        check_finite: raise an error if an input is not finite. This waits for the device.

    Raises:
        ValueError, TypeError: a value is out of range or has a wrong type, or two values are incompatible.
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
    perception_loss_weight: float = 0.0
    der_loss_weight1: float = 0.0
    der_loss_weight2: float = 0.0
    check_finite: bool = False

    # The fields as JSON, so that a configuration is one argument of the operator (``parse`` reads it). Set per instance;
    # declared as a ClassVar because it is not a field: dataclasses.asdict returns only the arguments.
    text: ClassVar[str]

    def __post_init__(self) -> None:
        require_one_of("loss_type", self.loss_type, LOSSES)
        require_one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        require_one_of("rollout_sequence_ratio", self.rollout_sequence_ratio, SEQUENCE_RATIOS)
        if self.importance_sampling_level is not None:
            require_one_of("importance_sampling_level", self.importance_sampling_level, LEVELS, "None or ")
        if self.rollout_correction is not None:
            require_one_of("rollout_correction", self.rollout_correction, CORRECTIONS, "None or ")
        self._check_types()
        self._check_numbers()
        self._check_combinations()
        object.__setattr__(self, "text", json.dumps(asdict(self)))  # here, because torch.compile cannot trace it

    def _check_types(self) -> None:
        """Check that flags are bools and numbers are finite, and convert numbers of other libraries to Python's.

        JSON and the dispatcher need Python's numbers.
        """
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            kind, *or_none = get_args(field.type) or (field.type,)
            if kind is str or (or_none and value is None):
                continue
            if kind is bool:
                if not isinstance(value, bool):
                    raise TypeError(f"{name} must be a bool, got {value!r}")
                continue
            rule, numeric = ("be an integer", numbers.Integral) if kind is int else ("be a finite number", numbers.Real)
            require_number(name, value, rule, numeric)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            object.__setattr__(self, name, kind(value))

    def _check_numbers(self) -> None:
        for name in ("beta", "epsilon_high", "rollout_clip_min", "off_policy_mask_threshold", *PERCEPTION_WEIGHTS):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        positive = [name for name in self.__dataclass_fields__ if name.startswith(("sapo_", "vespo_"))]
        for name in ("delta", "max_completion_length", "rollout_clip_max", *positive):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        for name in ("epsilon_low", "top_entropy_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        low, high = self.rollout_clip_min, self.rollout_clip_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"rollout_clip_min must be <= rollout_clip_max = {high}, got {low}")

    def _check_combinations(self) -> None:
        if self.aggregation.max_length and self.max_completion_length is None:
            raise ValueError(f"max_completion_length must be given with loss_type = {self.loss_type!r}, got None")
        if self.loss.surrogate == "vespo":
            # The weight of vespo is per sequence already, and the correction enters it as a product over tokens.
            for name, value in (("importance_sampling_level", self.level), ("rollout_correction", self.rollout_correction)):
                if value is not None and not value.startswith("token"):
                    raise ValueError(f"{name} must be one of the token level with loss_type = 'vespo', got {value!r}")

    @property
    def loss(self) -> Loss:
        """The row of ``LOSSES``."""
        return LOSSES[self.loss_type]

    @property
    def aggregation(self) -> Aggregation:
        """The row of ``AGGREGATIONS``."""
        return AGGREGATIONS[self.loss.aggregation]

    @property
    def level(self) -> str:
        """The level of the ratio, "token" or "sequence"."""
        return self.importance_sampling_level or self.loss.level

    @property
    def kl(self) -> str:
        """The row of the table ``KL`` of the backends: "none" without a KL term."""
        return self.kl_estimator if self.beta else "none"

    @property
    def perception(self) -> bool:
        """Whether the loss has the terms of PAPO, which need ``masked_logps``."""
        return bool(self.perception_loss_weight or self.der_loss_weight1 or self.der_loss_weight2)

    @property
    def clip_high(self) -> float:
        """epsilon_high, or its default if it is None."""
        candidates = (self.epsilon_high, self.loss.epsilon_high, self.epsilon_low)
        return next(value for value in candidates if value is not None)

    @property
    def scalars(self) -> Scalars:
        """The numbers that kernels take; infinite where a setting is None."""

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
    def preset(cls, name: str, **changes: Any) -> "GRPOLossConfig":
        """Return the configuration of a paper, a row of ``PRESETS``, with ``changes``.

        Raises:
            ValueError, TypeError: ``name`` is not a row of ``PRESETS``, or as for the constructor.
        """
        require_one_of("preset", name, PRESETS)
        return cls(**PRESETS[name] | changes)

    def replace(self, **changes: Any) -> "GRPOLossConfig":
        """Return a copy with ``changes``."""
        return replace(self, **changes)

    @classmethod
    def from_trl(cls, args: Any) -> "GRPOLossConfig":
        """Return the objective of ``trl.GRPOTrainer`` with ``args``, a ``trl.GRPOConfig``.

        mask_truncated_completions, scale_rewards and reward_weights are ignored: they change the inputs of the loss.

        Raises:
            ValueError: ``args`` sets an option that this objective does not support; the message names it.
            TypeError: ``args`` is not a ``trl.GRPOConfig``.
        """
        try:
            if args.use_adaptive_entropy:
                raise ValueError(
                    "use_adaptive_entropy must be false (change entropy_coef between steps by GRPOLossConfig.replace), got True"
                )
            if args.router_aux_loss_coef:
                raise ValueError(
                    "router_aux_loss_coef must be None or 0 (the model returns the router's loss: add it to this loss),"
                    f" got {args.router_aux_loss_coef}"
                )
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
    """Return the configuration with this ``text``."""
    return GRPOLossConfig(**json.loads(text))


DEFAULT = GRPOLossConfig()

# The presets that need no further settings, made here because torch.compile cannot trace their construction.
_READY = {name: GRPOLossConfig.preset(name) for name, settings in PRESETS.items() if settings["loss_type"] != "dr_grpo"}


def as_config(config: GRPOLossConfig | str) -> GRPOLossConfig:
    """Return a configuration, or the preset of this name."""
    if isinstance(config, GRPOLossConfig):
        return config
    if not isinstance(config, str):
        raise TypeError(f"config must be a GRPOLossConfig or the name of a preset, got {config!r}")
    require_one_of("config", config, PRESETS)
    return _READY[config] if config in _READY else GRPOLossConfig.preset(config)
