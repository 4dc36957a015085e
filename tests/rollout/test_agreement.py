"""Log-probabilities of the rollout against those of training, in a tiny model of every family, with fp64 as the scale."""

import copy

import pytest
import torch
from support import tiny_families
from support.double import InDouble
from support.groups import SHARING, processed

from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.models.router_replay import router_replay_unsupported, use_router_replay
from vlmkernels.rollout.base import Rollout, Sampling
from vlmkernels.rollout.decode import decode_groups

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # raised by processors with NumPy 2
torch.set_num_threads(1)


def logps_of(model, rollout, arguments):
    head = output_head(model)
    batch = rollout.packed(torch.arange(len(rollout.group)), model)
    with torch.no_grad():
        return completion_logps(model, batch, head=head, arguments=arguments, temperature=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHARING)
def test_rollout_and_training(name, dtype):
    """The mean error of the rollout is at most twice that of training. With experts, training replays them."""
    case = tiny_families.case(name)
    model = use_tree_attention(copy.deepcopy(case.model).to(dtype).eval())
    routes = router_replay_unsupported(model) is None
    if routes:
        use_router_replay(model)
    prompts = processed(name, 0, 1)
    prompts.inputs.update({key: x.to(dtype) for key, x in prompts.inputs.items() if x.is_floating_point()})
    uniform = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(max_new_tokens=6).for_model(model, case.processor)
    decoded = decode_groups(model, prompts, 2, sampling, uniform=uniform, record_experts=routes)
    more = {"logps": decoded.logps, "routed_experts": decoded.routed_experts}
    rollout = Rollout(prompts, torch.tensor([0, 0, 1, 1]), decoded.ids, decoded.mask, decoded.truncated, **more)
    arguments = logit_arguments(model, output_head(model))
    training = logps_of(model, rollout, arguments)
    exact_model = model.double()
    if routes:
        exact_model.set_experts_implementation("eager")  # grouped products of fp64 are not implemented
    prompts.inputs.update({key: x.double() for key, x in prompts.inputs.items() if x.is_floating_point()})
    with InDouble():
        exact = logps_of(exact_model, rollout, arguments)

    def error(logps):
        return (logps.double() - exact).abs().mean().item()

    assert error(decoded.logps[decoded.mask]) <= 2 * error(training) + torch.finfo(torch.float32).eps * exact.abs().max().item()
