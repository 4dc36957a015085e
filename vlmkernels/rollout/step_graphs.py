"""Decoding steps as CUDA graphs."""

import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Records a call of a function without running it. Returns a function that runs what was recorded, and the result of the call,
# which each run overwrites.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class StepGraphs:
    """Runs a function of static buffers: the first time with a key eagerly, then as a graph.

    The eager run compiles kernels and shows whether the function waits for the device. If it does, or if it cannot be captured,
    all runs are eager, and a warning says why.

    Args:
        capture: see ``Capture``.

    Attributes:
        reason: why the function does not run as a graph; None if it does.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.reason: str | None = None
        self._graphs: dict[tuple[int, Hashable], tuple[Callable[[], None], Any] | None] = {}

    def __call__(self, width: int, version: Hashable, step: Callable[[], Any]) -> Any:
        """Run ``step`` and return its result, which the next run may overwrite.

        Args:
            width, version: the key: everything besides the contents of buffers that the function depends on. A new version
                means that buffers were replaced.
        """
        if self.reason is not None:
            return step()
        key = width, version
        if key not in self._graphs:
            self._graphs = {other: graph for other, graph in self._graphs.items() if other[1] == version} | {key: None}
            with _synchronizations() as found:
                result = step()
            if found:
                self._refuse(f"the model waits for the GPU in {found[0]}")
            return result
        if self._graphs[key] is None:
            try:
                self._graphs[key] = self.capture(step)
            except RuntimeError as error:
                self._refuse(str(error).strip().split("\n")[0])
                return step()
        graph = self._graphs[key]
        assert graph is not None
        graph[0]()
        return graph[1]

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        self._graphs.clear()
        logger.warning_once(f"Decoding without CUDA graphs: {reason}")


def step_graphs(model: torch.nn.Module, device: torch.device) -> StepGraphs | None:
    """Return the graphs of a model's decoding steps, or None without a GPU or with VLMKERNELS_CUDA_GRAPHS=0."""
    if device.type != "cuda" or os.environ.get("VLMKERNELS_CUDA_GRAPHS", "1") == "0":
        return None
    graphs = StepGraphs(CudaCapture(device))
    if any(isinstance(module, FSDPModule) or hasattr(module, "_hf_hook") for module in model.modules()):
        graphs._refuse("parameters are sharded or offloaded")
    return graphs


class CudaCapture:
    """Captures functions as CUDA graphs, whose memory is in one pool because only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        # The allocator refuses to capture into a pool whose graphs have all been freed.
        self.latest: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would also free the pinned memory of vlmkernels.models.offload, and to pin memory takes long.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a capture cannot free the memory that the allocator keeps
        with torch.cuda.stream(self.stream):
            # Other threads, such as those of tools, may use the GPU meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        self.latest = graph
        return graph.replay, result


@contextmanager
def _synchronizations() -> Iterator[list[str]]:
    """Collect the places in code, "file:line", that wait for the GPU."""
    found: list[str] = []
    if not torch.cuda.is_available():
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
