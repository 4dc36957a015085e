"""The contracts of losses and advantages pass correct code and catch planted faults, each with a script that shows it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.conformance import output_of
from support.plain_trainer import Plain, Vlmkernels

from vlmkernels.conformance import load
from vlmkernels.conformance.contract import DOCUMENTED, FAIL, NOT_APPLICABLE, PASS, run_case
from vlmkernels.conformance.contracts import loss as loss_contracts
from vlmkernels.conformance.objective import expected_loss, tolerances
from vlmkernels.conformance.suite import all_contracts

CONTRACTS = {each.name: each for each in all_contracts() if each.method in ("loss", "advantages")}


def first_failure(adapter, name):
    """The result of the first case that is not passed, or None."""
    each = CONTRACTS[name]
    results = (run_case(adapter, each, case) for case in each.cases(adapter))
    return next((result for result in results if result.status not in (PASS, NOT_APPLICABLE)), None)


def sample(adapter, name, most):
    """The results of at most this many cases, evenly spaced."""
    cases = [*CONTRACTS[name].cases(adapter)]
    return [run_case(adapter, CONTRACTS[name], case) for case in cases[:: -(-len(cases) // most)]]


def test_vlmkernels_passes():
    results = [result for name in CONTRACTS for result in sample(load("vlmkernels:Vlmkernels"), name, 60)]
    other = Counter((result.contract, result.status) for result in results if result.status != PASS)
    # bnpo divides by the tokens of the micro-batch, as in TRL.
    assert other == {("loss/accumulation", DOCUMENTED): 6, ("loss/processes", DOCUMENTED): 4}


@pytest.mark.parametrize("name", CONTRACTS)
def test_an_implementation_by_autograd_passes(name):
    assert {(result.status, result.message) for result in sample(Plain(), name, 60)} == {(PASS, "")}


class Bfloat16(Vlmkernels):
    dtypes = (torch.bfloat16,)


@pytest.mark.parametrize("name", ["loss/value", "loss/gradient", "loss/padding", "loss/order", "loss/extreme_ratios"])
def test_the_tolerance_follows_the_dtype(name):
    assert {(result.status, result.message) for result in sample(Bfloat16(), name, 60)} == {(PASS, "")}


class PopulationDeclared(Plain):
    scales, baselines = ("group",), ("mean",)
    advantage_eps, advantage_ddof = 1e-6, 0

    def std(self, scored):
        return scored.std(correction=0)


@pytest.mark.parametrize("name", [name for name in CONTRACTS if name.startswith("advantages/")])
def test_eps_and_degrees_of_freedom_are_those_of_the_adapter(name):
    assert {result.status for result in sample(PopulationDeclared(), name, 60)} == {PASS}


class MaskForgotten(Plain):
    def mask(self, batch):
        return torch.ones_like(batch.loss_mask)


class PaddingInSum(Plain):
    def read(self, x, mask):
        return x

    def aggregate(self, loss, mask, batch, config):
        logps = batch.logps - batch.logps.detach()
        return super().aggregate(loss + logps * ~mask, mask, batch, config)


class PaddingInLength(Plain):
    def length(self, mask):
        return torch.full((len(mask), 1), mask.shape[1])


class LastPositionAsLength(Plain):
    def length(self, mask):
        return (mask * torch.arange(1, mask.shape[1] + 1)).amax(1, keepdim=True).clamp(min=1)


class ClipOnTheWrongSide(Plain):
    def ppo(self, logps, ratio, advantages, config):
        clipped = ratio.clamp(1 - config.epsilon_low, 1 + config.clip_high)
        return torch.maximum(ratio * advantages, clipped * advantages)


class BoundsExchanged(Plain):
    def ppo(self, logps, ratio, advantages, config):
        clipped = ratio.clamp(1 - config.clip_high, 1 + config.epsilon_low)
        return torch.minimum(ratio * advantages, clipped * advantages)


class KlSign(Plain):
    def kl(self, x, config):
        return super().kl(-x, config)


class OtherAdvantage(Plain):
    def advantage(self, batch):
        return batch.advantages.roll(1)


class SortedAdvantage(Plain):
    def advantage(self, batch):
        return batch.advantages[batch.logps[:, 0].argsort()]


class GradientThroughWeight(Plain):
    def cispo(self, logps, ratio, advantages, config):
        return ratio.clamp(max=config.clip_high) * advantages * logps


class CappedGradient(Plain):
    """Drops the gradient of ratios above delta also where the clipped ratio is the smaller one."""

    def ppo(self, logps, ratio, advantages, config):
        value = super().ppo(logps, ratio, advantages, config)
        return value if config.delta is None else torch.where(ratio > config.delta, value.detach(), value)


class LuspoWithoutMask(Plain):
    def aggregate(self, loss, mask, batch, config):
        if config.loss_type != "luspo":
            return super().aggregate(loss, mask, batch, config)
        return (loss.sum(1, keepdim=True) * mask.sum(1, keepdim=True)).mean()


class SequenceRatioIsSum(Plain):
    def sequence_mean(self, x, mask):
        return (x * mask).sum(1, keepdim=True)


class KlOfMicroBatch(Plain):
    """The policy term is divided by the number of micro-batches, the KL term is not."""

    def loss(self, batch, config):
        alone = replace(batch, accumulation_steps=1)
        policy = replace(config, beta=0.0)
        return super().loss(batch, policy) + super().loss(alone, config) - super().loss(alone, policy)


class EntropyMaskOnKl(Plain):
    def loss(self, batch, config):
        self.kept = batch.loss_mask
        return super().loss(batch, config)

    def high(self, entropy, threshold):
        self.kept = super().high(entropy, threshold)
        return self.kept

    def kl(self, x, config):
        return super().kl(x, config) * self.kept


class GradientThroughCorrection(Plain):
    """In the first step the old policy is the policy, with its gradient."""

    def loss(self, batch, config):
        self.first = batch.logps if batch.old_logps is None else None
        return super().loss(batch, config)

    def correction(self, old, rollout, mask, config):
        return super().correction(old if self.first is None else self.first, rollout, mask, config)


class CorrectionOfNothing(Plain):
    """The mean ratio of a completion without tokens is 0 / 0."""

    def sequence_mean(self, x, mask):
        return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


class RolloutRatioInverted(Plain):
    def correction(self, old, rollout, mask, config):
        return super().correction(rollout, old, mask, config)


class LowEntropy(Plain):
    def high(self, entropy, threshold):
        return entropy <= threshold


class LocalTokens(Plain):
    def items(self, batch):
        return batch.loss_mask.sum().clamp(min=1) * batch.accumulation_steps


class ProcessesForgotten(Plain):
    def items(self, batch):
        return max(batch.tokens, 1)


class AccumulationForgotten(Plain):
    def aggregate(self, loss, mask, batch, config):
        return super().aggregate(loss, mask, replace(batch, accumulation_steps=1), config)


class FirstStepWithoutGradient(Plain):
    def policy(self, logps):
        return logps


class MaskAsFactor(Plain):
    def read(self, x, mask):
        return x


class SelectedTooLate(MaskAsFactor):
    """The loss is right, and the gradient of the masked tokens is 0 * NaN."""

    def select(self, loss, mask):
        return torch.where(mask, loss, 0)


class LengthOfZero(Plain):
    def length(self, mask):
        return mask.sum(1, keepdim=True)


class LengthInBfloat16(Plain):
    def length(self, mask):
        return super().length(mask).bfloat16()


class RatioInHalf(Plain):
    def ratio(self, log_ratio):
        return log_ratio.half().exp().to(log_ratio.dtype)


class WrongBackward(Plain):
    def capped(self, ratio, config):
        return ratio.detach() + 2 * (ratio - ratio.detach())


class StdOfBatch(Vlmkernels):
    def advantages(self, batch):
        return super().advantages(replace(batch, scale="batch"))


class PopulationStd(Plain):
    def std(self, scored):
        return scored.std(correction=0)


class OtherGroup(Vlmkernels):
    def advantages(self, batch):
        return super().advantages(batch).roll(batch.group_sizes[0])


class FixedGroups(Plain):
    def sizes(self, batch):
        return len(batch.rewards) // len(batch.group_sizes)


class UnscoredIsZero(Vlmkernels):
    def advantages(self, batch):
        return super().advantages(replace(batch, rewards=batch.rewards.nan_to_num()))


class WeightsForgotten(Plain):
    def total(self, batch):
        return super().total(replace(batch, weights=(1.0,) * len(batch.weights)))


class WithoutCheckOfEqual(Plain):
    def relative(self, group):
        return (group - group.mean()) / (group.std() + self.advantage_eps)


class FirstAsBaseline(Plain):
    def mean(self, scored):
        return scored[0]


class MeanOfSquares(Plain):
    def std(self, scored):
        variance = scored.square().mean() - scored.mean().square()
        return (variance.clamp(min=0) * len(scored) / (len(scored) - 1)).sqrt()


class EpsForEqual(Plain):
    def relative(self, group):
        return super().relative(group) + self.advantage_eps


CAUGHT = [
    (MaskForgotten, "loss/value"),
    (MaskForgotten, "loss/padding"),
    (PaddingInSum, "loss/gradient"),
    (PaddingInLength, "loss/value"),
    (PaddingInLength, "loss/padding"),
    (LastPositionAsLength, "loss/holes"),
    (ClipOnTheWrongSide, "loss/value"),
    (ClipOnTheWrongSide, "loss/extreme_ratios"),
    (BoundsExchanged, "loss/value"),
    (KlSign, "loss/value"),
    (OtherAdvantage, "loss/value"),
    (SortedAdvantage, "loss/order"),
    (GradientThroughWeight, "loss/gradient"),
    (CappedGradient, "loss/gradient"),
    (LuspoWithoutMask, "loss/value"),
    (SequenceRatioIsSum, "loss/value"),
    (RolloutRatioInverted, "loss/value"),
    (LowEntropy, "loss/gradient"),
    (KlOfMicroBatch, "loss/accumulation"),
    (EntropyMaskOnKl, "loss/value"),
    (GradientThroughCorrection, "loss/first_step"),
    (CorrectionOfNothing, "loss/empty"),
    (LocalTokens, "loss/accumulation"),
    (AccumulationForgotten, "loss/accumulation"),
    (ProcessesForgotten, "loss/processes"),
    (FirstStepWithoutGradient, "loss/first_step"),
    (MaskAsFactor, "loss/nonfinite_padding"),
    (SelectedTooLate, "loss/nonfinite_padding"),
    (LengthOfZero, "loss/empty"),
    (LengthInBfloat16, "loss/long"),
    (RatioInHalf, "loss/extreme_ratios"),
    (WrongBackward, "loss/finite_differences"),
    (StdOfBatch, "advantages/value"),
    (PopulationStd, "advantages/value"),
    (OtherGroup, "advantages/value"),
    (FixedGroups, "advantages/unequal_groups"),
    (UnscoredIsZero, "advantages/unscored"),
    (WeightsForgotten, "advantages/several_rewards"),
    (WithoutCheckOfEqual, "advantages/group_of_one"),
    (WithoutCheckOfEqual, "advantages/equal_rewards_rounded"),
    (EpsForEqual, "advantages/equal_rewards"),
    (FirstAsBaseline, "advantages/order"),
    (MeanOfSquares, "advantages/offset"),
]


@pytest.mark.filterwarnings("ignore:std")  # of a group of one
@pytest.mark.parametrize(("fault", "name"), CAUGHT, ids=[f"{fault.__name__}-{name}" for fault, name in CAUGHT])
def test_a_planted_fault_is_caught_and_reproduced(fault, name):
    result = first_failure(fault(), name)
    assert result.status == FAIL, result
    got, expected = output_of(result.reproduction, fault())
    assert got != expected


def test_each_contract_catches_a_fault():
    assert {name for _, name in CAUGHT} == CONTRACTS.keys()


@pytest.mark.parametrize("name", CONTRACTS)
def test_reproductions_run_on_correct_code(name):
    case = next(iter(CONTRACTS[name].cases(Vlmkernels())))
    got, expected = output_of(CONTRACTS[name].reproduce(**case.arguments), Vlmkernels())
    assert got
    assert expected


def significant(batch, config, others):
    """Whether the loss of ``others`` is another one by more than the tolerance."""
    difference = (expected_loss(batch, config).loss - expected_loss(batch, others).loss).abs()
    return difference > 10 * tolerances(batch, config).loss


def test_each_setting_shows_in_its_cases():
    for name, loss_type, level in loss_contracts.objectives(Vlmkernels()):
        for label, option in loss_contracts.options(Vlmkernels(), loss_type):
            changed = [*option][-1]
            batch = loss_contracts.WHOLE
            with_option = loss_contracts.settings(loss_type, level, **option)
            without = loss_contracts.settings(loss_type, level, **{k: v for k, v in option.items() if k != changed})
            needs = loss_contracts.with_inputs_of(with_option, batch)
            assert significant(needs, with_option, without), (name, label)
