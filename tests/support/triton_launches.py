"""Compile what the launchers of Triton kernels launch, without a GPU, and print the resources of each kernel as JSON lines.

Each launcher is called with CPU tensors, twice: the kernels are specialized to its arguments and compiled as on a GPU, but not
run. compile_gate.py compiles the kernels with arguments that it chooses.
"""

import json
from typing import NamedTuple

import torch
from compile_gate import resources
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vlmkernels.ops.decode_attention import KeyValues
from vlmkernels.ops.decode_attention import triton as decode_attention
from vlmkernels.ops.fixed_matmul import triton as fixed_matmul
from vlmkernels.ops.grpo_loss import triton as grpo_loss
from vlmkernels.ops.grpo_loss.config import GRPOLossConfig
from vlmkernels.ops.grpo_loss.inputs import LossInputs, num_stats
from vlmkernels.ops.linear_kl import inputs as kl_inputs
from vlmkernels.ops.linear_kl import triton as linear_kl
from vlmkernels.ops.linear_logps.sweep import Head, narrowed
from vlmkernels.ops.sample_logps import triton as sample_logps
from vlmkernels.ops.sample_logps.inputs import Filters, Inputs, SampledTokens
from vlmkernels.ops.tree_attention.merge import merge_

BF16, FP32 = torch.bfloat16, torch.float32
CAPABILITY = 90


class Driver:
    """What ``JITFunction.run`` asks of a GPU before it launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)


def sample(vocab=5000, dtype=BF16, greedy=False, seen=False, banned=None, filters=(1.0, 0, 1.0, 0.0, 1.0)):
    logits = torch.zeros(3, vocab, dtype=dtype)
    uniform = None if greedy else torch.zeros(3, dtype=torch.float64)
    mask = torch.zeros(3, vocab, dtype=torch.bool)
    rows = torch.zeros(3, dtype=torch.int64) if banned == "table" else None
    inputs = Inputs(logits, uniform, mask if seen else None, mask[:1] if banned else None, rows)
    sample_logps.fwd(inputs, Filters(*filters), SampledTokens.empty(logits))


def decode(heads=(28, 4, 128, 128), dtype=BF16, appends=True, window=None, page_size=None, slots=5):
    query_heads, key_heads, width, value_width = heads

    def level(num, capacity, segment=None):
        table = None if page_size is None else torch.zeros(num, capacity // page_size, dtype=torch.int32)
        shape = (num, key_heads, capacity) if page_size is None else (table.numel(), key_heads, page_size)
        buffers = (torch.zeros(*shape, x, dtype=dtype) for x in (width, value_width))
        return KeyValues(*buffers, torch.ones(num, dtype=torch.int32), segment, table)

    levels = [level(2, 640, torch.zeros(slots, dtype=torch.int32)), level(slots, 64)]
    query = torch.zeros(slots, query_heads, width, dtype=dtype)
    new = [torch.zeros(slots, key_heads, x, dtype=dtype) if appends else None for x in (width, value_width)]
    out, lse = query.new_zeros(slots, query_heads, value_width), torch.zeros(slots, query_heads)
    decode_attention.fwd(query, *new, levels, window, 0.1, out, lse)


def divergence(beta, vocab=5003, softcap=None, gradient=BF16):
    rows = kl_inputs.SelectedRows(torch.zeros(3), torch.zeros(3, 5), torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(3))
    logits, teacher_logits = torch.zeros(2, 3, vocab)
    pair = kl_inputs.Pair(*(Head(torch.zeros(1, 1), None, 0.9, 1.0, cap) for cap in (softcap, None)), beta)
    linear_kl.sweep(logits, teacher_logits, rows, pair, narrowed(logits, gradient))


def loss(packed=False, **settings):
    config = GRPOLossConfig(**settings)
    logps = torch.zeros(40) if packed else torch.zeros(4, 10)
    absent = LossInputs(*[None] * (len(LossInputs._fields) - 1), accumulation_steps=1.0)
    inputs = absent._replace(logps=logps, advantages=torch.zeros(4), masked_logps=logps if config.perception else None)
    if packed:
        inputs = inputs._replace(cu_seqlens=torch.arange(0, 41, 10, dtype=torch.int32))
    outputs = logps.clone(), logps.new_empty(0), logps.clone(), logps.new_empty(num_stats(config))
    grpo_loss.fwd(inputs, config, logps.new_empty(()), *outputs)


def matmul(m, k, n, dtype, bias=False, offset=0):
    a, b = torch.zeros(offset + m * k, dtype=dtype)[offset:].view(m, k), torch.zeros(n, k, dtype=dtype).t()
    fixed_matmul.run(a, b, a.new_zeros(n) if bias else None, FP32)


def merge(width, rows):
    part = torch.zeros(5, 2, width, dtype=BF16)
    merge_(torch.zeros(9, 2, width), torch.zeros(2, 9), part, torch.zeros(2, 5), torch.arange(5).int() if rows else None)


class Launch(NamedTuple):
    function: object
    args: tuple = ()
    options: dict = {}  # noqa: RUF012 (a NamedTuple's default is not changed)


FILTERED = (0.7, 50, 0.9, 0.05, 1.3)
LAUNCHES = [
    Launch(sample),
    Launch(sample, (1,)),
    Launch(sample, options={"banned": "all"}),
    Launch(sample, options={"banned": "all", "filters": FILTERED, "dtype": FP32}),
    Launch(sample, options={"banned": "table", "filters": FILTERED, "seen": True}),
    Launch(sample, options={"banned": "table", "greedy": True}),
    Launch(decode),
    Launch(decode, options={"window": 9, "page_size": 16}),
    Launch(decode, options={"appends": False, "page_size": 1, "heads": (2, 2, 80, 40)}),
    Launch(decode, ((2, 1, 256, 256), FP32)),
    *(Launch(divergence, (beta,)) for beta in (0.0, 0.5, 1.0)),
    Launch(divergence, (1.0, 1, 4.0, FP32)),
    Launch(loss),
    Launch(loss, options={"packed": True, "loss_type": "dapo", "perception_loss_weight": 0.01}),
    Launch(matmul, (3, 7, 5, BF16)),
    *(Launch(matmul, (m, 64, 128, FP32, True, offset)) for m, offset in ((1, 0), (70, 1))),
    Launch(merge, (128, True)),
    Launch(merge, (80, False)),
]


def main() -> None:
    driver.set_active(Driver())
    run = JITFunction.run
    launched = {}

    def compile_only(kernel, *args, grid, warmup, **options):
        assert grid[0] < 2**31, grid
        assert all(0 <= size < 65536 for size in grid[1:]), grid  # the limit of CUDA
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        launched.setdefault(compiled.hash, (kernel.fn.__name__, compiled))
        return compiled

    JITFunction.run = compile_only
    for launch in LAUNCHES:
        for _ in range(2):  # Triton compares global values of a kernel between launches
            launch.function(*launch.args, **launch.options)
    for name, compiled in launched.values():
        print(json.dumps({"kernel": name} | resources(compiled)), flush=True)


if __name__ == "__main__":
    main()
