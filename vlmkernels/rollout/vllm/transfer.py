"""Sending weights to a vLLM server without files: by handles of the GPU's memory (CUDA IPC), or by NCCL.

The server must be started with ``--weight-transfer-config '{"backend": "ipc"}'`` or ``"nccl"``. Both send the tensors of a
checkpoint, under its names, between the requests /start_weight_update and /finish_weight_update.
"""

import base64
import functools
import pickle
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import torch
from torch.multiprocessing.reductions import reduce_tensor

from vlmkernels.rollout.base import RolloutError

Request = Callable[[str, dict[str, Any] | None], Any]
"""Sends a body to a path of the server and returns the reply."""


class WeightTransfer(ABC):
    """Sends weights to a server.

    Args:
        request: sends a request to the server.
    """

    name: str  # in messages

    def __init__(self, request: Request):
        self.request = request

    @abstractmethod
    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send the names and tensors of a checkpoint, and return when the server has loaded them."""


class CUDAIPC(WeightTransfer):
    """Sends handles of tensors on a GPU, from which a server that runs on the same GPU copies them.

    The server needs VLLM_ALLOW_INSECURE_SERIALIZATION=1, because it unpickles the handles.
    """

    name = "memory, CUDA IPC"

    def __init__(self, request: Request):
        super().__init__(request)
        request("/init_weight_transfer_engine", {"init_info": {"packed": False}})

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        # The server reads the memory of all tensors before /finish_weight_update returns; until then, keep them.
        held = dict(tensors)
        if outside := [name for name, x in held.items() if not x.is_cuda]:
            raise RolloutError(f"the weights must be on a GPU to send them by CUDA IPC, got {outside[0]} on the CPU")
        handles = [{_gpu_id(x): reduce_tensor(x)[1]} for x in held.values()]
        update = {
            "names": [*held],
            "dtype_names": [_dtype_name(x) for x in held.values()],
            "shapes": [list(x.shape) for x in held.values()],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }
        self.request("/start_weight_update", {})
        self.request("/update_weights", {"update_info": update})
        self.request("/finish_weight_update", {})


class NCCL(WeightTransfer):
    """Broadcasts the weights to the server's GPUs, with the trainer's side of the transfer that vLLM provides.

    Args:
        request: sends a request to the server.
        base_url: URL of the server. The trainer waits for its workers at this machine's address on the way to the server.

    Raises:
        ImportError: vLLM is not installed in this environment.
    """

    name = "memory, NCCL"

    def __init__(self, request: Request, base_url: str):
        super().__init__(request)
        try:
            from vllm.distributed.weight_transfer import nccl_engine
        except ImportError as error:
            raise ImportError("vllm_weight_transfer by NCCL needs vllm >= 0.32 in the trainer's environment too") from error
        self.nccl_engine = nccl_engine
        world_size = 1 + request("/get_world_size", None)["world_size"]
        address, port = _own_address(base_url)
        info = nccl_engine.NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=0)
        engine = nccl_engine.NCCLTrainerWeightTransferEngine
        self.engine = engine.trainer_init(info, client=self, source=_source(nccl_engine, []))

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.engine.source = _source(self.nccl_engine, [*tensors])
        try:
            self.engine.send_weights()
        finally:
            self.engine.source = _source(self.nccl_engine, [])

    # The client of vLLM's trainer.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.request("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.request("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self.request("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.request("/finish_weight_update", {})


def _source(nccl_engine: Any, tensors: list[tuple[str, torch.Tensor]]) -> Any:
    """Return the tensors of one transfer as vLLM's ``WeightSource``."""

    class Source(nccl_engine.WeightSource):
        def metadata(self) -> list[Any]:
            return [nccl_engine.ParamMeta(name, x.dtype, tuple(x.shape)) for name, x in tensors]

        def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(tensors)

        if hasattr(nccl_engine.WeightSource, "iter_full"):
            metadata = functools.cached_property(metadata)
        else:  # vLLM 0.32
            __iter__ = iter_full

    return Source()


BACKENDS = ("ipc", "nccl")  # of vLLM's --weight-transfer-config


def server_transfer(backend: str, request: Request, base_url: str) -> WeightTransfer:
    """Return the transfer that a server was started with, and connect to the server."""
    return CUDAIPC(request) if backend == "ipc" else NCCL(request, base_url)


def _gpu_id(tensor: torch.Tensor) -> str:
    """Return the unique id of the GPU that holds a tensor, by which the server recognizes its own GPU."""
    return str(torch.cuda.get_device_properties(tensor.device).uuid)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _own_address(base_url: str) -> tuple[str, int]:
    """Return this machine's address on the way to the server, and a free port."""
    parts = urlsplit(base_url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        address = probe.getsockname()[0]
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]
