"""Multi-turn sampling with the vLLM engines, against a fake vLLM that answers only the token ids and images it expects."""

import copy
import sys
import threading
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from support import tiny
from support.fake_vllm import FakeModule, FakeVLLM, Status, experts_of
from support.observations import observation, result_text
from support.tool_models import tool_model

from vlmkernels.data.samples import encode, prompt_ids, read_sample, render
from vlmkernels.models.attention import undo_tree_attention
from vlmkernels.models.families import family_of
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.rollout.agent import Agent
from vlmkernels.rollout.base import RolloutError, Sampling
from vlmkernels.rollout.generate import Generate
from vlmkernels.rollout.vllm import server as vllm_server
from vlmkernels.rollout.vllm.colocate import VLLMColocate
from vlmkernels.rollout.vllm.config import VLLMConfig
from vlmkernels.rollout.vllm.server import VLLMServer
from vlmkernels.tools.functions import Tools
from vlmkernels.tools.options import ToolOptions
from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)
GENERATE = "/inference/v1/generate"
GROUP = [0, 0, 0, 1, 1]
# Of each trajectory: its turns, and the texts and numbers of images of the results between them.
TURNS = [
    ["zoom in<|im_end|>", "again<|im_end|>", "a cat<|im_end|>"],
    ["a dog<|im_end|>"],
    ["what<|im_end|>", "no"],
    ["zoom<|im_end|>", "yes<|im_end|>"],
    ["hm"],
]
RESULTS = [[("one", 1), ("two", 2)], [], [("nothing", 0)], [("big", 1)], []]
NUM_REQUESTS = 2 + 4  # one for each prompt and for each further turn


class Conversations:
    """The trajectories of ``TURNS``, as ``Episodes`` gives them to an engine.

    Attributes:
        observations: what follows the turns of each trajectory.
        slow: trajectories whose tools finish only after all other trajectories have ended.
    """

    def __init__(self, processor, family, slow=()):
        self.group, self.slow = torch.tensor(GROUP), slow
        self.turns, self.running, self.refused = [[] for _ in GROUP], {}, []
        self.texts = [[result_text(*result) for result in results] for results in RESULTS]
        self.images = [
            [
                [tiny.image(10 * k + 2 * n + i, width=56, height=56) for i in range(count)]
                for n, (_, count) in enumerate(results)
            ]
            for k, results in enumerate(RESULTS)
        ]
        self.observations = [
            [observation(*pair, processor, family) for pair in zip(texts, images, strict=True)]
            for texts, images in zip(self.texts, self.images, strict=True)
        ]
        self.finished = set()

    def end_turn(self, k, ids, ended):
        self.turns[k].append(ids)
        assert ended == (ids[-1] == tiny.tokenizer().eos_token_id)
        if len(self.turns[k]) > len(self.observations[k]):
            self.finished.add(k)
            return False
        self.running[k] = 0
        return True

    def ready(self, wait):
        """Return one result, of a call that has run since an earlier call of this method."""
        assert self.running
        others = {*range(len(GROUP))} - {*self.slow}
        done = [k for k, polls in self.running.items() if (polls or wait) and (k not in self.slow or others <= self.finished)]
        assert done or not wait, "waiting for a slow tool while other trajectories have not ended"
        self.running = {k: polls + 1 for k, polls in self.running.items() if k not in done[-1:]}
        return [(k, self.observations[k][len(self.turns[k]) - 1]) for k in done[-1:]]

    def refuse(self, k):
        self.refused.append(k)
        self.finished.add(k)


class Case:
    """An engine, the trainer's model and inputs, and a fake vLLM with scripts for all turns."""

    def __init__(self, kind, folder, monkeypatch, slow=(), max_new_tokens=128, max_model_len=256, **sampling):
        self.fake, self.processor, self.model = FakeVLLM(), tiny.processor(), tiny.vlm(tied=False)
        self.fake.config["max_model_len"] = max_model_len
        self.module = FakeModule(self.fake)
        monkeypatch.setitem(sys.modules, "vllm", self.module)
        monkeypatch.setattr(vllm_server, "BACKOFF", 0.01)
        timeouts = {"server_timeout": 5, "request_timeout": 5}
        config = VLLMConfig(folder, kind, server_base_url=self.fake.url, num_generations=3, **timeouts)
        engine = {"server": VLLMServer, "colocate": VLLMColocate}[kind]
        options = Sampling(max_new_tokens, **sampling)
        self.engine = engine(self.model, self.processor, options, config, Accelerator(cpu=True))
        self.engine.sync_weights(self.model, 0)
        self.family = family_of(self.model.config)
        self.samples = [read_sample(row, index) for index, row in enumerate(tiny.rows(2, "several"))]
        self.prompts = encode(self.samples, self.processor, self.family)
        self.conversations = Conversations(self.processor, self.family, slow)
        self.texts = [render(sample, self.processor) for sample in self.samples]
        self.turns = [[self.processor.tokenizer(turn)["input_ids"] for turn in turns] for turns in TURNS]
        self.write_scripts()
        self.requests_before = self.fake.counts[GENERATE]

    def write_scripts(self):
        for index, sample in enumerate(self.samples):
            ids = prompt_ids(sample, self.texts[index], self.processor)
            self.fake.script(ids, sample.images, [self.turns[k][0] for k in range(len(GROUP)) if GROUP[k] == index])
        for k, index in enumerate(GROUP):
            ids = prompt_ids(self.samples[index], self.texts[index], self.processor)
            images = self.samples[index].images
            for turn, result, answer in zip(self.turns[k], self.conversations.observations[k], self.turns[k][1:], strict=False):
                ids, images = [*ids, *turn, *result.prompt_ids], [*images, *result.images]
                self.fake.script(ids, images, [answer])

    def sample(self, temperature=1.0):
        return self.engine(self.model, self.prompts, 0, temperature, self.samples, self.conversations)

    def tokenized(self, k):
        """Tokenize trajectory k as one text: the tokens after the prompt, and which of them the model sampled."""
        results, images = [*self.conversations.texts[k], ""], chain(*self.conversations.images[k])
        text = self.texts[GROUP[k]] + "".join(x for pair in zip(TURNS[k], results, strict=True) for x in pair)
        whole = self.processor(text=[text], images=[[*self.samples[GROUP[k]].images, *images]], return_tensors="pt")
        length = int(self.prompts.inputs["attention_mask"][GROUP[k]].sum())
        observed = [x.inputs.inputs["input_ids"].shape[1] for x in self.conversations.observations[k]]
        sampled = []
        for turn, count in zip(self.turns[k], [*observed, 0], strict=True):
            sampled += [True] * len(turn) + [False] * count
        return whole["input_ids"][0, length:].tolist(), sampled

    def params(self):
        """The parameters of the requests for sampling, in the order in which they arrived."""
        return [body["sampling_params"] for body in self.fake.bodies if "prompt_logprobs" not in body["sampling_params"]]


@pytest.fixture
def case(tmp_path, monkeypatch):
    cases = []

    def build(kind="server", **options):
        cases.append(Case(kind, tmp_path, monkeypatch, **options))
        return cases[-1]

    yield build
    for one in cases:
        if isinstance(one.engine, VLLMColocate):
            one.engine.close()
        one.fake.http.shutdown()
        one.fake.http.server_close()


def complete(case, rollout):
    return rollout.token_ids() == [case.tokenized(k)[0] for k in range(len(GROUP))]


@pytest.mark.parametrize("kind", ["server", "colocate"])
def test_trajectories(case, kind):
    """The tokens are those of the conversation as one text; the log-probabilities are the trainer's."""
    case = case(kind)
    rollout = case.sample()
    assert rollout.group.tolist() == GROUP
    assert rollout.truncated.tolist() == [False, False, True, False, True]
    for k, ids in enumerate(rollout.token_ids()):
        expected, sampled = case.tokenized(k)
        assert ids == expected
        assert rollout.sampled_mask[k, : len(ids)].tolist() == sampled
        assert not rollout.sampled_mask[k, len(ids) :].any()
    assert case.conversations.turns == case.turns
    assert rollout.turns.trajectory.tolist() == [0] * 5 + [1] + [2] * 3 + [3] * 3 + [4]
    assert rollout.turns.inputs.num_images.tolist() == [0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    head = output_head(case.model)
    options = {"head": head, "arguments": logit_arguments(case.model, head), "temperature": 1.0}
    with torch.no_grad():
        expected = completion_logps(case.model, rollout.padded(torch.arange(len(GROUP))), **options)
    torch.testing.assert_close(rollout.logps[rollout.sampled_mask], expected, atol=1e-4, rtol=0)
    assert not rollout.logps[~rollout.sampled_mask].any()
    assert expected.abs().min() > 1e-3


@pytest.mark.parametrize("kind", ["server", "colocate"])
def test_experts_of_trajectories(case, kind):
    """Those of prompts, turns and results, in their layout; -1 for the last token of a trajectory alone."""
    case = case(kind, slow=[0])
    case.fake.num_experts, case.engine.moe_layers, case.engine.returns_experts = (4, 2), [1, 3], True
    rollout = case.sample()
    prompts, completions = rollout.routed_experts
    for k, prompt in enumerate(GROUP):
        kept = rollout.prompts.inputs["attention_mask"][prompt].bool()
        length = int(kept.sum())
        tokens = rollout.prompts.inputs["input_ids"][prompt][kept].tolist() + rollout.token_ids()[k]
        experts = torch.from_numpy(experts_of(tokens, (4, 2))[:, [1, 3]]).short()
        assert torch.equal(prompts[prompt][kept], experts[:length])
        assert torch.equal(completions[k, : len(tokens) - length - 1], experts[length:-1])
        assert (completions[k, len(tokens) - length - 1 :] == -1).all()


@pytest.mark.parametrize("kind", ["server", "colocate"])
def test_slow_tools_delay_only_their_trajectory(case, kind):
    case = case(kind, slow=[0, 2])
    assert complete(case, case.sample())


def test_trajectories_are_sampled_at_the_same_time(case):
    """The first two requests for second turns are answered only while both of them run."""
    case = case()
    barrier = threading.Barrier(2, timeout=5)
    numbers = [case.requests_before + n for n in (3, 4)]
    case.fake.change[GENERATE] = lambda reply, number: (barrier.wait() if number in numbers else None, reply)[1]
    assert complete(case, case.sample())
    assert not barrier.broken
    assert case.fake.counts[GENERATE] == case.requests_before + NUM_REQUESTS


def test_tools_finish_while_a_request_runs(case):
    """The first turns of prompt 0 are sampled only after the second turn of trajectory 3."""
    case = case()
    sampled = threading.Event()

    def hold(reply, number):
        if len(reply["choices"]) == GROUP.count(0):
            assert sampled.wait(5)
        elif len(reply["choices"]) == 1:
            sampled.set()
        return reply

    case.fake.change[GENERATE] = hold
    assert complete(case, case.sample())
    assert case.fake.counts[GENERATE] == case.requests_before + NUM_REQUESTS


def test_each_image_is_encoded_once(case, monkeypatch):
    case = case()
    encoded, png_url = [], vllm_server.png_url
    monkeypatch.setattr(vllm_server, "png_url", lambda image: (encoded.append(id(image)), png_url(image))[1])
    monkeypatch.setattr(vllm_server, "CONCURRENCY", 1)
    case.sample()
    images = [*(sample.images for sample in case.samples), *chain(*case.conversations.images)]
    assert sorted(encoded) == sorted(map(id, chain(*images)))


# Limits


def lengths(case, k):
    """The lengths of the first turn of trajectory k, of the result after it, and of the prompt."""
    result = case.conversations.observations[k][0].inputs.inputs["input_ids"].shape[1]
    return len(case.turns[k][0]), result, int(case.prompts.inputs["attention_mask"][GROUP[k]].sum())


@pytest.mark.parametrize("kind", ["server", "colocate"])
@pytest.mark.parametrize("limit", ["max_new_tokens", "max_model_len"])
@pytest.mark.parametrize("room", [0, 1])
def test_a_result_without_room_for_a_token_after_it_is_refused(case, kind, limit, room):
    """Trajectory 3 has exactly ``room`` tokens after its result, of the budget or of vLLM's context."""
    probe = case(kind)
    turn, result, prompt = lengths(probe, 3)
    needed = turn + result + room
    in_context = {"max_model_len": prompt + needed, "max_new_tokens": needed + 9}
    limited = case(kind, **in_context if limit == "max_model_len" else {limit: needed})
    if limit == "max_model_len":  # vLLM ends a completion where its context ends
        key = next(ids for ids in limited.fake.scripts if limited.fake.scripts[ids][1] == [limited.turns[3][1]])
        limited.fake.scripts[key] = limited.fake.scripts[key][0], [limited.turns[3][1][:1]]
    rollout = limited.sample()
    assert (3 in limited.conversations.refused) == (room == 0)
    expected = limited.tokenized(3)[0][: needed if room else turn]
    assert rollout.token_ids()[3] == expected
    assert rollout.truncated[3]
    assert rollout.sampled_mask[3].sum() == turn + room
    assert rollout.completion_mask.sum(1).max() <= limited.engine.sampling.max_new_tokens


def test_parameters_of_requests(case):
    """``max_tokens`` is what is left of the budget; ``min_tokens``, which vLLM bounds by it, applies to each turn."""
    case = case(max_new_tokens=100, min_new_tokens=50)
    case.sample()
    first, later = case.params()[:2], case.params()[2:]
    assert sorted((x["n"], x["max_tokens"], x["min_tokens"]) for x in first) == [(2, 100, 50), (3, 100, 50)]
    left = []
    for k in range(len(GROUP)):
        used = 0
        for turn, result in zip(case.turns[k], case.conversations.observations[k], strict=False):
            used += len(turn) + result.inputs.inputs["input_ids"].shape[1]
            left.append(100 - used)
    assert sorted((x["n"], x["max_tokens"], x["min_tokens"]) for x in later) == sorted((1, n, min(n, 50)) for n in left)
    assert len({*left, 50}) > 2


def test_without_log_probabilities(case):
    case = case()
    rollout = case.sample(temperature=0.5)  # vLLM has raw_logprobs
    assert rollout.logps is None
    assert complete(case, rollout)


# Faults


def dies(case):
    def die(reply, number):
        if number > case.requests_before + 2:
            raise Status(500, "EngineCore died")
        return reply

    case.fake.change[GENERATE] = die


def shrinks_images(case):
    """vLLM's processor makes results' images, which are larger than those of the prompts, smaller."""
    case.fake.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2 * 28 * 28}


def restarts(case):
    def restart(reply, number):
        if number > case.requests_before + 2:
            reply["choices"][0]["weight_versions"] = [{"version": "default"}]
        return reply

    case.fake.change[GENERATE] = restart


def disconnects(case):
    """The connection breaks once, and the request is repeated."""
    case.fake.change[GENERATE] = lambda reply, number: b"{" if number == case.requests_before + 3 else reply


FAULTS = {
    "dies": (dies, "generate failed with 500 Internal Server Error: EngineCore died"),
    "expansion": (shrinks_images, r"sample [01], turn 2: vLLM encoded the prompt as \d+ tokens and the trainer as \d+"),
    "restarted": (
        restarts,
        r"sample [01], turn 2: vLLM sampled with weights 'default', not '.*-0': .* cannot be sampled again, because its tools",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_a_later_turn_stop_the_run(case, fault):
    case = case()
    prepare, message = FAULTS[fault]
    prepare(case)
    updates = case.fake.counts["/collective_rpc"]
    with pytest.raises(RolloutError, match=message):
        case.sample()
    assert case.fake.counts["/collective_rpc"] == updates


def test_a_broken_connection_in_a_later_turn(case):
    """The request is sent again, and no tool runs twice."""
    case = case()
    disconnects(case)
    assert complete(case, case.sample())
    assert case.conversations.turns == case.turns
    assert case.fake.counts[GENERATE] == case.requests_before + NUM_REQUESTS + 1


def test_faults_of_colocated_vllm_cancel_its_requests(case):
    case = case("colocate")

    def fail(_, count):
        if case.conversations.turns[3]:
            raise RuntimeError("out of memory")

    case.fake.change["step"] = fail
    with pytest.raises(RolloutError, match="vLLM failed: RuntimeError: out of memory"):
        case.sample()
    assert len(case.module.aborted) == 1  # the first turns of prompt 0
    case.fake.change.clear()
    case.conversations = Conversations(case.processor, case.family)
    assert case.sample().token_ids()[0] == case.tokenized(0)[0]


def test_other_weights_before_any_tool_has_run(case):
    """A server that was restarted gets the weights, and the batch is sampled again."""
    case = case()
    case.fake.version = "default"
    updates = case.fake.counts["/collective_rpc"]
    assert complete(case, case.sample())
    assert case.fake.counts["/collective_rpc"] == updates + 1
    assert case.conversations.turns == case.turns


def test_a_rank_of_several(case):
    """It samples independently of the other ranks, whose trajectories may have more turns, and does not update weights."""
    case = case()
    case.engine.accelerator = SimpleNamespace(num_processes=2, is_main_process=False)  # which cannot communicate
    assert complete(case, case.sample())
    case.conversations = Conversations(case.processor, case.family)
    case.fake.version = "default"
    with pytest.raises(RolloutError, match=r"sampled with weights 'default', not '.*-0'"):
        case.sample()
    assert not any(case.conversations.turns)


def test_engines_agree_on_greedy_trajectories(tmp_path):
    """The trainer's decoder and a vLLM server, with tools that run in processes, return the same conversations."""
    tools = tool_model()
    model, agent = tools.model, Agent(Tools([tools.tool]), ToolOptions())
    fake = FakeVLLM(model=copy.deepcopy(model), processor=tools.processor)
    sampling, family = Sampling(120), family_of(model.config)
    config = VLLMConfig(tmp_path, "server", server_base_url=fake.url, server_timeout=5, num_generations=2)
    engines = [VLLMServer(model, tools.processor, sampling, config, Accelerator(cpu=True))]
    engines.append(Generate(model, tools.processor, sampling))
    samples = [read_sample(row, index) for index, row in enumerate(tools.rows)]
    results = []
    try:
        agent.prepare(tools.processor, family)
        for engine in engines:
            episodes = agent.episodes(samples, 2)
            engine.sync_weights(model, 0)
            prompts = encode(episodes.samples, tools.processor, family)
            results.append((engine(model, prompts, 2, 0.0, episodes.samples, episodes), episodes.results()))
    finally:
        agent.close()
        fake.http.shutdown()
        fake.http.server_close()
        undo_tree_attention(model)
    (served, by_server), (decoded, by_decoder) = results
    assert served.token_ids() == decoded.token_ids()
    assert torch.equal(served.sampled_mask, decoded.sampled_mask)
    assert torch.equal(served.truncated, decoded.truncated)
    torch.testing.assert_close(served.logps, decoded.logps, atol=1e-3, rtol=0)
    assert torch.equal(served.turns.inputs.inputs["pixel_values"], decoded.turns.inputs.inputs["pixel_values"])
    assert [episode.messages for episode in by_server] == [episode.messages for episode in by_decoder]
    assert [episode.num_turns for episode in by_server] == [3] * 8


def test_training_with_tools(tmp_path):
    """The trainer scores trajectories of a vLLM server as vLLM does, after each update of the weights."""
    tools = tool_model()
    model = copy.deepcopy(tools.model)
    fake = FakeVLLM(model=copy.deepcopy(model), processor=tools.processor)
    fake.is_greedy = True
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_generations": 2, "max_steps": 2}
    options |= {"max_completion_length": 120, "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
    options |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": fake.url, "report_to": "none"}
    args = GRPOConfig(str(tmp_path), **options)

    def reward(completions, **kwargs):
        return [len(completion) + float(index % 2) for index, completion in enumerate(completions)]

    try:
        trainer = GRPOTrainer(model, reward, args, tools.rows, processing_class=tools.processor, tools=[tools.tool])
        trainer.train()
    finally:
        fake.http.shutdown()
        fake.http.server_close()
    logs = [entry for entry in trainer.state.log_history if "tools/turns/mean" in entry]
    assert [entry["tools/turns/mean"] for entry in logs] == [3, 3]
    assert [entry["tools/call_frequency"] for entry in logs] == [2, 2]
    assert max(entry["sampling/sampling_logp_difference/max"] for entry in logs) < 1e-3
    assert fake.version == f"{trainer.engine.run}-1"
    assert any(not torch.equal(x, tools.model.state_dict()[name]) for name, x in fake.model.state_dict().items())
