"""Contracts of the loss: its value, its gradient, and the changes of a batch that must not change them."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.batches import LossBatch, code, construct
from vlmkernels.conformance.contract import Case, Violation, close, contract
from vlmkernels.conformance.objective import (
    PER_TOKEN,
    LossValue,
    add_padding,
    close_holes,
    expected_loss,
    finite_differences,
    first_step,
    loss_and_gradient,
    map_tensors,
    micro_batches,
    repeat_tokens,
    select_rows,
    set_masked,
    tolerances,
)
from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.config import LOSSES

PAPERS = (
    "arXiv: "
    + ", ".join(f"{row.source} ({name})" for name, row in LOSSES.items())
    + "; of KL terms, corrections and options: the docstring of GRPOLossConfig"
)
ROUNDING = "4 eps of the dtype, times the sum over tokens of weight * (|A| (1 + ratio) + beta (exp(x) + x^2 + 1)) (1 + |logp|)"
TWICE = "twice the rounding error of loss/value, because both sides are the adapter's"

# Ratios are inside and outside of the clip bounds for advantages of both signs, per token and per sequence. The values outside
# of the mask are such that their ratios, KL terms and corrections are large.
WHOLE = LossBatch(
    logps=torch.tensor(
        [[-2.0, -1.375, -0.625, -1.75], [-1.75, -1, -1.875, -0.5], [-0.75, -0.5, -6, -0.5], [-1, -1.5, -0.5, -6]]
    ),
    advantages=torch.tensor([1.5, -1.0, -0.5, 2.0]),
    loss_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool(),
    old_logps=torch.tensor(
        [[-2.5, -1, -0.75, -3], [-0.5, -1.25, -2, -4.5], [-2.25, -4.5, -0.5, -4.5], [-0.5, -1.75, -4.5, -0.5]]
    ),
    ref_logps=torch.tensor([[-2.5, -1.125, -1, -0.75], [-1, -1.5, -1.5, -3], [-1.75, -3, -0.5, -3], [-0.5, -2.25, -3, -0.5]]),
    rollout_logps=torch.tensor(
        [[-2.75, -0.5, -1.25, -4.25], [-0.75, -1, -2.5, -0.5], [-1.75, -0.5, -6, -0.5], [-1, -2, -0.5, -6]]
    ),
    entropy=torch.tensor([[0.5, 1.5, 0.25, 2], [1, 0.75, 1.25, 9], [1.75, 9, 9, 9], [0.125, 0.875, 9, 9]]),
)
# Two completions of two tokens, one of which is padding.
SMALL = map_tensors(select_rows(WHOLE, (2, 3))[0], lambda x: x[:, :2].contiguous(), (*PER_TOKEN, "loss_mask"))
MASKS = {
    "padding": WHOLE.loss_mask,
    "holes": torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool(),
}

# The settings of all cases: unequal bounds, so that exchanging them shows.
BOUNDS = {"epsilon_low": 0.2, "epsilon_high": 0.3}
BY_LOSS: dict[str, dict[str, Any]] = {
    "cispo": {"epsilon_high": 2.0},
    "dr_grpo": {"max_completion_length": 8},
    "sapo": {"sapo_temperature_neg": 1.25},  # exact in fp32, the dtype that torch.where gives to two numbers
}
BETA = 0.25

# The options that leave out tokens or completions of the policy term, and none of the KL term.
OF_POLICY_TERM = ("top_entropy_quantile", "off_policy_mask_threshold")
# The options that act only with a rollout correction, and how its name starts.
OF_CORRECTIONS = {"rollout_sequence_ratio": "sequence", "rollout_clip_min": "", "rollout_clip_max": ""}


def settings(loss_type: str, level: str, **others: Any) -> GRPOLossConfig:
    return GRPOLossConfig(loss_type, level, **BOUNDS | BY_LOSS.get(loss_type, {}) | others)


def with_inputs_of(config: GRPOLossConfig, batch: LossBatch) -> LossBatch:
    """Leave out the tensors that the configuration does not read."""
    used = {
        "ref_logps": config.beta > 0,
        "rollout_logps": config.rollout_correction is not None,
        "entropy": config.top_entropy_quantile < 1 or config.entropy_coef != 0,
    }
    return replace(batch, **{name: None for name, is_used in used.items() if not is_used})


def case(name: str, config: GRPOLossConfig, batch: LossBatch = WHOLE, **others: Any) -> Case:
    return Case(name, {"batch": with_inputs_of(config, batch), "config": config, **others})


def cast(batch: LossBatch, dtype: torch.dtype) -> LossBatch:
    """Return the log-probabilities and entropies in ``dtype``; advantages stay in fp32, as rewards are."""
    return map_tensors(replace(batch, advantages=batch.advantages.float()), lambda x: x.to(dtype))


def first_dtype(adapter: Adapter, batch: LossBatch) -> LossBatch:
    return cast(batch, adapter.loss_dtypes[0])


def objectives(adapter: Adapter) -> Iterator[tuple[str, str, str]]:
    """Yield a name, a loss type and a level. The weights of vespo are per sequence already."""
    for loss_type in adapter.loss_types:
        for level in adapter.levels:
            if (loss_type, level) != ("vespo", "sequence"):
                yield f"{loss_type}-{level}", loss_type, level


def kl_terms(adapter: Adapter) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", {}
    for name in adapter.kl_estimators:
        yield f"-{name}", {"beta": BETA, "kl_estimator": name}


def corrections(adapter: Adapter, loss_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the corrections. That of vespo is a product over tokens."""
    yield "", {}
    for name in adapter.corrections:
        if loss_type != "vespo" or name.startswith("token"):
            yield f"-{name}", {"rollout_correction": name}


def prerequisites(adapter: Adapter, loss_type: str, option: str) -> list[dict[str, Any]]:
    """Return the settings with which an option acts on a loss type; none if it does not act on it."""
    if option.startswith(("sapo", "vespo")):
        return [{}] if option.startswith(loss_type) else []
    if option == "delta":
        return [{}] if LOSSES[loss_type].surrogate == "ppo_clip" else []
    if option == "use_bias_correction_kl":
        return [term for _, term in kl_terms(adapter) if term]
    if option in OF_CORRECTIONS:
        terms = [term for _, term in corrections(adapter, loss_type) if term]
        return [term for term in terms if term["rollout_correction"].startswith(OF_CORRECTIONS[option])]
    return [{}]


def options(adapter: Adapter, loss_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the options that act on this loss type, with the first settings with which they do."""
    given = [*adapter.options.items()]
    if "delta" in adapter.options:
        given.append(("delta", 1.1))  # below 1 + epsilon_high, so that the clipped ratio can be the smaller one
    for name, content in given:
        for needed in prerequisites(adapter, loss_type, name)[:1]:
            yield f"-{name}={content}", {**needed, name: content}


def masked(adapter: Adapter) -> Iterator[tuple[str, LossBatch]]:
    for mask in (name for name in MASKS if name in adapter.masks):
        yield "" if mask == "padding" else f"-{mask}", first_dtype(adapter, replace(WHOLE, loss_mask=MASKS[mask]))


def smallest(adapter: Adapter) -> Iterator[Case]:
    for name, loss_type, level in objectives(adapter):
        yield case(f"{name}-2x2", settings(loss_type, level), first_dtype(adapter, SMALL))


def further(adapter: Adapter) -> Iterator[Case]:
    """Yield each objective with each option and each further dtype."""
    for name, loss_type, level in objectives(adapter):
        for option_name, option in options(adapter, loss_type):
            terms = kl_terms(adapter) if {*option} & {*OF_POLICY_TERM} else [("", {})]
            for kl_name, kl in itertools.islice(terms, 2):
                config = settings(loss_type, level, **option, **kl)
                yield case(f"{name}{option_name}{kl_name}", config, first_dtype(adapter, WHOLE))
        for dtype in adapter.loss_dtypes[1:]:
            yield case(f"{name}-{str(dtype).removeprefix('torch.')}", settings(loss_type, level), cast(WHOLE, dtype))


def products(adapter: Adapter) -> Iterator[Case]:
    """Yield the product of objectives, KL terms, corrections and masks; and each option and dtype."""
    yield from smallest(adapter)
    for name, loss_type, level in objectives(adapter):
        parts = (kl_terms(adapter), corrections(adapter, loss_type), masked(adapter))
        for (kl_name, kl), (correction_name, correction), (mask_name, batch) in itertools.product(*parts):
            yield case(f"{name}{kl_name}{correction_name}{mask_name}", settings(loss_type, level, **kl, **correction), batch)
    yield from further(adapter)


def one_at_a_time(adapter: Adapter) -> Iterator[Case]:
    """Yield each objective with each KL term, correction, mask, option and dtype by itself."""
    yield from smallest(adapter)
    for name, loss_type, level in objectives(adapter):
        for mask_name, batch in masked(adapter):
            yield case(f"{name}{mask_name}", settings(loss_type, level), batch)
        for term_name, term in (*kl_terms(adapter), *corrections(adapter, loss_type)):
            if term:
                yield case(f"{name}{term_name}", settings(loss_type, level, **term), first_dtype(adapter, WHOLE))
    yield from further(adapter)


def script(batch: LossBatch, config: GRPOLossConfig, *lines: str) -> str:
    return "\n".join((f"batch = {batch!r}", f"config = {construct(config)}", *lines))


def against_oracle(batch: LossBatch, config: GRPOLossConfig) -> str:
    lines = ('print("got", loss_and_gradient(adapter, batch, config))', 'print("expected", expected_loss(batch, config))')
    return script(batch, config, *lines)


def agree(got: LossValue, expected: LossValue, allowed: LossValue) -> None:
    close("loss", got.loss, expected.loss, allowed.loss)
    close("gradient", got.gradient, expected.gradient, allowed.gradient)
    close("gradient outside of the mask", got.outside, 0.0, 0.0)


@contract(
    "loss/value",
    "loss",
    source=PAPERS,
    tolerance=ROUNDING,
    cases=products,
    reproduce=against_oracle,
)
def value(adapter: Adapter, batch: LossBatch, config: GRPOLossConfig) -> None:
    """The loss is that of the paper, for every combination of settings that the adapter declares."""
    logps = batch.logps.detach().clone().requires_grad_()
    got = adapter.loss(replace(batch, logps=logps), config)
    close("loss", got, expected_loss(batch, config).loss, tolerances(batch, config).loss)


@contract(
    "loss/gradient",
    "loss",
    source=PAPERS,
    tolerance=f"for each token, {ROUNDING}; 0 outside of the mask",
    cases=one_at_a_time,
    reproduce=against_oracle,
)
def gradient(adapter: Adapter, batch: LossBatch, config: GRPOLossConfig) -> None:
    """The gradient by log-probabilities is that of the paper, and exactly 0 outside of the loss mask."""
    got = loss_and_gradient(adapter, batch, config)
    close("gradient", got.gradient, expected_loss(batch, config).gradient, tolerances(batch, config).gradient)


def differentiable(adapter: Adapter) -> Iterator[Case]:
    """Yield fp64 cases: each objective, and each KL term and option with one loss type.

    cispo and vespo are left out: they multiply the gradient of the log-probability by a detached weight, so that their gradient
    is not the derivative of their value.
    """
    seen = set()
    for name, loss_type, level in objectives(adapter) if torch.float64 in adapter.loss_dtypes else ():
        if LOSSES[loss_type].surrogate not in ("cispo", "vespo"):
            for term_name, term in (*kl_terms(adapter), *options(adapter, loss_type)):
                if not term or (term_name, level) not in seen:
                    seen.add((term_name, level))
                    yield case(f"{name}{term_name}", settings(loss_type, level, **term), cast(WHOLE, torch.float64))


def against_differences(batch: LossBatch, config: GRPOLossConfig) -> str:
    return script(
        batch,
        config,
        'print("got", loss_and_gradient(adapter, batch, config).gradient)',
        'print("expected", finite_differences(adapter, batch, config))',
    )


@contract(
    "loss/finite_differences",
    "loss",
    source="the definition of the derivative",
    tolerance="64 eps^(2/3) of fp64, times the magnitudes of loss/value: truncation and rounding of a central difference",
    cases=differentiable,
    reproduce=against_differences,
)
def differences(adapter: Adapter, batch: LossBatch, config: GRPOLossConfig) -> None:
    """The gradient is the derivative of the adapter's own loss, in fp64."""
    right = finite_differences(adapter, batch, config)
    units = 64 * torch.finfo(torch.float64).eps ** (-1 / 3)
    allowed = tolerances(batch, config, units).loss
    close("gradient", loss_and_gradient(adapter, batch, config).gradient, right, allowed)


class Variant:
    """A change of a batch, with the code that makes it."""

    def __init__(self, function: Callable[..., list[LossBatch]], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self, batch: LossBatch) -> list[LossBatch]:
        return self.function(batch, *self.arguments)

    def __repr__(self) -> str:
        return f"lambda batch: {self.function.__name__}({', '.join(['batch', *map(code, self.arguments)])})"


def against_itself(batch: LossBatch, config: GRPOLossConfig, variant: Variant) -> str:
    return script(
        batch,
        config,
        f'print("got", loss_and_gradient(adapter, batch, config, {variant!r}))',
        'print("expected", loss_and_gradient(adapter, batch, config))',
    )


def variants(*rows: tuple[str, LossBatch, Variant], kl: bool = True, mask: str = "padding") -> Callable[[Adapter], list[Case]]:
    """Return the cases of a contract: each objective with each row.

    Args:
        kl: whether with a KL term, if the adapter has one.
        mask: the kind of masks that an adapter must support.
    """

    def cases(adapter: Adapter) -> list[Case]:
        term = {"beta": BETA, "kl_estimator": adapter.kl_estimators[0]} if kl and adapter.kl_estimators else {}
        return [
            case(f"{name}-{row}", settings(loss_type, level, **term), first_dtype(adapter, batch), variant=variant)
            for name, loss_type, level in (objectives(adapter) if mask in adapter.masks else ())
            for row, batch, variant in rows
        ]

    return cases


FIRST = variants(
    ("2x2", replace(SMALL, old_logps=SMALL.logps), Variant(first_step)),
    ("4x4", replace(WHOLE, old_logps=WHOLE.logps), Variant(first_step)),
    kl=False,
)


def first_cases(adapter: Adapter) -> Iterator[Case]:
    """Yield all objectives, and one of them with each correction."""
    yield from FIRST(adapter)
    for name, loss_type, level in [*objectives(adapter)][:1]:
        for term_name, term in corrections(adapter, loss_type):
            if term:
                batch = first_dtype(adapter, replace(SMALL, old_logps=SMALL.logps))
                yield case(f"{name}{term_name}", settings(loss_type, level, **term), batch, variant=Variant(first_step))


# Name of the contract -> its rule, its source and its cases.
INVARIANTS: dict[str, tuple[str, str, Callable[[Adapter], Iterable[Case]]]] = {
    "padding": (
        "More padding, or other finite values outside of the loss mask, change neither the loss nor the gradient.",
        "the length of other completions of the batch is no part of the objective of a completion",
        variants(
            ("columns", SMALL, Variant(add_padding, 2)),
            ("values", SMALL, Variant(set_masked, -0.25, -6.0)),
            ("columns-4x4", WHOLE, Variant(add_padding, 2)),
            ("values-4x4", WHOLE, Variant(set_masked, -0.25, -6.0)),
        ),
    ),
    "nonfinite_padding": (
        "NaN and infinities outside of the loss mask change neither the loss nor the gradient.",
        "0 * NaN is NaN: only a selection, not a product with the mask, keeps such values out",
        variants(*((str(x), SMALL, Variant(set_masked, x, x)) for x in map(float, ("nan", "inf", "-inf"))), mask="nonfinite"),
    ),
    "order": (
        "The order of completions does not change the loss, and permutes the gradient.",
        "the objective is a mean over completions",
        variants(
            ("reversed", SMALL, Variant(select_rows, (1, 0))),
            ("rotated", WHOLE, Variant(select_rows, (1, 2, 3, 0))),
        ),
    ),
    "holes": (
        "A completion with masked tokens in it has the loss of the completion without these tokens.",
        "tokens of tools and of the environment are not sampled by the policy",
        variants(("closed", replace(WHOLE, loss_mask=MASKS["holes"]), Variant(close_holes)), mask="holes"),
    ),
    "first_step": (
        "Without old_logps the loss and the gradient are those with old_logps equal to logps.",
        "before the first update the policy is the policy that sampled, and its ratio is 1 with a gradient",
        first_cases,
    ),
    "accumulation": (
        "The losses of micro-batches with unequal numbers of tokens add up to the loss of the whole batch.",
        "the batch of the objective is that of an optimizer step (https://huggingface.co/blog/gradient_accumulation)",
        variants(
            ("2", SMALL, Variant(micro_batches, 2, 1)),
            ("2-4x4", WHOLE, Variant(micro_batches, 2, 1)),
            ("4-4x4", WHOLE, Variant(micro_batches, 4, 1)),
        ),
    ),
    "processes": (
        "The mean over processes, with unequal numbers of tokens, is the loss of one process with the whole batch.",
        "data parallelism is no part of the objective",
        variants(
            ("2", SMALL, Variant(micro_batches, 1, 2)),
            ("2x2-4x4", WHOLE, Variant(micro_batches, 2, 2)),
        ),
    ),
}


def invariant(adapter: Adapter, batch: LossBatch, config: GRPOLossConfig, variant: Variant) -> None:
    """Check that the variant has the loss and the gradient of the batch."""
    agree(
        loss_and_gradient(adapter, batch, config, variant),
        loss_and_gradient(adapter, batch, config),
        tolerances(batch, config, units=8.0),
    )


for _name, (_rule, _source, _cases) in INVARIANTS.items():
    contract(f"loss/{_name}", "loss", rule=_rule, source=_source, tolerance=TWICE, cases=_cases, reproduce=against_itself)(
        invariant
    )


def rows(*masks: list[int], **fields: Any) -> LossBatch:
    """Return the first completions of the batch with another loss mask."""
    (batch,) = select_rows(WHOLE, range(len(masks)))
    return replace(batch, loss_mask=torch.tensor(masks).bool(), **fields)


EMPTY = {
    "one_token": rows([1, 0, 0, 0]),
    "one_empty_sequence": rows([1, 1, 1, 1], [0, 0, 0, 0]),
    "all_masked": rows([0, 0, 0, 0], [0, 0, 0, 0]),
    "all_masked_of_several": rows([0, 0, 0, 0], [0, 0, 0, 0], num_items=5, accumulation_steps=2),
}


def empty_cases(adapter: Adapter) -> Iterator[Case]:
    """Yield all objectives, and one of them with each KL term, correction and option."""
    for name, loss_type, level in objectives(adapter):
        for batch_name, batch in EMPTY.items():
            yield case(f"{name}-{batch_name}", settings(loss_type, level), first_dtype(adapter, batch))
    for name, loss_type, level in [*objectives(adapter)][:1]:
        # A trainer may refuse to correct nothing.
        for batch_name, corrected in (("one_empty_sequence", corrections(adapter, loss_type)), ("all_masked", ())):
            for term_name, term in (*kl_terms(adapter), *corrected, *options(adapter, loss_type)):
                if term:
                    config = settings(loss_type, level, **term)
                    yield case(f"{name}{term_name}-{batch_name}", config, first_dtype(adapter, EMPTY[batch_name]))


@contract(
    "loss/empty",
    "loss",
    source="a sum over no tokens is 0, and a gradient of 0 / 0 makes all weights NaN; the mean of DeepSeekMath, equation 3, is"
    " over all completions, with or without tokens in the loss",
    tolerance=ROUNDING,
    cases=empty_cases,
    reproduce=against_oracle,
)
def empty(adapter: Adapter, batch: LossBatch, config: GRPOLossConfig) -> None:
    """Completions without a token in the loss add 0 to the loss, and batches without one have loss and gradient 0."""
    agree(loss_and_gradient(adapter, batch, config), expected_loss(batch, config), tolerances(batch, config))


def column(logps: list[float], advantages: list[float], **others: list[float]) -> LossBatch:
    """Return completions of one token."""
    tensors = {name: torch.tensor(values)[:, None] for name, values in {"logps": logps, **others}.items()}
    return LossBatch(advantages=torch.tensor(advantages), loss_mask=torch.ones(len(logps), 1).bool(), **tensors)


TIMES = 17500


def long_cases(adapter: Adapter) -> Iterator[Case]:
    for name, loss_type, level in objectives(adapter):
        yield case(name, settings(loss_type, level), first_dtype(adapter, rows([1, 1, 1, 1], [1, 1, 1, 0])), times=TIMES)


def long_script(batch: LossBatch, config: GRPOLossConfig, times: int) -> str:
    return script(
        batch,
        config,
        f"batch = repeat_tokens(batch, {times})",
        'print("got", loss_and_gradient(adapter, batch, config).loss)',
        'print("expected", expected_loss(batch, config).loss)',
    )


@contract(
    "loss/long",
    "loss",
    source="contexts of 64k tokens and more are in use",
    tolerance="that of loss/value and loss/gradient, times sqrt(70,000): a sum of n numbers may be rounded n times",
    cases=long_cases,
    reproduce=long_script,
)
def long(adapter: Adapter, batch: LossBatch, config: GRPOLossConfig, times: int) -> None:
    """A completion of 70,000 tokens has the right loss and gradient."""
    batch = repeat_tokens(batch, times)
    allowed = tolerances(batch, config, 4 * batch.logps.shape[1] ** 0.5)
    agree(loss_and_gradient(adapter, batch, config), expected_loss(batch, config), allowed)


# Log-ratios of +-50: exp(50) = 5e21 is finite in fp32 and bf16.
NEAR, FAR = -0.25, -50.25
EXTREME = {
    "clipped": column([NEAR, FAR], [1.0, -0.5], old_logps=[FAR, NEAR]),  # the clip bounds decide
    "unclipped": column([NEAR, FAR], [-0.5, 1.0], old_logps=[FAR, NEAR]),  # implementations may bound the ratio, or not
    "rollout": column([NEAR, FAR], [1.0, -0.5], old_logps=[NEAR, FAR], rollout_logps=[FAR, NEAR]),
}


def extreme_cases(adapter: Adapter) -> Iterator[Case]:
    for name, loss_type, level in objectives(adapter):
        for batch_name, batch in EXTREME.items():
            if batch.rollout_logps is None or "token_truncate" in adapter.corrections:
                correction = None if batch.rollout_logps is None else "token_truncate"
                exact = batch_name != "unclipped" and LOSSES[loss_type].surrogate == "ppo_clip"
                config = settings(loss_type, level, rollout_correction=correction)
                yield case(f"{name}-{batch_name}", config, first_dtype(adapter, batch), exact=exact)


def extreme_script(batch: LossBatch, config: GRPOLossConfig, exact: bool) -> str:
    expected = "expected_loss(batch, config)" if exact else '"finite numbers"'
    return script(batch, config, 'print("got", loss_and_gradient(adapter, batch, config))', f'print("expected", {expected})')


@contract(
    "loss/extreme_ratios",
    "loss",
    source="https://arxiv.org/abs/1707.06347: the clip bounds limit how much a ratio can gain; exp(50) is finite in fp32",
    tolerance=f"{ROUNDING}, with ratios of 1",
    cases=extreme_cases,
    reproduce=extreme_script,
)
def extreme(adapter: Adapter, batch: LossBatch, config: GRPOLossConfig, exact: bool) -> None:
    """Log-ratios of 50 and -50 give a finite loss and gradient; those beyond a bound give the value at the bound."""
    got = loss_and_gradient(adapter, batch, config)
    for name, tensor in got._asdict().items():
        if not tensor.isfinite().all():
            raise Violation(f"{name} is {tensor.tolist()}, expected finite numbers")
    if exact:
        # The ratios are at their bounds, so that they do not enter the rounding error.
        allowed = tolerances(replace(batch, old_logps=batch.logps), config)
        agree(got, expected_loss(batch, config), allowed)
