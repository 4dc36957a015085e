"""Compile every Triton kernel for several GPU architectures, without a GPU, and print its resources as JSON lines.

This is a program because tests run in Triton's interpreter, which replaces the kernels when triton is imported.
"""

import importlib
import json
import multiprocessing
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmkernels import backend
from vlmkernels.ops.decode_attention import triton as decode_attention
from vlmkernels.ops.fixed_matmul import triton as fixed_matmul
from vlmkernels.ops.group_advantages.triton import BASELINES
from vlmkernels.ops.grpo_loss.config import Scalars
from vlmkernels.ops.grpo_loss.triton import KL, SURROGATES
from vlmkernels.ops.linear_logps import triton_fused as linear_logps_fused
from vlmkernels.ops.pack_patches.triton import BLOCK_F
from vlmkernels.ops.sample_logps import triton as sample_logps

# Types of arguments. "16" after a type says that the value is a multiple of 16, which Triton finds at run time.
GATHER = {"N": "i32", "V": "i32:16", "inner": "i32", "stride_outer": "i64:16", "stride_inner": "i32:16"}
FWD = {"logits_ptr": "*bf16:16", "mask_ptr": "*i1:16", "rows_ptr": "*i64:16", "partial_ptr": "*fp32:16", **GATHER}
MERGE = {"targets_ptr": "*i64:16", "logp_ptr": "*fp32:16", "entropy_ptr": "*fp32:16", "stats_ptr": "*fp32:16"}
BWD = {
    "dlogp_ptr": "*fp32:16", "targets_ptr": "*i64:16", "stats_ptr": "*fp32:16", "dentropy_ptr": "*fp32:16",
    "entropy_ptr": "*fp32:16", "logits_ptr": "*bf16:16", "offsets_ptr": "*i64:16", "dlogits_ptr": "*bf16:16",
    "V": "i32:16", "inner": "i32", "stride_outer": "i64:16", "stride_inner": "i32:16", "grad_stride_outer": "i64:16",
    "grad_stride_inner": "i32:16", "blocks": "i32", "temperature": "fp32", "scale": "fp32",
}  # fmt: skip
FLOATS = ("logp", "old_logp", "ref_logp", "rollout_logp", "masked_logp", "entropy", "adv", "threshold", "dlogp", "dentropy")
FLOATS += ("dmasked", "partial", "num_items", "loss", "stats")
STRIDES = ("logp", "old", "ref", "rollout", "masked", "entropy", "adv", "loss_mask")
GRPO = {
    **{f"{name}_ptr": "*fp32:16" for name in FLOATS},
    "loss_mask_ptr": "*i1:16", "cu_seqlens_ptr": "*i32:16", "T": "i32", "N": "i64", "S": "i32",
    **{f"stride_{name}": "i64" for name in STRIDES}, "p": Scalars(*["fp32"] * len(Scalars._fields)),
    "divisor": "fp32", "entropy_coef": "fp32", "accumulation_steps": "fp32",
}  # fmt: skip
PLAIN = {
    "SEQUENCE": False, "BIAS_CORRECTED": True, "PER_LENGTH": True, "ADV_PER_TOKEN": False, "ROLLOUT": "", "ROLLOUT_MEAN": False,
    "ROLLOUT_MASK": False, "OFF_POLICY": False, "BLOCK_T": 512,
}  # fmt: skip
EVERYTHING = {**PLAIN, "SEQUENCE": True, "ADV_PER_TOKEN": True, "ROLLOUT": "sequence", "ROLLOUT_MASK": True, "OFF_POLICY": True}
GROUPS = {
    "rewards_ptr": "*fp32:16", "weights_ptr": "*fp32:16", "offsets_ptr": "*i32:16", "advantages_ptr": "*fp32:16",
    "total_ptr": "*fp32:16", "mean_ptr": "*fp32:16", "std_ptr": "*fp32:16", "degenerate_ptr": "*i1:16",
    "N": "i32", "K": "i32", "R": "i32", "group_size": "i32", "eps": "fp32",
}  # fmt: skip
PATCHES = {"images_ptr": "*i64:16", "table_ptr": "*bf16:16", "out_ptr": "*bf16:16", "num_images": "i32"}
ROTARY = {
    **{f"{name}_ptr": "*bf16:16" for name in ("query", "key", "query_out", "key_out")}, "cos_ptr": "*fp32:16",
    "sin_ptr": "*fp32:16", "S": "i32", "query_heads": "i32", "key_heads": "i32",
    **{f"{x}_stride_{axis}": "i32:16" for x in ("query", "key") for axis in "bsh"},
    **{f"{x}_stride_{axis}": "i32" for x in ("cos", "sin") for axis in "bs"},
}  # fmt: skip
MATMUL = {
    **dict.fromkeys(("a_ptr", "b_ptr", "bias_ptr", "out_ptr"), "*bf16:16"), "M": "i32", "N": "i32:16", "K": "i32:16",
    "stride_b_k": "i32", "stride_b_n": "i32:16",
}  # fmt: skip
FIXED_BLOCKS = {f"BLOCK_{axis}": getattr(fixed_matmul, f"BLOCK_{axis}") for axis in "MNK"}
MERGE_PARTS = {
    "out_ptr": "*bf16:16", "lse_ptr": "*fp32:16", "part_ptr": "*bf16:16", "part_lse_ptr": "*fp32:16", "rows_ptr": "*i32:16",
    "num_rows": "i32", "lse_stride_h": "i32", "part_lse_stride_h": "i32",
    **{f"{x}_stride_{axis}": "i32:16" for x in ("out", "part") for axis in "nh"},
}  # fmt: skip
DECODE = {
    **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "new_key_ptr", "new_value_ptr", "out_ptr"), "*bf16:16"),
    **dict.fromkeys(("held_ptr", "lengths_ptr", "segment_ptr", "order_ptr", "rank_ptr", "table_ptr"), "*i32:16"),
    **dict.fromkeys(("acc_ptr", "sums_ptr", "lse_ptr"), "*fp32:16"),
    **dict.fromkeys(("S", "N", "capacity", "parts", "first_part", "num_pages", "part_size", "window", "heads"), "i32"),
    **{f"{x}_stride_{axis}": "i32:16" for x in ("query", "new_key", "new_value") for axis in "sh"},
    **{f"{x}_stride_{axis}": "i32:16" for x in ("key", "value") for axis in "nhl"},
    "page_size": "i32:16", "table_stride": "i32", "scale": "fp32",
}  # fmt: skip
DECODE_LEVELS = {"LEVELS": 2, "WINDOW": False, "DV": 128, "BLOCK_DV": 128}
DECODE_TILE = {**DECODE_LEVELS, "D": 128, "BLOCK_D": 128, "SHARED": 8, "HEADS": 8, "WIDEN": False}
SHARED_LEVEL = {**DECODE_TILE, "LEVEL": 0, **dict.fromkeys(("new_key_ptr", "new_value_ptr", "table_ptr"))}
OWN_LEVEL = {**DECODE_TILE, "LEVEL": 1, "WINDOW": True, **dict.fromkeys(("order_ptr", "rank_ptr", "segment_ptr"))}


def decode_parts(level: dict, blocks: tuple, slots: int, dtype: str = "bf16", width: int = 128) -> tuple:
    rows, keys, most = blocks
    types = {name: kind.replace("bf16", dtype) for name, kind in DECODE.items()}
    sizes = {"BLOCK_M": max(16, min(rows, 8 * slots)), "BLOCK_N": keys, "CHUNK": min(most, width), "SLOTS": slots}
    sizes |= dict.fromkeys(("D", "DV", "BLOCK_D", "BLOCK_DV"), width)
    return "decode_attention", "decode_parts_kernel", types, {**level, **sizes}, decode_attention.NUM_WARPS


DECODE_KERNELS = [
    ("decode_attention", "decode_lengths_kernel", DECODE, {"APPENDS": True, "BLOCK_S": 128}, 4),
    decode_parts(SHARED_LEVEL, decode_attention.BLOCKS[2], 8),
    decode_parts(SHARED_LEVEL, decode_attention.WIDE, 4, width=256),
    decode_parts(SHARED_LEVEL, decode_attention.BLOCKS[4], 2, "fp32"),
    decode_parts(OWN_LEVEL, decode_attention.BLOCKS[2], 1),
    ("decode_attention", "decode_merge_kernel", DECODE, DECODE_LEVELS, 1),
]
ON_POLICY = dict.fromkeys(
    f"{name}_ptr" for name in ("old_logp", "ref_logp", "rollout_logp", "masked_logp", "entropy", "threshold")
)
ON_POLICY |= dict.fromkeys(("loss_mask_ptr", "dentropy_ptr", "dmasked_ptr", "num_items_ptr"))
PADDED = ON_POLICY | {"cu_seqlens_ptr": None}
RULES = {"SCALE": "batch", "NORMALIZE_FIRST": False, "GROUPS": 256, "BLOCK_G": 8}


LINEAR = {
    **{f"{name}_ptr": "*fp32:16" for name in (*FLOATS, "share")}, "targets_ptr": "*i64:16", "logits_ptr": "*fp32:16",
    **{f"{name}_ptr": "*bf16:16" for name in ("hidden", "weight", "bias", "dx")}, "V": "i32:16", "H": "i32:16",
    "stride_hidden": "i64", "stride_weight": "i32:16", "step_weight": "i32", "stride_dx": "i32:16",
    **dict.fromkeys(("inverse", "softcap", "logit_scale", "entropy_scale"), "fp32"), "p": GRPO["p"],
}  # fmt: skip
STAGES = {
    "CAP": False, "READ": True, "WRITE": True, "BIAS_CORRECTED": True, "ROLLOUT": True, "ROLLOUT_MASK": False, "BLOCK_V": 4096,
    "BLOCK_H": 1024,
}  # fmt: skip
# The arguments that are None with fp32 logits, with a fused objective, and without an objective.
FP32 = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr", "H", "stride_hidden", "stride_weight", "step_weight"))
FUSED = STAGES | FP32 | dict.fromkeys(("dlogp_ptr", "dentropy_ptr"))
ALONE = STAGES | dict.fromkeys(("old_logp_ptr", "ref_logp_ptr", "rollout_logp_ptr", "masked_logp_ptr", "adv_ptr", "share_ptr"))
ALONE |= {"entropy_scale": None, "SURROGATE": None, "KL": None, "p": None, "BIAS_CORRECTED": False, "ROLLOUT": False}
FUSED_FORWARD = {
    **dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), "*bf16:16"), "partial_ptr": "*fp32:16",
    **dict.fromkeys(("index_ptr", "targets_ptr"), "*i64:16"), **dict.fromkeys(("N", "R", "splits"), "i32"),
    **dict.fromkeys(("V", "H", "stride_hidden", "stride_weight"), "i32:16"),
    **dict.fromkeys(("scale", "softcap", "logit_scale"), "fp32"),
}  # fmt: skip
WITHOUT_LOGITS = {"step_weight": 1, "WIDEN": False, "TMA": False, "GROUP": linear_logps_fused.GROUP}
LINEAR_MERGE = {**FUSED_FORWARD, **MERGE, "inverse": "fp32"}
KL_ROWS = {
    **dict.fromkeys(("logits_ptr", "teacher_ptr", "divergence_ptr", "stats_ptr", "upstream_ptr"), "*fp32:16"),
    "dx_ptr": "*bf16:16", "V": "i32:16", "stride_dx": "i32:16",
    **dict.fromkeys(("beta", "inverse", "softcap", "logit_scale", "teacher_inverse", "teacher_softcap"), "fp32"),
    "teacher_logit_scale": "fp32",
}  # fmt: skip
KL_STAGES = {"CAP": False, "TEACHER_CAP": False, "READ": True, "WRITE": True, "BLOCK_V": 4096}
SAMPLE = {
    "logits_ptr": "*bf16:16", "seen_ptr": "*i1:16", "banned_ptr": "*i1:16", "banned_rows_ptr": "*i64:16",
    "sums_ptr": "*fp32:16", "uniform_ptr": "*fp64:16", "ids_ptr": "*i64:16", "logps_ptr": "*fp32:16",
    "log_kept_mass_ptr": "*fp32:16", "entropy_ptr": "*fp32:16", "V": "i32:16", "stride": "i32:16", "seen_stride": "i32:16",
    "num_banned": "i32", "blocks": "i32", "tiles": "i32", "penalty": "fp32", "inverse_penalty": "fp32", "temperature": "fp32",
    "scale": "fp32", "top_k": "i64", "removable": "fp32", "min_p_distance": "fp32",
}  # fmt: skip
TOKENS = {"BLOCK": sample_logps.BLOCK.value, "TILE_BLOCKS": sample_logps.TILE_BLOCKS}
EVERY_TOKEN = TOKENS | dict.fromkeys(("seen_ptr", "banned_ptr", "banned_rows_ptr"))
GREEDY = TOKENS | {"FILTERED": False, "uniform_ptr": None}
DRAW = {"ZERO_BITS": 0, "BLOCK_B": 256}


def surrogate(name: str) -> dict:
    function, through_ratio = SURROGATES[name]
    return {"SURROGATE": function, "THROUGH_RATIO": through_ratio, "PRODUCT": name == "vespo"}


def fused_forward(dtype: str, capability: int, capped: bool, tma: bool = False) -> tuple:
    """The arguments of compile_kernel, with the block sizes that the launcher uses on that GPU."""
    wide = torch.float32 if dtype == "fp32" else torch.bfloat16
    blocks = linear_logps_fused.blocks_of(wide, divmod(capability, 10), capped)
    rows, vocab, width, num_warps, num_stages, _ = blocks
    types = {name: kind.replace("bf16", dtype) for name, kind in FUSED_FORWARD.items()}
    constants = {**WITHOUT_LOGITS, "CAP": capped, "BLOCK_N": rows, "BLOCK_V": vocab, "BLOCK_H": width}
    if tma:
        assert blocks.tma
        types["weight_ptr"], constants["TMA"] = f"tensordesc<{dtype}[{vocab},{width}]>", True
    return "linear_logps_fused", "linear_logps_fused_kernel", types, constants, num_warps, capability, num_stages


KERNELS = [
    ("linear_logps", "linear_logps_kernel", LINEAR, {**FUSED, "SURROGATE": SURROGATES["vespo"][0], "KL": KL["k3"]}, 8),
    ("linear_logps", "linear_logps_kernel", LINEAR | {"logits_ptr": "*bf16:16"}, {**ALONE, "WRITE": False}, 8),
    ("linear_logps", "linear_logps_kernel", LINEAR, {**ALONE, **FP32, "READ": False, "CAP": True}, 8),
    ("linear_kl", "linear_kl_kernel", KL_ROWS, {**KL_STAGES, "KIND": 2, "CAP": True, "TEACHER_CAP": True, "READ": False}, 8),
    ("grpo_loss", "grpo_loss_kernel", GRPO, {**PLAIN, **ON_POLICY, **surrogate("ppo_clip"), "KL": KL["none"]}, 8),
    (
        "grpo_loss",
        "grpo_loss_kernel",
        GRPO,
        {**PLAIN, **ON_POLICY, "cu_seqlens_ptr": None, **surrogate("vespo"), "KL": KL["k1"]},
        8,
    ),
    ("grpo_loss", "grpo_loss_kernel", GRPO, {**EVERYTHING, **surrogate("ppo_clip"), "KL": KL["k2"]}, 8),
    ("grpo_loss", "grpo_loss_finish_kernel", GRPO, {"BY_TOKENS": True, "PERCEPTION": True, "BLOCK_S": 256}, 4),
    (
        "group_advantages",
        "group_advantages_kernel",
        GROUPS,
        {**RULES, "BASELINE": BASELINES["mean"], "NORMALIZE_FIRST": True},
        8,
    ),
    ("group_advantages", "group_advantages_kernel", GROUPS, {**RULES, "BASELINE": BASELINES["pass_at_k"]}, 8),
    ("gather_logps", "gather_logps_fwd_kernel", {**FWD, "splits": "i32", "scale": "fp32"}, {"BLOCK_V": 4096}, 8),
    ("linear_logps_fused", "linear_logps_merge_kernel", LINEAR_MERGE, {"BLOCK_N": linear_logps_fused.BLOCK_MERGE}, 4),
    (
        "gather_logps",
        "gather_logps_merge_kernel",
        {**FWD, **MERGE, "splits": "i32", "temperature": "fp32", "scale": "fp32"},
        {"BLOCK_S": 16},
        1,
    ),
    ("gather_logps", "gather_logps_bwd_kernel", BWD, {"mask_ptr": None, "BLOCK_V": 4096}, 8),
    *(
        ("pack_patches", "pack_patches_kernel", PATCHES, {**sizes, "BLOCK_F": BLOCK_F}, 4)
        for sizes in (
            {"SIZE": 14, "MERGE": 2, "SLOTS": 2, "CHANNELS_LAST": False},
            {"SIZE": 16, "MERGE": 1, "SLOTS": 1, "CHANNELS_LAST": True},
        )
    ),
    *(
        ("rotary", "rotary_kernel", ROTARY, {**sizes, "BLOCK_H": 16}, 4)
        for sizes in (
            {"INVERSE": False, "WIDTH": 80, "PAIRS": 40, "BLOCK_P": 64, "BLOCK_R": 1},  # the vision towers of Qwen-VL
            {"INVERSE": True, "WIDTH": 256, "PAIRS": 32, "BLOCK_P": 32, "BLOCK_R": 256},  # a quarter of each head: Qwen3.5
        )
    ),
    *(
        ("sample_logps", "sample_sums_kernel", SAMPLE, constants, sample_logps.SUMS_WARPS)
        for constants in (TOKENS, EVERY_TOKEN)
    ),
    *(
        ("sample_logps", "sample_draw_kernel", SAMPLE, constants | DRAW, sample_logps.DRAW_WARPS)
        for constants in (TOKENS | {"FILTERED": True}, EVERY_TOKEN | {"FILTERED": False}, GREEDY)
    ),
    *(
        ("fixed_matmul", "fixed_matmul_kernel", {**MATMUL, **types}, {"UPCAST": False, **FIXED_BLOCKS}, 4)
        for types in ({}, {name: MATMUL[name].replace("bf16", "fp32") for name in MATMUL if name.endswith("_ptr")})
    ),
    *(
        ("tree_attention.merge", "merge_kernel", MERGE_PARTS, {**rows, "D": 128, "BLOCK_N": 16, "BLOCK_D": 128}, 4)
        for rows in ({"HAS_ROWS": True}, {"HAS_ROWS": False, "rows_ptr": None})
    ),
]

# Other formulas in kernels of the list above, which are the same source on every architecture.
FORMULAS = [
    *(
        ("linear_logps", "linear_logps_kernel", LINEAR, {**FUSED, "SURROGATE": SURROGATES[name][0], "KL": KL["k3"]}, 8)
        for name in SURROGATES
        if name != "vespo"
    ),
    *(("linear_kl", "linear_kl_kernel", KL_ROWS, {**KL_STAGES, "KIND": kind}, 8) for kind in range(3)),
    *(("grpo_loss", "grpo_loss_kernel", GRPO, {**PLAIN, **surrogate(name), "KL": KL["k3"]}, 8) for name in SURROGATES),
]


def compile_kernel(op, name, types: dict[str, str | tuple], constants, num_warps, capability: int, num_stages=3) -> dict:
    path = f"vlmkernels.ops.{op}" if "." in op else backend.module_name(op, "triton")
    kernel = getattr(importlib.import_module(path), name)
    assert set(kernel.do_not_specialize) <= set(kernel.arg_names)  # Triton ignores a name that no argument has
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if isinstance(types[argument], tuple):
            signature[argument] = types[argument]
            continue
        signature[argument], _, divisor = types[argument].partition(":")
        if divisor:
            attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    # Triton compares these values before each launch. NaN does not equal itself.
    changed = [global_name for (global_name, _), (value, _) in kernel.used_global_vals.items() if value != value]
    assert not changed, f"{name} uses global values that do not equal themselves: {changed}"
    row = {"op": op, "kernel": name, "sm": capability, "dtype": types.get("hidden_ptr", "")[1:].partition(":")[0]}
    return row | resources(compiled)


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


JOBS = [(*row, capability) for row in KERNELS for capability in (80, 90, 100)]
JOBS += [(*row, 90) for row in FORMULAS]
JOBS += [(*row, capability, decode_attention.NUM_STAGES) for row in DECODE_KERNELS for capability in (80, 90, 100)]
JOBS += [fused_forward("bf16", capability, False) for capability in (80, 86, 90, 100)]
JOBS += [fused_forward("bf16", 90, False, tma=True)]
JOBS += [fused_forward(dtype, 100, True) for dtype in ("bf16", "fp32")]  # these need the most registers


def run(job: int) -> dict:
    return compile_kernel(*JOBS[job])


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool() as pool:
        for row in pool.imap(run, range(len(JOBS))):
            print(json.dumps(row), flush=True)
