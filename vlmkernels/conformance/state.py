"""The global state in which contracts run, whatever a project, its conftest.py or another adapter sets."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

# What a method may change, as functions that return it and that set it.
SETTINGS = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (os.getcwd, os.chdir),
)


@contextmanager
def standard_state() -> Iterator[None]:
    """Within the block, new tensors are fp32 on the CPU, autograd is on, seeds are fixed, and there is one thread.

    What the block changes of ``SETTINGS`` is restored.
    """
    before = [get() for get, _ in SETTINGS]
    # A device context makes each call slower.
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)  # inputs are small, and threads that share a core wait for each other
        with device, torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        for (_, restore), value in zip(SETTINGS, before, strict=True):
            restore(value)
