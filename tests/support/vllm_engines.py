"""The vLLM engines with a fake vLLM."""

import sys

from accelerate import Accelerator

from support import tiny
from support.fake_vllm import FakeModule, FakeVLLM
from vlmkernels.data.samples import encode, read_sample
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.vllm import server
from vlmkernels.rollout.vllm.colocate import VLLMColocate
from vlmkernels.rollout.vllm.config import VLLMConfig
from vlmkernels.rollout.vllm.server import VLLMServer

ENGINES = {"server": VLLMServer, "colocate": VLLMColocate}


class FakeRun:
    """An engine of a mode, the trainer's model and a fake vLLM.

    Args:
        mode: "server" or "colocate".
        folder: for weights.
        monkeypatch: pytest's.
        model: the trainer's; a copy with its weights is vLLM's. Default: ``tiny.vlm(tied=False)``.
        setup: changes the fake before the engine is made.
        vllm: further options of ``VLLMConfig``.
        sampling: further options of ``Sampling``.
    """

    def __init__(self, mode, folder, monkeypatch, model=None, setup=lambda fake: None, vllm=None, **sampling):
        self.model, self.processor = tiny.vlm(tied=False) if model is None else model, tiny.processor()
        self.fake = FakeVLLM(model=type(self.model)(self.model.config).eval())
        self.fake.model.load_state_dict(self.model.state_dict())
        setup(self.fake)
        self.module = FakeModule(self.fake)
        monkeypatch.setitem(sys.modules, "vllm", self.module)
        monkeypatch.setattr(server, "BACKOFF", 0.01)
        config = VLLMConfig(folder, mode, server_base_url=self.fake.url, server_timeout=5, request_timeout=5, **(vllm or {}))
        options = Sampling(**{"max_new_tokens": 4, **sampling})
        self.engine = ENGINES[mode](self.model, self.processor, options, config, Accelerator(cpu=True))

    def sample(self, rows, num_generations: int = 2, temperature: float | None = None):
        """Update the weights and sample completions of rows."""
        samples = [read_sample(row, index) for index, row in enumerate(rows)]
        self.engine.sync_weights(self.model, 0)
        temperature = self.engine.sampling.temperature if temperature is None else temperature
        return self.engine(
            self.model, encode(samples, self.processor, self.engine.family), num_generations, temperature, samples
        )

    def close(self) -> None:
        self.fake.http.shutdown()
        self.fake.http.server_close()
