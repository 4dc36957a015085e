"""Compile every Triton kernel as its op launches it, for several GPU architectures and without a GPU, and print what it uses.

The ops are called with CPU tensors. A launch specializes and compiles the kernel as on a GPU of that architecture, but does not
run it. Each call is made twice, because Triton compares the global values of a kernel between launches. The program prints a
line of JSON for each compiled kernel.

This is a program because tests run in Triton's interpreter, which replaces the kernels when triton is imported.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import vlmkernels
from vlmkernels import GRPOLossConfig, KeyValues, backend
from vlmkernels.ops import linear_grpo_loss as linear_grpo_loss_module
from vlmkernels.ops import linear_kl as linear_kl_module
from vlmkernels.ops import linear_logps as linear_logps_module
from vlmkernels.ops.fixed_matmul import fixed_matmul
from vlmkernels.ops.grpo_loss.config import KL_ESTIMATORS, LOSSES
from vlmkernels.ops.linear_logps import sweep, triton_fused
from vlmkernels.ops.tree_attention.merge import merge_

BF16, FP32 = torch.bfloat16, torch.float32
VOCAB = 151936
# The oldest supported architecture, that of the measured GPU, and the next.
ARCHITECTURES = (80, 90, 100)


def gather_logps(dtype: torch.dtype = BF16, rows: int = 4, repeated: bool = False, entropy: bool = True) -> None:
    logits = torch.zeros(rows, VOCAB, dtype=dtype, requires_grad=True)
    index = torch.tensor([0, 0, 1, 2]) if repeated else None
    mask = torch.ones(4, dtype=torch.bool) if repeated else None
    results = vlmkernels.gather_logps(
        logits,
        torch.zeros(len(logits) if index is None else 4, dtype=torch.int64),
        rows=index,
        mask=mask,
        return_entropy=entropy,
    )
    torch.autograd.backward(results, [torch.ones_like(x) for x in results] if entropy else torch.ones_like(results))


def head(dtype: torch.dtype, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    """Hidden states and a head. The memory is reserved, but only the rows that are read are written."""
    hidden, weight = torch.zeros(4, 64, dtype=dtype), torch.zeros(vocab, 64, dtype=dtype)
    return {"hidden": hidden.requires_grad_(), "weight": weight, "targets": torch.zeros(4, dtype=torch.int64)}


def linear_logps(dtype: torch.dtype = BF16, **options) -> None:
    logps, entropy = vlmkernels.linear_logps(**head(dtype), return_entropy=True, **options)
    if logps.requires_grad:
        (logps.sum() + entropy.sum()).backward()


def linear_logps_fused(dtype: torch.dtype = BF16, vocab: int = VOCAB, **options) -> None:
    with torch.no_grad():
        vlmkernels.linear_logps(**head(dtype, vocab), return_entropy=True, chunk_bytes=0, **options)


LOGPS = ("old_logps", "ref_logps", "rollout_logps")


def linear_grpo_loss(dtype: torch.dtype = BF16, given: tuple[str, ...] = (), **settings) -> None:
    config = GRPOLossConfig(**settings)
    logps = {name: torch.zeros(2, 2) for name in (*given, *(["masked_logps"] if config.perception else []))}
    arguments = head(dtype)
    arguments["targets"] = arguments["targets"].view(2, 2)
    arguments["hidden"] = arguments["hidden"].detach().view(2, 2, -1).requires_grad_()
    vlmkernels.linear_grpo_loss(**arguments, advantages=torch.ones(2), **logps, config=config).loss.backward()


def linear_kl(dtype: torch.dtype = BF16, **options) -> None:
    student, teacher = head(dtype), head(dtype)
    teacher_hidden, teacher_weight = teacher["hidden"].detach(), teacher["weight"]
    vlmkernels.linear_kl(student["hidden"], student["weight"], teacher_hidden, teacher_weight, **options).sum().backward()


def grpo_loss(packed: bool = False, per_token: bool = False, given: tuple[str, ...] = (), **settings) -> None:
    config = GRPOLossConfig(**settings)
    shape = (40,) if packed else (4, 10)
    logps = {name: torch.zeros(shape) for name in ("logps", *given, *(["masked_logps"] if config.perception else []))}
    layout = {"cu_seqlens": torch.arange(0, 41, 10, dtype=torch.int32)} if packed else {"loss_mask": torch.ones(shape).bool()}
    logps["logps"].requires_grad_()
    vlmkernels.grpo_loss(**logps, advantages=torch.zeros(shape if per_token else 4), **layout, config=config)


def group_advantages(sizes: list[int] | None = None, **settings) -> None:
    groups = {"num_generations": 8} if sizes is None else {"group_sizes": sizes}
    vlmkernels.group_advantages(torch.zeros(16, 2), **groups, **settings)


def pack_patches(**settings) -> None:
    image = torch.zeros(3, 112, 128, dtype=torch.uint8)[..., :112]
    vlmkernels.pack_patches([image], mean=(0.5,) * 3, std=(0.5,) * 3, dtype=BF16, **settings)


def rotary(width: int, pairs: int, batch: int = 2) -> None:
    query, key = torch.zeros(batch, 5, 16, width, dtype=BF16), torch.zeros(batch, 5, 2, width, dtype=BF16)
    cos, sin = torch.zeros(2, batch, 5, pairs)
    outputs = vlmkernels.rotary(query.requires_grad_(), key.requires_grad_(), cos, sin)
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def sample_logps(vocab: int = VOCAB, dtype: torch.dtype = BF16, greedy: bool = False, banned: str = "", **settings) -> None:
    mask = torch.zeros(3, vocab, dtype=torch.bool)
    options = {"banned": mask[:1], "banned_rows": torch.zeros(3, dtype=torch.int64)} if banned == "table" else {}
    if banned == "all":
        options = {"banned": mask[0]}
    if "repetition_penalty" in settings:
        options["seen"] = mask
    uniform = None if greedy else torch.zeros(3, dtype=torch.float64)
    vlmkernels.sample_logps(torch.zeros(3, vocab, dtype=dtype), uniform, **options, **settings)


def decode_attention(heads=(28, 4, 128, 128), dtype: torch.dtype = BF16, appends: bool = True, page_size: int = 0, **settings):
    query_heads, key_heads, width, value_width = heads
    slots = 5

    def level(num: int, capacity: int, segment: torch.Tensor | None = None) -> KeyValues:
        table = torch.zeros(num, capacity // page_size, dtype=torch.int32) if page_size else None
        shape = (table.numel(), key_heads, page_size) if page_size else (num, key_heads, capacity)
        buffers = (torch.zeros(*shape, x, dtype=dtype) for x in (width, value_width))
        return KeyValues(*buffers, torch.ones(num, dtype=torch.int32), segment, table)

    levels = [level(2, 640, torch.zeros(slots, dtype=torch.int32)), level(slots, 64)]
    new = {name: torch.zeros(slots, key_heads, x, dtype=dtype) for name, x in (("key", width), ("value", value_width))}
    vlmkernels.decode_attention(
        torch.zeros(slots, query_heads, width, dtype=dtype), levels, **(new if appends else {}), **settings
    )


def matmul(m: int, k: int, n: int, dtype: torch.dtype, bias: bool = False, offset: int = 0) -> None:
    a, b = torch.zeros(offset + m * k, dtype=dtype)[offset:].view(m, k), torch.zeros(n, k, dtype=dtype).t()
    fixed_matmul(a, b, bias=a.new_zeros(n) if bias else None, out_dtype=FP32)


def merge(width: int, rows: bool) -> None:
    part = torch.zeros(5, 2, width, dtype=BF16)
    merge_(torch.zeros(9, 2, width), torch.zeros(2, 9), part, torch.zeros(2, 5), torch.arange(5).int() if rows else None)


FILTERS = {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05}
EVERYTHING = {
    "packed": True, "per_token": True, "given": LOGPS, "importance_sampling_level": "sequence", "beta": 0.1,
    "rollout_correction": "sequence_mask", "off_policy_mask_threshold": 0.5, "perception_loss_weight": 0.01,
}  # fmt: skip
QWEN, SIGLIP = {"patch_size": 14}, {"patch_size": 16, "layout": "siglip2_naflex"}


class Call(NamedTuple):
    """A call of an op, and the architectures for which its kernels are compiled."""

    function: Callable[..., None]
    architectures: tuple[int, ...] = ARCHITECTURES


# With these, every kernel is compiled for every architecture.
CALLS = [
    Call(gather_logps),
    Call(linear_logps),
    Call(partial(linear_logps_fused), (*ARCHITECTURES, 86)),
    Call(linear_kl),
    Call(grpo_loss),
    Call(group_advantages),
    Call(partial(pack_patches, **QWEN)),
    Call(partial(rotary, 80, 40)),  # the vision towers of Qwen-VL
    Call(partial(sample_logps, **FILTERS)),
    Call(decode_attention),
    Call(partial(matmul, 3, 7, 5, BF16)),
    Call(partial(merge, 128, True)),
    # These need the most registers.
    Call(
        partial(
            linear_grpo_loss,
            given=LOGPS,
            loss_type="vespo",
            rollout_correction="token_truncate",
            perception_loss_weight=0.01,
            beta=0.1,
        )
    ),
    Call(partial(grpo_loss, **EVERYTHING)),
    Call(partial(decode_attention, (2, 1, 256, 256))),
    Call(partial(linear_logps_fused, softcap=30.0), (100,)),
    Call(partial(linear_logps_fused, FP32, softcap=30.0), (100,)),
]
# Other variants of the same source.
CALLS += [
    Call(function, (90,))
    for function in (
        partial(gather_logps, FP32, repeated=True),
        partial(gather_logps, entropy=False, rows=2048),
        partial(linear_logps, FP32, softcap=30.0),
        partial(linear_logps_fused, vocab=5003),  # without a tensor descriptor
        *(partial(linear_grpo_loss, given=LOGPS[:2], loss_type=name, beta=0.1, max_completion_length=8) for name in LOSSES),
        partial(linear_grpo_loss, given=LOGPS, perception_loss_weight=0.01, rollout_correction="token_mask"),
        *(partial(linear_kl, beta=beta) for beta in (0.0, 1.0)),
        partial(linear_kl, FP32, softcap=4.0, teacher_softcap=4.0),
        *(partial(grpo_loss, given=LOGPS[:2], loss_type=name, beta=0.1, max_completion_length=8) for name in LOSSES),
        *(partial(grpo_loss, given=LOGPS[1:2], kl_estimator=name, beta=0.1) for name in KL_ESTIMATORS),
        partial(group_advantages, [3, 13], scale="batch", baseline="pass_at_k"),
        partial(group_advantages, aggregation="normalize_then_sum", scale="group"),
        partial(pack_patches, **SIGLIP),
        partial(rotary, 256, 32),  # a quarter of each head: Qwen3.5
        partial(sample_logps),
        partial(sample_logps, 1),
        partial(sample_logps, banned="all"),
        partial(sample_logps, dtype=FP32, banned="all", **FILTERS),
        partial(sample_logps, banned="table", repetition_penalty=1.3, **FILTERS),
        partial(sample_logps, banned="table", greedy=True),
        partial(decode_attention, window=9, page_size=16),
        partial(decode_attention, (2, 2, 80, 40), appends=False, page_size=1),
        partial(decode_attention, (2, 1, 256, 256), FP32),
        *(partial(matmul, m, 64, 128, FP32, True, offset) for m, offset in ((1, 0), (70, 1))),
        partial(merge, 80, False),
    )
]


class Driver:
    """What a launch asks of a GPU. Each architecture is a device, so that Triton keeps its compiled kernels apart."""

    architecture = 0

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def resources(compiled) -> dict:
    """Return the registers, the memory and the special instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    row = {
        "shared": compiled.metadata.shared,
        "tensor_cores": re.findall(r"\b(tcgen05.mma|wgmma.mma|mma.sync)", ptx)[:1],
        "tma": "cp.async.bulk.tensor" in ptx,
    }
    return row | {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def main() -> None:
    gpu = Driver()
    driver.set_active(gpu)
    backend._interpreted = lambda: True  # the backend "triton" supports CPU tensors
    blocks_of = triton_fused.blocks_of
    triton_fused.blocks_of = lambda dtype, _, capped: blocks_of(dtype, divmod(gpu.architecture, 10), capped)
    for module in (sweep, linear_logps_module, linear_grpo_loss_module, linear_kl_module):
        module.result_dtype = lambda hidden: FP32  # as on CUDA
    sweep.Sweep.logits = lambda self, hidden, out: out.zero_()  # instead of the GEMM
    # What no kernel writes must be finite, because the ops check some results.
    torch.empty, torch.empty_like, torch.Tensor.new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros
    run = JITFunction.run
    launched = set()

    def compile_only(kernel, *args, grid, warmup, **options):
        assert grid[0] < 2**31, grid
        assert all(0 <= size < 65536 for size in grid[1:]), grid  # the limit of CUDA
        assert set(kernel.do_not_specialize) <= set(kernel.arg_names)  # Triton ignores a name that no argument has
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in launched:
            launched.add(compiled.hash)
            dtype = next((str(x.dtype).removeprefix("torch.") for x in args if isinstance(x, torch.Tensor)), None)
            row = {"kernel": kernel.fn.__name__, "sm": gpu.architecture, "dtype": dtype}
            print(json.dumps(row | resources(compiled)), flush=True)
        return compiled

    JITFunction.run = compile_only
    with vlmkernels.use_backend("triton"):
        for function, architectures in CALLS:
            for gpu.architecture in architectures:
                function()
                function()


if __name__ == "__main__":
    sys.exit(main())
