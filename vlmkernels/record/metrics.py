"""Every metric that the trainer logs: the one description that docs/observability.md and ``vlmkernels report`` are made of."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

EVALUATION = "eval_"  # of evaluation, before names of SAMPLED


class Metric(NamedTuple):
    """name: a pattern, * standing for a name that the run gives. section: of the report. meaning: with ... before it, one more
    number on what the row before is about, which the report folds away."""

    name: str
    section: str
    meaning: str

    @property
    def is_detail(self) -> bool:
        return self.meaning.startswith("...")


# What ``vlmkernels.record.phases.Phases`` divides time among.
PHASES = {
    "data": "rows, chat template, image processor, and their way to the device",
    "generate": "sampling, with the images of a frozen vision tower",
    "reward": "reward functions",
    "wait": "for the slowest process, to compare rewards and to end a checkpoint",
    "old_logps": "log-probabilities of the policy that sampled, where it is not the one that trains",
    "ref_logps": "log-probabilities of the reference",
    "forward": "the policy's forward passes and the loss, which a fused head differentiates too",
    "backward": "its backward passes, and averaging gradients over processes",
    "optimizer": "clipping and the optimiser's step",
    "log": "metrics, pages of completions, loggers",
    "evaluate": "evaluation, with all that it samples and scores",
    "save": "checkpoints",
    "other": "the rest",
}

REWARDS, COMPLETIONS, POLICY, MISMATCH = "Rewards", "Completions", "Policy", "Training and rollout"
OPTIMISER, TIME, WORK = "Optimiser", "Time", "Work"

# fmt: off
SAMPLED = (
    Metric("reward", REWARDS, "weighted sum of a completion's rewards, mean"),
    Metric("reward_std", REWARDS, "its standard deviation"),
    Metric("frac_reward_zero_std", REWARDS, "share of completions whose group got one reward throughout, and teaches nothing"),
    Metric("rewards/*/mean", REWARDS, "a reward function's mean"),
    Metric("rewards/*/unparsed", REWARDS, "share of completions in which it found no answer"),
    Metric("rewards/*/failed", REWARDS, "share of completions that it raised or ran out of time on"),
    Metric("rewards/*/std", REWARDS, "... its standard deviation"),
    Metric("rewards/*/time", REWARDS, "... its seconds per call"),
    Metric("completions/mean_length", COMPLETIONS, "tokens of a completion, mean"),
    Metric("completions/min_length", COMPLETIONS, "... least"),
    Metric("completions/max_length", COMPLETIONS, "... greatest"),
    Metric("completions/clipped_ratio", COMPLETIONS, "share of completions cut off at max_completion_length"),
    Metric("completions/mean_terminated_length", COMPLETIONS, "... of those that ended by themselves, mean"),
    Metric("completions/min_terminated_length", COMPLETIONS, "... of those, least"),
    Metric("completions/max_terminated_length", COMPLETIONS, "... of those, greatest"),
)
METRICS = (
    *SAMPLED,
    Metric("loss", POLICY, "the loss"),
    Metric("policy_loss", POLICY, "its part of the surrogate, without KL and entropy terms"),
    Metric("kl", POLICY, "KL divergence from the reference, mean over tokens (beta > 0)"),
    Metric("entropy", POLICY, "entropy of the next token, mean, in nats"),
    Metric("clip_ratio/low_mean", POLICY, "share of tokens (sequence level: completions) clipped from below"),
    Metric("clip_ratio/low_min", POLICY, "... least of a completion"),
    Metric("clip_ratio/high_mean", POLICY, "share of tokens clipped from above"),
    Metric("clip_ratio/high_max", POLICY, "... greatest of a completion"),
    Metric("clip_ratio/region_mean", POLICY, "share of tokens clipped either way"),
    Metric("cispo_clip_ratio", POLICY, "share of tokens whose ratio is capped (cispo)"),
    Metric("vespo/phi_seq_mean", POLICY, "mean weight of a completion (vespo)"),
    Metric("ratio/mean", POLICY, "policy over the policy that sampled, of a token, mean"),
    Metric("ratio/min", POLICY, "... least"),
    Metric("ratio/max", POLICY, "... greatest"),
    Metric("sampling/sampling_logp_difference/mean", MISMATCH, "difference from the engine's log-probabilities, mean"),
    Metric("sampling/sampling_logp_difference/max", MISMATCH, "... greatest"),
    Metric("sampling/scored_ratio", MISMATCH, "share of tokens that the engine tells a log-probability of"),
    Metric("sampling/effective_sample_size", MISMATCH, "of completions weighted by their ratio, a share of them"),
    Metric("sampling/importance_sampling_ratio/raw_mean", MISMATCH, "ratio of the correction before its bounds, mean"),
    Metric("sampling/importance_sampling_ratio/clipped", MISMATCH, "share of ratios outside of the bounds"),
    Metric("sampling/importance_sampling_ratio/mean", MISMATCH, "ratio as the loss takes it, mean"),
    Metric("sampling/kept_mass/mean", MISMATCH, "probability that sampling left of the vocabulary (top-p, top-k, min-p), mean"),
    Metric("sampling/kept_mass/min", MISMATCH, "... least"),
    Metric("vllm/fingerprint", MISMATCH, "difference of a fixed prompt's log-probabilities in vLLM after an update, relative"),
    Metric("vllm/sync_time", MISMATCH, "... seconds of the update"),
    Metric("tokens", POLICY, "completion tokens in the loss of a micro-batch"),
    Metric("effective_tokens", POLICY, "... whose weight is not 0"),
    Metric("grad_norm", OPTIMISER, "norm of the gradient before clipping"),
    Metric("learning_rate", OPTIMISER, "the learning rate"),
    Metric("epoch", OPTIMISER, "passes over the training prompts"),
    Metric("frac_steps_skipped", OPTIMISER, "share of steps left out, since they were not finite (on_nonfinite)"),
    Metric("frac_samples_replaced", OPTIMISER, "share of prompts in the place of ones that cannot be read (on_bad_sample)"),
    Metric("step_time", TIME, "seconds of an optimiser step's micro-batches on the host, sampling included (TRL's)"),
    *(Metric(f"time/{name}", TIME, f"seconds per optimiser step: {meaning}") for name, meaning in PHASES.items()),
    Metric("tokens_run", WORK, "tokens that the model ran on, per optimiser step, in sampling and every scoring pass"),
    Metric("tokens_if_unshared", WORK, "... with a copy of the prompt for each completion, G·(P + C) a group and pass"),
    Metric("images_run", WORK, "images through the vision tower, per optimiser step"),
    Metric("images_if_unshared", WORK, "... with a copy of the images for each completion, in every pass"),
    Metric("tokens_per_second", WORK, "tokens_run over the time they took, evaluation and checkpoints aside"),
    Metric("num_tokens", WORK, "tokens of prompts and completions sampled so far, a prompt counted for each completion"),
)
# fmt: on
# What transformers adds once, at the end of training or of an evaluation.
SUMMARIES = ("train_*", "eval_*runtime", "eval_*_per_second", "total_flos")


def describe(name: str) -> Metric | None:
    """The row of a metric, or None where none fits; of ``eval_NAME`` (or ``eval_DATASET_NAME``) that of NAME."""
    evaluated = name.startswith(EVALUATION)
    for metric in SAMPLED if evaluated else METRICS:
        if fnmatchcase(name, metric.name):
            return metric
        if evaluated and (name == EVALUATION + metric.name or fnmatchcase(name, f"{EVALUATION}*{metric.name}")):
            return metric
    return None


def order(name: str) -> int:
    """The place of a metric in ``METRICS``; at the end where it has none."""
    metric = describe(name)
    return METRICS.index(metric) if metric else len(METRICS)


def is_summary(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in SUMMARIES)


def markdown(metrics: Iterable[Metric] = METRICS) -> list[str]:
    """The table of docs/observability.md."""
    lines = ["| metric | section | what it is |", "| --- | --- | --- |"]
    return [*lines, *(f"| `{metric.name}` | {metric.section} | {metric.meaning} |" for metric in metrics)]
