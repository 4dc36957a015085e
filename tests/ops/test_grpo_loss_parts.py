"""The losses, gradients and metrics of the parts of a batch add up to those of one call."""

import pytest
import torch
from support.grpo_cases import VARIANTS, make, run

from vlmkernels.ops.grpo_loss import GRPOLossConfig
from vlmkernels.ops.grpo_loss.inputs import entropy_quantile
from vlmkernels.ops.grpo_loss.parts import combine_metrics, in_parts

CUTS = ((0, 1), (1, 4), (4, 5), (5, 9))  # the first without a token that counts


@pytest.mark.parametrize("items", [False, True], ids=["", "num_items"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_add_up(variant, items):
    options = {"entropy_coef": 0.1, **VARIANTS[variant]}
    if "top_entropy_quantile" in options:
        options["entropy_coef"] = 0.0  # its mean is over the tokens that are chosen, which are not known beforehand
    config, batch = GRPOLossConfig(**options), make(9, 7)
    shared = {"num_items": 31.0} if items else {}
    if config.top_entropy_quantile < 1:
        quantile = 1 - config.top_entropy_quantile
        shared["entropy_threshold"] = entropy_quantile(batch["entropy"], batch["loss_mask"], quantile)
    whole = run(batch, config, accumulation_steps=3, **shared)
    cut = [{name: x[begin:end] for name, x in batch.items()} for begin, end in CUTS]
    sizes, tokens = [len(part["logps"]) for part in cut], [int(part["loss_mask"].sum()) for part in cut]
    assert tokens[0] == 0
    calls = in_parts(config, sizes, tokens, 3)
    results = [run(part, **call._asdict(), **shared) for part, call in zip(cut, calls, strict=True)]
    together = {"loss": sum(result.pop("loss") for result in results)}
    for name in [name for name in results[0] if results[0][name].dim()]:  # the gradients
        together[name] = torch.cat([result.pop(name) for result in results])
    together |= combine_metrics(config, sizes, results)
    assert together.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(together[name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_one_part_is_the_batch():
    config = GRPOLossConfig(entropy_coef=0.1)
    assert in_parts(config, [4], [1], 2) == [(2, config)]
    assert [part.accumulation_steps for part in in_parts(config, [2, 6], [0, 5], 2)] == [2, 2]
    config = config.replace(loss_type="grpo")
    assert [part.accumulation_steps for part in in_parts(config, [2, 6], [0, 5], 2)] == [8, 2 / 0.75]


def test_combining_metrics_reads_no_values():
    """Metrics on a device are combined without waiting for it: meta tensors have no values."""
    names = ("tokens", "policy_loss", "ratio/min", "ratio/max", "clip_ratio/low_min")
    metrics = [{name: torch.empty((), device="meta") for name in names} for _ in range(2)]
    for level in ("token", "sequence"):
        combined = combine_metrics(GRPOLossConfig("grpo", level), [2, 3], metrics)
        assert {name: (x.device.type, x.shape) for name, x in combined.items()} == dict.fromkeys(names, ("meta", ()))
