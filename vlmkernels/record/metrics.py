"""Every metric that the trainer logs. docs/observability.md and ``vlmkernels report`` are generated from these tables."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

EVAL_PREFIX = "eval_"


class LoggedMetric(NamedTuple):
    """One metric of the trainer's log.

    name: a pattern, where * stands for the name of a reward function. section: the section of the report. meaning: a short
    description. is_detail: whether the report hides the metric behind "more", because it refines another one.
    """

    name: str
    section: str
    meaning: str
    is_detail: bool = False


# The phases that ``vlmkernels.record.phases.Phases`` divides time into.
PHASES = {
    "data": "reading rows, the chat template, the image processor and the transfer to the device",
    "generate": "sampling completions, and encoding images if the vision tower is frozen",
    "image_use": "measuring how much predictions depend on images (image_use_steps)",
    "reward": "calling the reward functions",
    "wait": "waiting for other processes, for example before rewards are compared",
    "old_logps": "log-probabilities under the policy that sampled, for micro-batches after the first optimizer step",
    "ref_logps": "log-probabilities under the reference model",
    "teacher": "forward passes of the teacher",
    "forward": "forward passes and loss of the policy; a fused head computes its gradients here too",
    "backward": "backward passes of the policy and the averaging of gradients over processes",
    "optimizer": "gradient clipping and the optimizer step",
    "log": "computing metrics, writing pages of completions, calling loggers",
    "evaluate": "evaluation, including its sampling and scoring",
    "save": "writing checkpoints",
    "other": "everything else",
}

REWARDS, COMPLETIONS, TOOLS, POLICY, MISMATCH = "Rewards", "Completions", "Tools", "Policy", "Training and rollout"
OPTIMIZER, TIME, THROUGHPUT = "Optimizer", "Time", "Throughput"
DYNAMIC_SAMPLING = "Dynamic sampling"

# fmt: off
# Metrics of sampled completions, which evaluation logs too, with EVAL_PREFIX.
SAMPLED = (
    LoggedMetric("reward", REWARDS, "mean over completions of the weighted sum of rewards"),
    LoggedMetric("reward_std", REWARDS, "standard deviation over completions of the weighted sum of rewards"),
    LoggedMetric("frac_reward_zero_std", REWARDS, "share of completions whose group has equal rewards, and so no advantage"),
    LoggedMetric("rewards/*/mean", REWARDS, "mean of one reward function"),
    LoggedMetric("rewards/*/unparsed", REWARDS, "share of completions in which the reward function found no answer"),
    LoggedMetric("rewards/*/failed", REWARDS, "share of completions for which the reward function raised or timed out"),
    LoggedMetric("rewards/*/std", REWARDS, "standard deviation of one reward function", is_detail=True),
    LoggedMetric("rewards/*/time", REWARDS, "seconds per call of the reward function", is_detail=True),
    LoggedMetric("completions/mean_length", COMPLETIONS, "mean length of completions, in tokens"),
    LoggedMetric("completions/min_length", COMPLETIONS, "length of the shortest completion", is_detail=True),
    LoggedMetric("completions/max_length", COMPLETIONS, "length of the longest completion", is_detail=True),
    LoggedMetric("completions/clipped_ratio", COMPLETIONS, "share of completions cut off at max_completion_length"),
    LoggedMetric("completions/mean_terminated_length", COMPLETIONS, "mean length of completions that ended by themselves",
                 is_detail=True),
    LoggedMetric("completions/min_terminated_length", COMPLETIONS, "length of the shortest completion that ended by itself",
                 is_detail=True),
    LoggedMetric("completions/max_terminated_length", COMPLETIONS, "length of the longest completion that ended by itself",
                 is_detail=True),
    LoggedMetric("tools/call_frequency", TOOLS, "tool calls per completion"),
    LoggedMetric("tools/failure_frequency", TOOLS, "share of tool calls that failed"),
    LoggedMetric("tools/turns/mean", TOOLS, "mean number of turns of the model"),
    LoggedMetric("tools/turns/max", TOOLS, "largest number of turns of the model", is_detail=True),
    LoggedMetric("tools/frac_sampled_tokens", TOOLS, "share of the tokens of completions that the model sampled"),
    LoggedMetric("tools/seconds", TOOLS, "seconds that tools ran per completion", is_detail=True),
    LoggedMetric("tools/refused", TOOLS, "share of completions that ended because a result did not fit"),
    LoggedMetric("tools/lost_environments", TOOLS, "share of completions whose environment was lost; they are not scored"),
    LoggedMetric("tools/*/calls", TOOLS, "calls of one tool per completion; unknown: calls of a tool that does not exist"),
    LoggedMetric("tools/*/failures", TOOLS, "share of the calls of one tool that failed", is_detail=True),
)
METRICS = (
    *SAMPLED,
    LoggedMetric("dynamic_sampling/kept", DYNAMIC_SAMPLING, "share of the sampled groups whose rewards differ"),
    LoggedMetric("dynamic_sampling/filled", DYNAMIC_SAMPLING, "share of the groups of a batch whose rewards are equal"),
    LoggedMetric("dynamic_sampling/rounds", DYNAMIC_SAMPLING, "rounds of sampling per batch"),
    LoggedMetric("dynamic_sampling/prompts_sampled", DYNAMIC_SAMPLING, "prompts sampled per batch, on all processes"),
    LoggedMetric("dynamic_sampling/tokens_per_kept", DYNAMIC_SAMPLING,
                 "tokens sampled per completion of a batch that is in a group whose rewards differ"),
    LoggedMetric("dynamic_sampling/seconds_per_kept", DYNAMIC_SAMPLING,
                 "seconds of sampling and scoring per completion of a batch that is in a group whose rewards differ"),
    LoggedMetric("dynamic_sampling/epochs", DYNAMIC_SAMPLING, "passes over the training prompts, with all that were sampled"),
    LoggedMetric("reward_length_correlation", REWARDS,
                 "correlation of the rewards and the lengths of completions of the same group"),
    LoggedMetric("completions/frac_special_tokens", COMPLETIONS,
                 "share of sampled tokens that are padding, image or video tokens, or have no text"),
    LoggedMetric("completions/frac_repeated", COMPLETIONS,
                 "share of the sequences of four tokens that occurred before in the same completion"),
    LoggedMetric("loss", POLICY, "the loss"),
    LoggedMetric("policy_loss", POLICY, "the loss without its KL and entropy terms"),
    LoggedMetric("kl", POLICY, "KL divergence from the reference, mean over tokens (beta > 0)"),
    LoggedMetric("entropy", POLICY, "entropy of the next-token distribution, mean over tokens, in nats"),
    LoggedMetric("image_use/kl", POLICY,
                 "KL divergence from the predictions with grey images, mean over tokens of a few completions, in nats"),
    LoggedMetric("perception/kl", POLICY, "KL divergence from the policy with masked images, mean over tokens (PAPO)"),
    LoggedMetric("perception/masked_entropy", POLICY, "mean of -log-probability of the tokens with masked images (PAPO)"),
    LoggedMetric("perception/clip_ratio", POLICY, "share of tokens whose perception KL is capped (PAPO)", is_detail=True),
    LoggedMetric("perception/tokens", POLICY, "tokens of a micro-batch that are scored with masked images (PAPO)",
                 is_detail=True),
    LoggedMetric("clip_ratio/low_mean", POLICY, "share of tokens (sequence level: completions) clipped at the lower bound"),
    LoggedMetric("clip_ratio/low_min", POLICY, "smallest share of tokens of one completion clipped at the lower bound",
                 is_detail=True),
    LoggedMetric("clip_ratio/high_mean", POLICY, "share of tokens (sequence level: completions) clipped at the upper bound"),
    LoggedMetric("clip_ratio/high_max", POLICY, "largest share of tokens of one completion clipped at the upper bound",
                 is_detail=True),
    LoggedMetric("clip_ratio/region_mean", POLICY, "share of tokens (sequence level: completions) clipped at either bound"),
    LoggedMetric("cispo_clip_ratio", POLICY, "share of tokens whose ratio is capped (cispo)"),
    LoggedMetric("vespo/phi_seq_mean", POLICY, "mean weight of a completion (vespo)"),
    LoggedMetric("ratio/mean", POLICY, "mean over tokens of the probability ratio of the policy to the policy that sampled"),
    LoggedMetric("ratio/min", POLICY, "smallest probability ratio of a token", is_detail=True),
    LoggedMetric("ratio/max", POLICY, "largest probability ratio of a token", is_detail=True),
    LoggedMetric("distillation/divergence", POLICY, "divergence of the policy from the teacher, mean over tokens, in nats"),
    LoggedMetric("sampling/sampling_logp_difference/mean", MISMATCH,
                 "mean absolute difference between the trainer's and the engine's log-probabilities"),
    LoggedMetric("sampling/sampling_logp_difference/max", MISMATCH,
                 "largest absolute difference between the trainer's and the engine's log-probabilities", is_detail=True),
    LoggedMetric("sampling/scored_ratio", MISMATCH, "share of tokens for which the engine returned a log-probability"),
    LoggedMetric("sampling/effective_sample_size", MISMATCH,
                 "effective sample size of completions weighted by their ratio, as a share of their number"),
    LoggedMetric("sampling/importance_sampling_ratio/raw_mean", MISMATCH, "mean correction ratio, before its bounds apply"),
    LoggedMetric("sampling/importance_sampling_ratio/clipped", MISMATCH, "share of correction ratios outside their bounds"),
    LoggedMetric("sampling/importance_sampling_ratio/mean", MISMATCH, "mean correction ratio that the loss is multiplied by"),
    LoggedMetric("sampling/kept_mass/mean", MISMATCH,
                 "mean probability of the tokens that top_p, top_k, min_p and banned tokens leave to sample from"),
    LoggedMetric("sampling/kept_mass/min", MISMATCH, "smallest probability of the tokens left to sample from", is_detail=True),
    LoggedMetric("vllm/fingerprint", MISMATCH,
                 "relative difference between vLLM's and the trainer's log-probabilities of a fixed prompt, after a sync"),
    LoggedMetric("vllm/sync_time", MISMATCH, "seconds to send the weights to vLLM", is_detail=True),
    LoggedMetric("tokens", POLICY, "completion tokens in the loss of a micro-batch"),
    LoggedMetric("effective_tokens", POLICY, "completion tokens of a micro-batch whose weight in the loss is not 0",
                 is_detail=True),
    LoggedMetric("grad_norm", OPTIMIZER, "norm of the gradient before clipping"),
    LoggedMetric("learning_rate", OPTIMIZER, "the learning rate"),
    LoggedMetric("epoch", OPTIMIZER, "passes over the training prompts; with dynamic sampling, without prompts beyond a batch"),
    LoggedMetric("frac_weights_changed", OPTIMIZER, "share of the weights with a gradient that an optimizer step changed"),
    LoggedMetric("frac_steps_skipped", OPTIMIZER, "share of steps skipped because the loss or a gradient was not finite"),
    LoggedMetric("frac_samples_replaced", OPTIMIZER, "share of prompts that replaced a row that cannot be read"),
    LoggedMetric("step_time", TIME, "host seconds of an optimizer step's micro-batches, including sampling (as in TRL)"),
    *(LoggedMetric(f"time/{name}", TIME, f"seconds per optimizer step: {meaning}") for name, meaning in PHASES.items()),
    LoggedMetric("tokens_run", THROUGHPUT, "tokens that the model processed per optimizer step, in all passes"),
    LoggedMetric("tokens_if_unshared", THROUGHPUT,
                 "tokens per optimizer step if each completion had its own copy of the prompt: G·(P + C) per pass",
                 is_detail=True),
    LoggedMetric("images_run", THROUGHPUT, "images that the vision tower processed per optimizer step"),
    LoggedMetric("images_if_unshared", THROUGHPUT,
                 "images per optimizer step if each completion had its own copy of them, in all passes",
                 is_detail=True),
    LoggedMetric("image_pixels", THROUGHPUT,
                 "mean of width x height of images as the model sees them, with image_resolution_schedule"),
    LoggedMetric("tokens_per_second", THROUGHPUT, "tokens_run divided by the time without evaluation and checkpoints"),
    LoggedMetric("num_tokens", THROUGHPUT,
                 "tokens of prompts and completions sampled since training began; a prompt counts once per completion"),
)
# fmt: on
# Summaries that transformers logs once, at the end of training or of an evaluation.
SUMMARIES = ("train_*", "eval_*runtime", "eval_*_per_second", "total_flos")


def describe(name: str) -> LoggedMetric | None:
    """Return the row of a metric, or None if there is none. ``eval_NAME`` and ``eval_DATASET_NAME`` have the row of NAME."""
    is_evaluation = name.startswith(EVAL_PREFIX)
    for metric in SAMPLED if is_evaluation else METRICS:
        if fnmatchcase(name, metric.name):
            return metric
        if is_evaluation and (name == EVAL_PREFIX + metric.name or fnmatchcase(name, f"{EVAL_PREFIX}*{metric.name}")):
            return metric
    return None


def order(name: str) -> int:
    """Return the position of a metric in ``METRICS``, or the length of ``METRICS`` if it has no row; a sort key."""
    metric = describe(name)
    return METRICS.index(metric) if metric else len(METRICS)


def is_summary(name: str) -> bool:
    """Whether transformers logs ``name`` once, at the end of training or of an evaluation."""
    return any(fnmatchcase(name, pattern) for pattern in SUMMARIES)


def markdown(metrics: Iterable[LoggedMetric] = METRICS) -> list[str]:
    """Return the lines of the table in docs/observability.md."""
    lines = ["| metric | section | description |", "| --- | --- | --- |"]
    return [*lines, *(f"| `{metric.name}` | {metric.section} | {metric.meaning} |" for metric in metrics)]
