"""How weights go to vLLM: in memory, in one process, by CUDA IPC and by NCCL, or through a folder."""

import base64
import functools
import multiprocessing
import pickle
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import tiny, tiny_families
from support.vllm_engines import FakeRun
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from vlmkernels.rollout.base import RolloutError, Sampling
from vlmkernels.rollout.vllm import transfer
from vlmkernels.rollout.vllm.colocate import VLLMColocate
from vlmkernels.rollout.vllm.config import VLLMConfig
from vlmkernels.rollout.vllm.server import VLLMServer
from vlmkernels.rollout.vllm.weights import checkpoint_tensors, save_weights

torch.set_num_threads(1)


@pytest.fixture
def make(tmp_path, monkeypatch):
    runs = []

    def make(mode, **options):
        runs.append(FakeRun(mode, tmp_path / "weights", monkeypatch, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@pytest.fixture
def ipc(monkeypatch):
    """Handles of tensors on the CPU instead of a GPU: pickled, they hold copies of the tensors."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(transfer, "_gpu_id", lambda tensor: "GPU-0")
    prepare = VLLMServer._prepare_transfer

    def prepare_as_on_a_gpu(self, settings, model):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "device", torch.device("cuda"))
            prepare(self, settings, model)

    monkeypatch.setattr(VLLMServer, "_prepare_transfer", prepare_as_on_a_gpu)


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def has_weights_of(fake, model):
    return all(torch.equal(x, fake.model.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe", "gemma4", "glm4v_moe", "llava_next", "text", "tied"])
def test_tensors_are_those_of_the_folder(tmp_path, name, dtype):
    """Also of models whose parameters are not those of a checkpoint: experts are one parameter, but one tensor each there."""
    model = tiny.vlm() if name == "tied" else tiny_families.case(name).model
    expected = load_file(save_weights(model, tmp_path, dtype) / "model.safetensors")
    tensors = dict(checkpoint_tensors(model, dtype))
    assert tensors.keys() == expected.keys()
    for key, x in tensors.items():
        assert x.dtype == expected[key].dtype
        assert torch.equal(x, expected[key])


def test_in_the_process(make, capsys):
    """Each update replaces all weights, without files; the folder holds only the checkpoint that vLLM started from."""
    run = make("colocate")
    assert "Weights go to vLLM in memory, in this process" in capsys.readouterr().out
    files = sorted(run.engine.folder.rglob("*"))
    for step in range(2):
        changed(run.model)
        metrics = run.engine.sync_weights(run.model, step)
        assert has_weights_of(run.fake, run.model)
        assert metrics["vllm/fingerprint"] < 1e-6
        assert run.fake.version == run.engine.version
    assert sorted(run.engine.folder.rglob("*")) == files
    assert run.engine.sync_weights(run.model, 1) == {}


def test_by_cuda_ipc(make, ipc, capsys):
    run = make("server", setup=lambda fake: setattr(fake, "transfer", "ipc"))
    assert "Weights go to vLLM in memory, by CUDA IPC" in capsys.readouterr().out
    changed(run.model)
    run.engine.sync_weights(run.model, 0)
    assert has_weights_of(run.fake, run.model)
    assert run.fake.version == run.engine.version
    order = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/resume"]
    assert [run.fake.counts[path] for path in order] == [1, 1, 1, 1, 1, 2]  # /resume also before training
    assert run.fake.counts["/collective_rpc"] == 0
    assert not run.engine.folder.exists()


class WeightSource:
    """As in vLLM 0.33: the trainer also reads its source when it is made."""

    def __init_subclass__(cls):
        assert isinstance(vars(cls)["metadata"], functools.cached_property)

    def iter_full(self):
        raise NotImplementedError


@pytest.mark.parametrize("source", [object, WeightSource], ids=["vllm 0.32", "vllm 0.33"])
def test_by_nccl(make, ipc, monkeypatch, capsys, source):
    """vLLM's own trainer broadcasts; the fake gets its tensors. Requests go through the engine's client."""
    module = types.ModuleType("vllm.distributed.weight_transfer.nccl_engine")
    module.WeightSource, module.ParamMeta = source, lambda *values: values
    module.NCCLTrainerInitInfo = types.SimpleNamespace
    seen = []

    class Trainer:
        @classmethod
        def trainer_init(cls, info, client, source):
            seen.append(info)
            client.init_weight_transfer_engine({"world_size": info.world_size})
            trainer = cls()
            trainer.client, trainer.source = client, source
            assert trainer.read() == ({}, [])
            return trainer

        def read(self):
            if isinstance(self.source, WeightSource):
                return dict(self.source.iter_full()), self.source.metadata
            return dict(self.source), self.source.metadata()

        def send_weights(self):
            tensors, metadata = self.read()
            assert [(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()] == metadata
            self.client.start_weight_update()
            run.fake.received = tensors
            self.client.finish_weight_update()

    module.NCCLTrainerWeightTransferEngine = Trainer
    for name in ("vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.distributed.weight_transfer"].nccl_engine = module
    run = make("server", setup=lambda fake: setattr(fake, "transfer", "nccl"))
    assert "Weights go to vLLM in memory, by NCCL" in capsys.readouterr().out
    assert seen[0].world_size == 2
    assert seen[0].master_address == "127.0.0.1"
    changed(run.model)
    run.engine.sync_weights(run.model, 0)
    assert has_weights_of(run.fake, run.model)
    run.engine.sync_weights(run.model, 1)
    assert run.fake.counts["/init_weight_transfer_engine"] == 1
    run.fake.version = "default"  # the server was restarted
    changed(run.model)
    run.engine.sync_weights(run.model, 2)
    assert run.fake.counts["/init_weight_transfer_engine"] == len(seen) == 2
    assert has_weights_of(run.fake, run.model)


def _load(connection, update):
    """Rebuild tensors on a GPU from their handles, as vLLM's worker does, and send copies of them on the CPU."""
    handles = pickle.loads(base64.b64decode(update["ipc_handles_pickled"]))
    tensors = [rebuild_cuda_tensor(*arguments[:6], 0, *arguments[7:]) for handle in handles for arguments in handle.values()]
    connection.send(dict(zip(update["names"], (x.cpu().numpy() for x in tensors), strict=True)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_process_reads_the_memory_of_the_gpu():
    model, context = tiny.vlm(tied=False).to("cuda"), multiprocessing.get_context("spawn")
    own, other = context.Pipe()

    def request(path, body):
        if path == "/update_weights":
            process = context.Process(target=_load, args=(other, body["update_info"]))
            process.start()
            received.update(own.recv())
            process.join()

    received = {}
    transfer.CUDAIPC(request).send(checkpoint_tensors(model, torch.float32))
    expected = dict(checkpoint_tensors(model, torch.float32))
    assert received.keys() == expected.keys()
    assert all(torch.equal(torch.from_numpy(received[name]), x.cpu()) for name, x in expected.items())


def test_weights_on_the_cpu_are_not_sent_by_cuda_ipc():
    sent = transfer.CUDAIPC(lambda path, body: None)
    with pytest.raises(RolloutError, match="must be on a GPU to send them by CUDA IPC, got weight on the CPU"):
        sent.send([("weight", torch.zeros(2))])


def test_a_failed_update_resumes_the_server(make, ipc):
    run = make("server", setup=lambda fake: setattr(fake, "transfer", "ipc"))

    def fail(answer, number):
        raise OSError("no handle")

    run.fake.change["/update_weights"] = fail
    with pytest.raises(RolloutError, match="update_weights failed with"):
        run.engine.sync_weights(run.model, 0)
    assert run.fake.counts["/resume"] == run.fake.counts["/pause"] + 1


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_through_a_folder(make, mode, capsys):
    run = make(mode, vllm={"weight_transfer": "folder"}, setup=lambda fake: setattr(fake, "transfer", "ipc"))
    assert f"Weights go to vLLM through the folder {run.engine.folder}\n" in capsys.readouterr().out
    changed(run.model)
    run.engine.sync_weights(run.model, 0)
    assert has_weights_of(run.fake, run.model)
    assert run.fake.counts["/update_weights"] == 0


@pytest.mark.parametrize(
    ("backend", "obstacle"),
    [
        (None, "the server was started without --weight-transfer-config, whose backend must be ipc or nccl"),
        (
            "sparse_nccl",
            "the server was started with 'sparse_nccl' as --weight-transfer-config, whose backend must be ipc or nccl",
        ),
        ("ipc", "the weights must be on a GPU to go to the server in memory, and are on cpu"),
    ],
)
def test_what_is_in_the_way_is_named(make, backend, obstacle, capsys):
    make("server", setup=lambda fake: setattr(fake, "transfer", backend))
    assert f"weights, because {obstacle}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"vllm_weight_transfer must be 'auto' or 'folder', because {obstacle}, got 'memory'"):
        make("server", setup=lambda fake: setattr(fake, "transfer", backend), vllm={"weight_transfer": "memory"})


def test_a_server_on_several_gpus(make, capsys):
    """Its other GPUs could not read handles of the trainer's memory."""

    def setup(fake):
        fake.transfer = "ipc"
        fake.change["/server_info"] = lambda answer, number: {
            "vllm_config": answer["vllm_config"] | {"parallel_config": {"world_size": 2}}
        }

    make("server", setup=setup)
    assert "weights, because the server runs on 2 GPUs, and CUDA IPC reaches only that of" in capsys.readouterr().out


def test_vllm_in_another_process(make, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    make("colocate")
    assert "weights, because VLLM_ENABLE_V1_MULTIPROCESSING runs vLLM in another process" in capsys.readouterr().out


def test_adapters_need_a_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    adapters = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM")
    model, config = get_peft_model(tiny.vlm(tied=False), adapters), VLLMConfig(tmp_path, weight_transfer="memory")
    with pytest.raises(ValueError, match="'auto' or 'folder', because vLLM loads LoRA adapters from a folder, got 'memory'"):
        VLLMColocate(model, tiny.processor(), Sampling(4), config, Accelerator(cpu=True))
