"""The engine of a vLLM server against a fake server: sampling, weight updates, faults, and the checks before training."""

import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import tiny
from support.fake_vllm import FakeVLLM, Status

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.families import media_token_ids
from vlmkernels.rollout.base import RolloutError
from vlmkernels.rollout.vllm import engine as vllm_engine
from vlmkernels.rollout.vllm import server as vllm_server
from vlmkernels.rollout.vllm.requests import Prompt
from vlmkernels.rollout.vllm.server import VLLMClient, VLLMServer
from vlmkernels.rollout.vllm.weights import check_adapters
from vlmkernels.train import GRPOConfig, GRPOTrainer

torch.set_num_threads(1)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(vllm_server, "BACKOFF", 0.01)
    fake = FakeVLLM()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


def reward(completions, **kwargs):
    return [float(len(completion[0]["content"]) + index % 2) for index, completion in enumerate(completions)]


def config(tmp_path, fake, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": fake.url if fake else "http://127.0.0.1:9",
        "vllm_server_timeout": 5,
        "vllm_request_timeout": 5,
    }
    return GRPOConfig(**{**defaults, **options})


def trainer(tmp_path, fake, peft_config=None, **options):
    args, rows = config(tmp_path, fake, **options), tiny.rows(4, "several")
    return GRPOTrainer(tiny.vlm(tied=False), reward, args, rows, processing_class=tiny.processor(), peft_config=peft_config)


def engine_of(tmp_path, fake, **options):
    """Return an engine with its model in ``engine.own``. ``sampled(engine)`` does the first sampling step of a trainer."""
    args, own = config(tmp_path, fake, **options), tiny.vlm(tied=False)
    engine = VLLMServer(own, tiny.processor(), args.sampling(), args.vllm_config(), Accelerator(cpu=True))
    engine.own = own
    return engine


def sampled(engine, rows="several"):
    samples = [read_sample(row, index) for index, row in enumerate(tiny.rows(2, rows))]
    metrics = engine.sync_weights(engine.own, 0)
    prompts = encode(samples, engine.processor, engine.family)
    return engine(engine.own, prompts, 2, engine.sampling.temperature, samples), metrics


# Sampling and weights


def test_training(fake, tmp_path):
    """Prompts are sent unexpanded, each image once. After each step the server has the trainer's weights; no file is left."""
    run = trainer(tmp_path, fake)
    run.train()
    logs = [entry["vllm/fingerprint"] for entry in run.state.log_history if "vllm/fingerprint" in entry]
    assert len(logs) == 2
    assert max(logs) < 1e-6
    assert fake.version == f"{run.engine.run}-1"
    first = {name: x.clone() for name, x in fake.model.state_dict().items()}
    run.engine.sync_weights(run.model, 2)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(fake.model.state_dict()[name], weight)
    assert any(not torch.equal(first[name], x) for name, x in fake.model.state_dict().items())
    assert not list((tmp_path / "vllm-weights").iterdir())
    sampled = [body for body in fake.bodies if "prompt_logprobs" not in body["sampling_params"]]
    assert len(sampled) == 4  # 2 steps of 2 prompts
    image = run.processing_class.image_token_id
    for body in sampled:
        assert body["token_ids"].count(image) == len(body["content_parts"]) > 0
        assert body["sampling_params"]["n"] == 2
        assert body["sampling_params"]["logit_bias"].keys() >= {str(image)}


def test_logps_are_those_of_the_whole_vocabulary_at_the_temperature(fake, tmp_path):
    """Processed log-probabilities exclude banned tokens; those of the whole vocabulary are recovered from them."""
    logits, temperature = torch.randn(50, generator=torch.Generator().manual_seed(0)), 0.7
    fake.config["logprobs_mode"] = "processed_logprobs"
    engine = engine_of(tmp_path, fake, temperature=temperature)
    logits[engine.banned] += 2
    expected = (logits / temperature).log_softmax(-1)
    biased = logits.index_add(0, torch.tensor(engine.banned), torch.full((len(engine.banned),), -100.0))
    processed = (biased / temperature).log_softmax(-1)
    assert (processed - expected)[3] > 0.5
    params = engine._params(temperature)
    assert params["logprobs"] == len(params["logprob_token_ids"]) == len(engine.banned) + 1
    returned = dict(enumerate(processed.tolist()))
    for token in (0, 3, 30):
        logp, sampling_logp = engine._logp(token, returned, temperature)
        assert logp == pytest.approx(expected[token].item(), abs=1e-5)
        assert sampling_logp == pytest.approx(processed[token].item(), abs=1e-5)
    assert "logprobs" not in engine._params(0)  # processed log-probabilities of greedy tokens are useless


@pytest.mark.parametrize(("limit", "temperature"), [(64, 0.7), (12, 0.7), (12, 1.0)])
def test_ids_without_a_token_are_banned(fake, tmp_path, monkeypatch, limit, temperature, caplog):
    """Log-probabilities count them in the whole vocabulary, or leave them out if they are more than the limit."""
    monkeypatch.setattr(vllm_engine, "MAX_COUNTED", limit)
    fake.config["logprobs_mode"] = "processed_logprobs"
    own = tiny.vlm(tied=False)
    size = len(tiny.tokenizer())
    own.resize_token_embeddings(size + 10)
    fake.model.resize_token_embeddings(size + 10)
    args = config(tmp_path, fake, temperature=temperature)
    engine = VLLMServer(own, tiny.processor(), args.sampling(), args.vllm_config(), Accelerator(cpu=True))
    missing = [*range(size, size + 10)]
    assert engine.banned == sorted([*media_token_ids(own.config, tiny.processor()), *missing])
    assert not {*engine.fingerprint.tokens} & {*engine.banned}
    params = engine._params(temperature)
    assert params["logit_bias"] == dict.fromkeys(engine.banned, -100.0)
    counted = engine.banned if limit == 64 else media_token_ids(own.config, tiny.processor())
    assert params["logprob_token_ids"] == [*counted, 0]
    assert ("take the probability of the 10 ids without a token as 0" in caplog.text) == (limit == 12)
    logits = torch.randn(size + 10, generator=torch.Generator().manual_seed(0))
    biased = logits.index_add(0, torch.tensor(engine.banned), torch.full((len(engine.banned),), -100.0))
    returned = dict(enumerate((biased / temperature).log_softmax(-1).tolist()))
    whole = logits if limit == 64 else logits[:size]
    expected = (whole / temperature).log_softmax(-1)[3].item()
    assert engine._logp(3, returned, temperature)[0] == pytest.approx(expected, abs=1e-5)


def test_concurrency_is_limited(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "CONCURRENCY", 2)
    engine = engine_of(tmp_path, fake)
    fake.change["/inference/v1/generate"] = lambda answer, number: (time.sleep(0.02), answer)[1]
    replies = []
    with engine._requests() as requests:
        for number in range(8):
            requests.send((number,), Prompt([0, 1, 2], []), engine._params(1.0) | {"n": 2})
        while requests:
            replies += requests.replies(None)
    assert sorted(key for key, _ in replies) == [(number,) for number in range(8)]
    assert all(len(reply.completions) == 2 for _, reply in replies)
    assert fake.max_concurrent == 2


def test_correction_of_truncated_sampling(fake, tmp_path):
    """At a temperature and with top_k: the mean ratio is the probability that the trainer's policy gives the kept tokens."""
    fake.config["logprobs_mode"] = "processed_logprobs"
    correction = {"rollout_correction": "token_truncate", "rollout_clip_max": None}
    run = trainer(tmp_path, fake, temperature=0.7, top_k=3, max_steps=1, **correction)
    run.train()
    rollout, mask = run._experience.rollout, run._experience.rollout.completion_mask
    batch = rollout.padded(torch.arange(len(mask)))
    run.model.load_state_dict(tiny.vlm(tied=False).state_dict())  # the weights of the first step
    with torch.no_grad():
        logits = run.model(**batch.inputs).logits.flatten(0, 1)[batch.rows].double() / 0.7
    allowed = logits.index_fill(1, torch.tensor(run.engine.banned), -torch.inf)
    kept = allowed.masked_fill(allowed < allowed.topk(3).values[:, -1:], -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
    [log] = [entry for entry in run.state.log_history if "vllm/fingerprint" in entry]
    assert log["sampling/importance_sampling_ratio/raw_mean"] == pytest.approx(kept.exp().mean().item(), rel=1e-4)
    assert log["sampling/scored_ratio"] == 1


def test_evaluation_is_greedy_and_without_logps(fake, tmp_path):
    run = trainer(tmp_path, fake, eval_temperature=0)
    run.eval_dataset = tiny.rows(2)
    assert "eval_reward" in run.evaluate()
    assert fake.bodies[-1]["sampling_params"]["temperature"] == 0


# Faults


def test_transient_errors_are_retried(fake, tmp_path):
    failures = {2: Status(503, "busy"), 3: Status(429, "busy")}

    def fail(answer, number):
        if number in failures:
            raise failures[number]
        return b"{" if number == 5 else answer

    fake.change["/inference/v1/generate"] = fail
    rollout, _ = sampled(engine_of(tmp_path, fake))
    assert len(rollout.group) == 4
    assert fake.counts["/inference/v1/generate"] == 2 + 2 + 3  # two fingerprints, two prompts, three retries


def raised(status, message):
    def change(answer, number):
        raise Status(status, message)

    return change


def slow(answer, number):
    time.sleep(0.3)
    return answer


GENERATE = "/inference/v1/generate"
FAULTS = {
    "late": (GENERATE, slow, r"generate failed with TimeoutError: .*\(3 requests\)"),
    "garbage": (GENERATE, lambda answer, number: b"{oops", r"generate failed with JSONDecodeError.*\(3 requests\)"),
    "no JSON": (GENERATE, lambda answer, number: b"<html>", r"must be that of /inference/v1/generate, got None"),
    "refused": (GENERATE, raised(400, "too long a prompt"), "generate failed with 400 Bad Request: too long a prompt"),
    "dead": (GENERATE, raised(500, "EngineCore died"), "generate failed with 500 Internal Server Error: EngineCore died"),
    "cache": ("/reset_prefix_cache", lambda answer, number: {"success": False}, "reset_prefix_cache must succeed"),
    "reload": ("/collective_rpc", raised(500, "no such folder"), "collective_rpc failed with 500 .*: no such folder"),
    "not loaded": ("/inference/v1/generate", None, "disagree after its weights were updated"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_permanent_errors_stop_the_run(fake, tmp_path, case):
    path, change, message = FAULTS[case]
    engine = engine_of(tmp_path, fake)
    if case == "late":
        engine.sync_weights(engine.own, 0)
        engine.client.http.timeout = 0.1
    if change is None:
        fake.collective_rpc = lambda body: {"results": [None]}
        with torch.no_grad():
            engine.own.get_output_embeddings().weight *= 1.01
    else:
        fake.change[path] = change
    with pytest.raises(RolloutError, match=message):
        sampled(engine)
    if case in ("cache", "reload"):
        assert fake.counts["/resume"] == fake.counts["/pause"] + 1  # never left paused
    assert not list((tmp_path / "vllm-weights").iterdir())


def with_choice(**values):
    def change(answer, number):
        if answer["prompt_logprobs"] is None:
            answer["choices"][0].update(values)
        return answer

    return change


def longer_prompt(answer, number):
    if answer["prompt_logprobs"] is None:
        answer["prompt_token_ids"] = answer["prompt_token_ids"][:7] + answer["prompt_token_ids"][6:]
    return answer


def one_fewer(answer, number):
    if answer["prompt_logprobs"] is None:
        del answer["choices"][0]
    return answer


REPLIES = {
    "image tokens": (longer_prompt, r"encoded the prompt as \d+ tokens and the trainer as \d+, .* from position \d+ on"),
    "too few": (one_fewer, "must return 2 completions, got 1"),
    "banned": (with_choice(token_ids=[48]), r"must not sample the banned tokens \[.*48.*\], got \[48\]"),
    "no tokens": (with_choice(token_ids=[]), "must have 1 to 4 tokens, got 0"),
    "no logps": (with_choice(logprobs=None), "must return a finite log-probability of every sampled token, got None"),
    "clamped": (with_choice(token_ids=[1], logprobs={"content": [{"token_id": 1, "logprob": -9999.0, "top_logprobs": []}]}),
                "must return a finite log-probability"),
    "nonsense": (with_choice(token_ids="abc"), "must be that of /inference/v1/generate"),
}  # fmt: skip


@pytest.mark.parametrize("case", REPLIES)
def test_wrong_replies_stop_the_run(fake, tmp_path, case):
    change, message = REPLIES[case]
    engine = engine_of(tmp_path, fake)
    fake.change["/inference/v1/generate"] = change
    with pytest.raises(RolloutError, match=message):
        sampled(engine)


def test_a_server_that_was_restarted_gets_the_weights_again(fake, tmp_path):
    engine = engine_of(tmp_path, fake)

    def restart(answer, number):
        if number == 3:
            fake.version = "default"
            answer["choices"][0]["weight_versions"][0]["version"] = "default"
        return answer

    fake.change["/inference/v1/generate"] = restart
    sampled(engine)
    assert fake.counts["/collective_rpc"] == 2
    assert fake.version == engine.version

    fake.change["/inference/v1/generate"] = with_choice(weight_versions=[{"version": "other-3"}])
    with pytest.raises(RolloutError, match=r"sampled with weights 'other-3', not '.*-0': it was restarted, or another run"):
        sampled(engine)


# Before training


def test_an_unreachable_server(tmp_path):
    start = time.monotonic()
    with pytest.raises(
        RolloutError, match=r"the URL of a healthy vLLM server within vllm_server_timeout = 0.2 s, got http://127.0.0.1:9"
    ):
        engine_of(tmp_path, None, vllm_server_timeout=0.2)
    assert time.monotonic() - start < 5


def test_wait_for_a_server_that_starts(fake):
    def busy(answer, number):
        if number < 3:
            raise Status(503, "starting")
        return answer

    fake.change["/health"] = busy
    VLLMClient(fake.url, 10, 5).wait()
    assert fake.counts["/health"] == 3


def test_slow_reply_times_out(fake):
    client = VLLMClient(fake.url, 5, 0.2)
    fake.change["/health"] = lambda answer, number: (time.sleep(1), b"ok")[1]
    with pytest.raises(TimeoutError):
        client.http.send(f"{fake.url}/health", timeout=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.paths.remove("/collective_rpc"), "it must be started with VLLM_SERVER_DEV_MODE=1"),
        (lambda f: f.paths.remove("/inference/v1/generate"), "it must be started with --enable-scale-out"),
        (lambda f: f.config.update(max_model_len=4), "--max-model-len above 4 plus the length of a prompt, got 4"),
        (lambda f: f.config.update(logprobs_mode="raw_logits"), "--logprobs-mode raw_logprobs, got raw_logits"),
    ],
)
def test_a_server_that_cannot_serve_the_run(fake, tmp_path, change, message):
    change(fake)
    with pytest.raises(ValueError, match=f"vllm_server_base_url must be the URL of .* that can serve this run: .*{message}"):
        engine_of(tmp_path, fake)


def test_a_server_of_another_model(tmp_path):
    fake = FakeVLLM(seed=1)
    with pytest.raises(RolloutError, match=r"disagree before training \(is tiny the same model\?\)"):
        engine_of(tmp_path, fake)
    assert not fake.counts["/collective_rpc"]
    fake.http.shutdown()
    fake.http.server_close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vllm_mode": "remote"}, "vllm_mode must be one of server, colocate, got 'remote'"),
        ({"vllm_server_base_url": "localhost:8000"}, "vllm_server_base_url must begin with http:// or https://"),
        ({"vllm_request_timeout": 0}, "vllm_request_timeout must be a finite number > 0, got 0"),
        ({"vllm_gpu_memory_utilization": 2}, r"vllm_gpu_memory_utilization must be in \(0, 1\], got 2"),
        ({"vllm_fingerprint_tolerance": 0}, "vllm_fingerprint_tolerance must be None or > 0, got 0"),
        (
            {"generation_kwargs": {"num_beams": 2}},
            "generation_kwargs must hold only options that vLLM supports with use_vllm, got num_beams",
        ),
        (
            {"temperature": 0.7, "top_p": 0.9, "rollout_correction": "token_mask", "rollout_policy": "full"},
            "temperature must be 1, or rollout_correction be set with rollout_policy 'truncated', with use_vllm .*, got 0.7",
        ),
        ({"temperature": 0.7, "top_p": 0.9, "off_policy_mask_threshold": 0.5}, "temperature must be 1, .*, got 0.7"),
        ({"temperature": 3.0}, "temperature must be at most 2 with use_vllm, got 3.0"),
        ({"eval_temperature": 2.5}, "eval_temperature must be at most 2 with use_vllm, got 2.5"),
        ({"vllm_weight_transfer": "nccl"}, "vllm_weight_transfer must be one of auto, memory, folder, got 'nccl'"),
        ({"rollout_engine": "vllm"}, "rollout_engine must be one of transformers, vllm_server, vllm_colocate, got 'vllm'"),
        ({"rollout_engine": "transformers"}, "use_vllm must be False with rollout_engine='transformers', or None, got True"),
        (
            {"rollout_engine": "vllm_colocate"},
            "vllm_mode must be 'colocate' with rollout_engine='vllm_colocate', .* got 'server'",
        ),
        ({"max_num_seqs": 8}, r"max_num_seqs must be None with a vLLM server \(set its --max-num-seqs instead\), got 8"),
    ],
)
def test_unsupported_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, None, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": r".*(q_proj|qkv)"}, r"adapt the decoder alone with use_vllm, .* got .*visual"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "leave out use_dora with use_vllm"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "have bias='none' with use_vllm, got 'all'"),
    ],
)
def test_unsupported_adapters(options, message):
    model = get_peft_model(tiny.vlm(tied=False), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with pytest.raises(ValueError, match=f"peft_config must {message}"):
        check_adapters(model)


def test_only_adapters_are_sent(fake, tmp_path):
    """The server gets a folder that peft can load; it stays until the next update, because vLLM may load it again."""
    fake.lora = {"max_lora_rank": 2}
    adapters = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM", init_lora_weights=False)
    run = trainer(tmp_path, fake, peft_config=adapters)
    loaded = []

    def load_lora_adapter(body):
        assert body["load_inplace"]
        loaded.append(load_file(Path(body["lora_path"]) / "adapter_model.safetensors"))
        fake.model = get_peft_model(tiny.vlm(tied=False), adapters)
        fake.model.load_adapter(body["lora_path"], "default")
        fake.model.eval()
        return b"Success"

    fake.load_lora_adapter = load_lora_adapter
    run.train()
    assert len(loaded) == 2
    assert all("lora_" in name for name in loaded[0])
    assert any(not torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])
    assert fake.counts["/collective_rpc"] == 0
    assert fake.bodies[-1]["model"] == "vlmkernels"
    assert [folder.name for folder in (tmp_path / "vllm-weights").iterdir()] == [run.engine.version]
