"""The vLLM engines with a real vLLM on the CPU: ``make test-vllm``.

A server and engines in this process serve a Qwen2.5-VL of 0.4 million parameters. Its head is not tied to its embedding: vLLM
0.32 for CPUs keeps a packed copy of a tied head that no update of weights reaches. The last test has the fingerprint find it.
"""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from support import tiny
from support.observations import observation, result_text
from torch.multiprocessing.reductions import rebuild_tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmkernels.data.samples import encode, read_sample
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.rollout.base import Engine, RolloutError
from vlmkernels.rollout.vllm import engine as vllm_engine
from vlmkernels.rollout.vllm import transfer
from vlmkernels.rollout.vllm.fingerprint import relative_difference
from vlmkernels.rollout.vllm.server import VLLMClient
from vlmkernels.rollout.vllm.weights import checkpoint_tensors
from vlmkernels.train import GRPOConfig, GRPOTrainer

BOUND = 1e-4  # absolute, of fp32 log-probabilities with equal weights; measured: 1.6e-5
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # compilation takes a minute per shape of model
}
os.environ |= ENVIRONMENT
LORA = LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj)", task_type="CAUSAL_LM")


def small_vlm(seed: int = 0, tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """``tiny.vlm`` with heads of 64, which vLLM's attention on CPUs needs."""
    config = tiny.vlm(tied=tied).config.to_dict()
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    config["text_config"] |= {**sizes, "rope_parameters": rope}
    config["vision_config"] |= {"hidden_size": 64, "out_hidden_size": 128}
    torch.manual_seed(seed)
    return tiny._finish(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)))


class Server:
    """A vLLM server on a free port of the loopback interface."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        small_vlm().save_pretrained(folder)
        tiny.processor().save_pretrained(folder)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # "vllm serve" of vllm-cpu needs the package vllm
        options = f"--host 127.0.0.1 --port {self.port} --dtype float32 --max-model-len 512 --max-num-seqs 32 --enforce-eager"
        options += " --enable-scale-out --enable-lora --max-lora-rank 8"
        log = (self.folder / "server.log").open("ab")
        videos = ["--media-io-kwargs", '{"video": {"num_frames": -1, "fps": 2}}']
        transfer = ["--weight-transfer-config", '{"backend": "ipc"}']  # which needs GPUs; weights go through a folder
        command = [*module, "--model", str(self.folder), *options.split(), *videos, *transfer]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def kill(self) -> None:
        """Kill all processes of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("model"))
    yield server
    server.kill()


def reward(completions, **kwargs):
    return [len(set(completion[0]["content"])) / 4 for completion in completions]


def trainer(folder: Path, model=None, rows="several", processor=None, peft_config=None, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "use_vllm": True,
        "vllm_server_timeout": 120,
    }
    args = GRPOConfig(**{**defaults, **options})
    model, processor = model or small_vlm(), processor or tiny.processor()
    result = GRPOTrainer(model, reward, args, tiny.rows(12, rows), processing_class=processor, peft_config=peft_config)
    return watched(result)


def watched(trainer):
    """Keep each rollout of the trainer with the log-probabilities that its model gives the tokens."""
    engine, trainer.rollouts = trainer.engine, []

    class Watched(Engine):
        def __init__(self):
            self.sync_weights = engine.sync_weights

        def __call__(self, model, prompts, num_generations, temperature, samples=None, episodes=None):
            start = time.perf_counter()
            rollout = engine(model, prompts, num_generations, temperature, samples, episodes)
            seconds, head = time.perf_counter() - start, output_head(model)
            batch = rollout.padded(torch.arange(len(rollout.group)))
            options = {"head": head, "arguments": logit_arguments(model, head), "temperature": temperature}
            expected = torch.zeros(rollout.completion_mask.shape)
            expected[rollout.completion_mask] = completion_logps(model, batch, **options)
            trainer.rollouts.append((rollout, expected, len(rollout.group) / seconds))
            return rollout

    trainer.vllm, trainer.engine = engine, Watched()
    return trainer


def check(trainer, name: str, steps: int = 3) -> None:
    """The engine's log-probabilities are the trainer's at every step, and each weight update was compared."""
    assert len(trainer.rollouts) == steps
    gaps = [float((rollout.logps - expected).abs().max()) for rollout, expected, _ in trainer.rollouts]
    assert max(gaps) < BOUND
    banned = torch.tensor(trainer.vllm.banned)
    assert not any(torch.isin(r.completion_ids[r.completion_mask], banned).any() for r, _, _ in trainer.rollouts)
    logs = [entry for entry in trainer.state.log_history if "vllm/fingerprint" in entry]
    assert len(logs) == steps
    fingerprints = [entry["vllm/fingerprint"] for entry in logs]
    assert max(fingerprints) < BOUND
    speed, sync = max(s for *_, s in trainer.rollouts), min(entry["vllm/sync_time"] for entry in logs)
    print(f"\n{name}: |logp| differ by {max(gaps):.1e} at most, fingerprints by {max(fingerprints):.1e}, ", end="")
    print(f"{speed:.0f} completions/s, {sync:.2f} s an update")


class Results:
    """Up to three results after the turns of each of 8 trajectories, whatever the model wrote, with 0 to 2 images each.

    Attributes:
        refused: trajectories for whose last result there was no room.
    """

    def __init__(self, family):
        self.group, self.family, self.processor = torch.arange(2).repeat_interleave(4), family, tiny.processor()
        self.num_turns, self.running, self.refused = [0] * 8, [], []

    def end_turn(self, k, ids, ended):
        self.num_turns[k] += 1
        if not ended or self.num_turns[k] > k % 4:
            return False
        self.running.append(k)
        return True

    def ready(self, wait):
        done, self.running = self.running, []
        return [(k, self._result(10 * k + self.num_turns[k])) for k in done]

    def refuse(self, k):
        self.refused.append(k)

    def _result(self, number):
        images = [tiny.image(100 * n + number, width=28 * (1 + number % 3), height=56) for n in range(number % 3)]
        return observation(result_text(f"result {number}", len(images)), images, self.processor, self.family)


def check_trajectories(run, name: str, step: int) -> None:
    """The log-probabilities of trajectories with results and images between their turns are the trainer's."""
    engine, model, temperature = run.vllm, run.model.eval(), run.args.temperature
    engine.sync_weights(model, step)
    samples = [read_sample(row, index) for index, row in enumerate(tiny.rows(2, "several"))]
    results = Results(engine.family)
    ends = [token for token in range(40) if token % 3]  # turns of a random model are short
    engine.sampling = replace(engine.sampling, max_new_tokens=250, eos_token_id=ends)
    prompts, start = encode(samples, tiny.processor(), engine.family), time.perf_counter()
    rollout = engine(model, prompts, 0, temperature, samples, results)
    seconds = time.perf_counter() - start
    assert results.num_turns == [1, 2, 3, 4] * 2
    assert rollout.turns.inputs.num_images.sum() > 8
    head = output_head(model)
    options = {"head": head, "arguments": logit_arguments(model, head), "temperature": temperature}
    with torch.no_grad():
        expected = completion_logps(model, rollout.padded(torch.arange(8)), **options)
    gap = float((rollout.logps[rollout.sampled_mask] - expected).abs().max())
    assert gap < BOUND
    print(f"\n{name}, 20 turns: |logp| of {len(expected)} tokens differ by {gap:.1e} at most, {seconds:.2f} s", end="")


def samples_with_videos() -> list:
    """An image; a video of 3 frames; two videos and two images."""
    rows = tiny.rows(3, "videos")
    rows[2]["videos"].append([tiny.image(50 + k, height=56) for k in range(2)])
    rows[2]["images"].append(tiny.image(60, width=56))
    return [read_sample(row, index) for index, row in enumerate(rows)]


def check_videos(run, name: str, step: int) -> None:
    """vLLM encodes videos, alone and between images, into the trainer's tokens, and computes its log-probabilities."""
    engine, model, temperature = run.vllm, run.model.eval(), run.args.temperature
    engine.sync_weights(model, step)
    engine.sampling = replace(engine.sampling, max_new_tokens=8, eos_token_id=[tiny.tokenizer().eos_token_id])
    samples, head = samples_with_videos(), output_head(model)
    prompts = encode(samples, tiny.processor(), engine.family)
    rollout = engine(model, prompts, 2, temperature, samples)
    options = {"head": head, "arguments": logit_arguments(model, head), "temperature": temperature}
    with torch.no_grad():
        expected = completion_logps(model, rollout.padded(torch.arange(6)), **options)
    gap = float((rollout.logps[rollout.completion_mask] - expected).abs().max())
    assert gap < BOUND
    print(f"\n{name}, 3 videos and 3 images: |logp| of {len(expected)} tokens differ by {gap:.1e} at most", end="")


def check_truncated_sampling(run, name: str) -> None:
    """The log-probabilities with which tokens were sampled, under top_k and top_p at a temperature, are the trainer's."""
    engine, model, temperature = run.vllm, run.model.eval(), 2.0  # the highest: the trained model has more likely tokens
    engine.sampling = replace(engine.sampling, top_k=12, top_p=0.9)
    samples = [read_sample(row, index) for index, row in enumerate(tiny.rows(2, "several"))]
    rollout = engine(model, encode(samples, tiny.processor(), engine.family), 16, temperature, samples)
    assert rollout.logps is None
    batch = rollout.padded(torch.arange(32))
    with torch.no_grad():
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.rows].double() / temperature
    logits[:, engine.banned] = -torch.inf
    logits[logits < logits.topk(12).values[:, -1:]] = -torch.inf
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    excluded = (ordered.cumsum(-1) - ordered >= 0.9).gather(1, order.argsort(-1))  # the tokens before reach top_p
    expected = logits.masked_fill(excluded, -torch.inf).log_softmax(-1).gather(1, batch.targets.unsqueeze(1))[:, 0]
    gap = float((rollout.sampling_logps[rollout.completion_mask] - expected).abs().max())
    assert gap < BOUND
    assert expected.min() < -0.5
    print(f"\n{name}, top_k 12, top_p 0.9: log q of {len(expected)} tokens differ by {gap:.1e} at most", end="")


def check_both_transfers(run, name: str, step: int) -> None:
    """Weights arrive in memory and through a folder; prints the seconds of an update without the comparison after it."""
    engine, seconds = run.vllm, {True: [], False: []}
    compare, engine._compare = engine._compare, lambda model, when: 0.0
    for number in range(10):
        engine.in_memory = number % 2 == 0
        with torch.no_grad():
            run.model.get_output_embeddings().weight.mul_(1.01)
        seconds[engine.in_memory].append(engine.sync_weights(run.model, step + number)["vllm/sync_time"])
        assert compare(run.model, "after an update") < BOUND
    engine.in_memory, engine._compare = True, compare
    memory, folder = (min(seconds[key]) for key in (True, False))
    print(f"\n{name}: {1000 * memory:.1f} ms an update in memory, {1000 * folder:.1f} ms through a folder", end="")


def check_cancelled_requests(run) -> None:
    """Tools fail while vLLM samples other trajectories, which it then drops."""
    samples, results = [read_sample(row, index) for index, row in enumerate(tiny.rows(2, "several"))], Results(run.vllm.family)
    results.group, running = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]), []  # one first turn ends sooner than the last of seven

    def fail(k, ids, ended):
        running.append(unfinished())
        raise RuntimeError("failed tool")

    unfinished, results.end_turn = run.vllm.llm.llm_engine.has_unfinished_requests, fail
    with pytest.raises(RuntimeError, match="failed tool"):
        run.vllm(run.model, encode(samples, tiny.processor(), run.vllm.family), 0, run.args.temperature, samples, results)
    print(f", requests were cancelled: {running}", end="")
    assert not unfinished()


def test_vllm_takes_handles_of_tensors(monkeypatch):
    """vLLM's class for the body of /update_weights reads what is sent by CUDA IPC, here with tensors of the CPU."""
    from vllm.distributed.weight_transfer import ipc_engine

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setattr(transfer, "_gpu_id", lambda tensor: "GPU-0")
    sent, model = {}, small_vlm()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        transfer.CUDAIPC(sent.__setitem__).send(checkpoint_tensors(model, torch.float32))
    ipc_engine.IPCWeightTransferInitInfo(**sent["/init_weight_transfer_engine"]["init_info"])
    info = ipc_engine.IPCWeightTransferUpdateInfo(**sent["/update_weights"]["update_info"])
    expected = dict(checkpoint_tensors(model, torch.float32))
    assert info.names == [*expected]
    for handle, x in zip(info.ipc_handles, expected.values(), strict=True):
        assert torch.equal(rebuild_tensor(*handle["GPU-0"]), x)


def test_vllms_trainer_sends_weights_by_nccl(monkeypatch):
    """vLLM's side of the transfer in the trainer, without NCCL: it reads the weights and sends requests."""
    from vllm.distributed.weight_transfer import nccl_engine

    engine, received, requests = nccl_engine.NCCLTrainerWeightTransferEngine, {}, []
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: None)
    monkeypatch.setattr(engine, "_broadcast", lambda self, source, meta: received.update(source.iter_full()))

    def request(path, body):
        requests.append((path, body))
        return {"world_size": 4}

    model = small_vlm()
    sent = transfer.NCCL(request, "http://127.0.0.1:8000")
    for _ in range(2):
        sent.send(checkpoint_tensors(model, torch.bfloat16))
        expected = dict(checkpoint_tensors(model, torch.bfloat16))
        assert received.keys() == expected.keys()
        assert all(torch.equal(x, received[name]) for name, x in expected.items())
        received.clear()
    bodies = dict(requests)
    assert bodies["/init_weight_transfer_engine"]["init_info"]["world_size"] == 5
    first = next(body for path, body in requests if path == "/update_weights")  # vLLM 0.33 does not repeat it
    info = nccl_engine.NCCLWeightTransferUpdateInfo(**first["update_info"])
    assert (info.names, {*info.dtype_names}) == ([*expected], {"bfloat16"})
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert [path for path, _ in requests] == ["/get_world_size", "/init_weight_transfer_engine", *update, *update]


def test_every_process_reports_a_missing_server(tmp_path):
    """The main process contacts the server; all processes raise its error."""
    script = (
        "import sys, engines, pathlib; engines.trainer(pathlib.Path(sys.argv[1]), vllm_mode='server', vllm_server_timeout=1,"
    )
    script += " vllm_server_base_url='http://127.0.0.1:9')"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": paths}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert "vllm_server_base_url must be the URL of a healthy vLLM server within vllm_server_timeout = 1 s" in errors
        assert process.returncode == 1


def test_a_server_of_another_model_is_refused(server, tmp_path):
    """Before the first weight update."""
    with pytest.raises(RolloutError, match=r"disagree before training \(is .* the same model\?\)"):
        trainer(tmp_path, small_vlm(seed=1), vllm_mode="server", vllm_server_base_url=server.url)
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url}
    settings = VLLMClient(server.url, 60, 60).request("/server_info?config_format=json")["vllm_config"]
    assert settings["weight_transfer_config"]["backend"] == "ipc"
    assert settings["model_config"]["return_sampling_mask"] is False
    assert settings["aux_output_config"]["enable_return_routed_experts"] is False
    with pytest.raises(
        ValueError, match=r"vllm_weight_transfer must be .*, because the weights must be on a GPU .* got 'memory'"
    ):
        trainer(tmp_path, vllm_weight_transfer="memory", **options)
    with pytest.raises(ValueError, match=r"started with --max-num-seqs 64 or more, got 32"):
        trainer(tmp_path, num_generations=64, per_device_train_batch_size=64, **options)
    with pytest.raises(ValueError, match=r"started with --logprobs-mode processed_logprobs, got raw_logprobs"):
        trainer(tmp_path, temperature=0.7, **options)
    adapters = LoraConfig(r=16, target_modules=LORA.target_modules, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"started with --max-lora-rank 16, got 8"):
        trainer(tmp_path, peft_config=adapters, **options)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_training_through_a_server(server, tmp_path, peft_config):
    """With top_k; log-probabilities are still those of the whole vocabulary."""
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url, "top_k": 20}
    if peft_config is not None:  # a run without adapters restores the server's base weights
        run = trainer(tmp_path / "base", max_steps=1, **options)
        run.train()
    run = trainer(tmp_path, peft_config=peft_config, **options)
    before = run.vllm.fingerprint.logps(run.model)
    run.train()
    check(run, f"server, {'full' if peft_config is None else 'LoRA'}")
    check_trajectories(run, f"server, {'full' if peft_config is None else 'LoRA'}", step=3)
    check_videos(run, f"server, {'full' if peft_config is None else 'LoRA'}", step=3)
    assert relative_difference(before, run.vllm.fingerprint.logps(run.model)) > 10 * BOUND
    left = sorted((tmp_path / "vllm-weights").iterdir())
    assert len(left) == (peft_config is not None)  # vLLM may load an adapter again


def test_wrong_replies_stop_the_run(server, tmp_path, monkeypatch):
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url}
    small = tiny.processor()
    small.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 2 * 28 * 28}
    with pytest.raises(RolloutError, match=r"sample 0: vLLM encoded the prompt as \d+ tokens and the trainer as \d+"):
        trainer(tmp_path, processor=small, **options)
    run, save = trainer(tmp_path, **options), vllm_engine.save_weights
    monkeypatch.setattr(vllm_engine, "save_weights", lambda model, *rest: save(small_vlm(seed=2), *rest))
    with pytest.raises(RolloutError, match="disagree after its weights were updated"):
        run.train()


def test_a_server_that_is_killed_and_comes_back_gets_the_weights_again(server, tmp_path):
    """The server restarts between two updates, with the weights that it was launched with."""
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url}
    run = trainer(tmp_path, max_steps=2, **options)
    sync_weights, engine = run.engine.sync_weights, run.vllm

    def interrupted(model, step):
        metrics = sync_weights(model, step)
        if step == 1:
            server.kill()
            server.start()
        return metrics

    run.engine.sync_weights = interrupted
    version = []
    update = engine._update
    engine._update = lambda load, name: (version.append(name), update(load, name))
    run.train()
    check(run, "server, killed", steps=2)
    assert [name.partition("-")[2] for name in version] == ["0", "1", "1"]


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_training_with_vllm_in_the_process(tmp_path, peft_config):
    """At a temperature other than 1, for which vLLM's log-probabilities exclude banned tokens."""
    run = trainer(tmp_path, peft_config=peft_config, vllm_mode="colocate", temperature=0.7, vllm_max_model_length=512)
    try:
        assert run.vllm.logprobs_mode == "processed_logprobs"
        run.train()
        check(run, f"colocate, {'full' if peft_config is None else 'LoRA'}")
        check_trajectories(run, f"colocate, {'full' if peft_config is None else 'LoRA'}", step=3)
        check_cancelled_requests(run)
        check_videos(run, f"colocate, {'full' if peft_config is None else 'LoRA'}", step=3)
        check_truncated_sampling(run, f"colocate, {'full' if peft_config is None else 'LoRA'}")
        assert run.vllm.in_memory == (peft_config is None)
        if run.vllm.in_memory:
            check_both_transfers(run, "colocate", step=4)
    finally:
        run.vllm.close()
        gc.collect()
    assert not list((tmp_path / "vllm-weights").iterdir())


def test_the_fingerprint_finds_a_head_that_was_left_behind(tmp_path):
    run = trainer(tmp_path, small_vlm(tied=True), vllm_mode="colocate", vllm_max_model_length=512)
    try:
        with pytest.raises(RolloutError, match="disagree after its weights were updated"):
            run.train()
    finally:
        run.vllm.close()
    assert len(run.rollouts) == 1  # with the initial weights
