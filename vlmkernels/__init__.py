"""Kernels for reinforcement learning of vision-language models; see README.md."""

from vlmkernels.backend import use_backend
from vlmkernels.ops.causal_conv1d import causal_conv1d
from vlmkernels.ops.decode_attention import KeyValues, decode_attention
from vlmkernels.ops.gated_delta_rule import gated_delta_rule
from vlmkernels.ops.gather_logps import gather_logps
from vlmkernels.ops.group_advantages import GroupAdvantages, group_advantages
from vlmkernels.ops.grpo_loss import GRPOLossConfig, GRPOLossOutput, grpo_loss
from vlmkernels.ops.linear_grpo_loss import LinearGRPOLossOutput, linear_grpo_loss
from vlmkernels.ops.linear_kl import linear_kl
from vlmkernels.ops.linear_logps import VocabParallel, linear_logps
from vlmkernels.ops.linear_sample_logps import linear_sample_logps
from vlmkernels.ops.merge_image_features import merge_image_features, placeholder_positions
from vlmkernels.ops.mrope_positions import MropePositions, mrope_positions
from vlmkernels.ops.pack_patches import PackedPatches, pack_patches
from vlmkernels.ops.rotary import mrope_axes, rotary, rotary_table
from vlmkernels.ops.sample_logps import SampledTokens, sample_logps
from vlmkernels.ops.tree_attention import TreeLayout, tree_attention
from vlmkernels.ops.varlen_attention import varlen_attention
from vlmkernels.ops.vision_layout import VisionLayout, vision_layout
from vlmkernels.version import __version__

__all__ = [
    "GRPOLossConfig",
    "GRPOLossOutput",
    "GroupAdvantages",
    "KeyValues",
    "LinearGRPOLossOutput",
    "MropePositions",
    "PackedPatches",
    "SampledTokens",
    "TreeLayout",
    "VisionLayout",
    "VocabParallel",
    "__version__",
    "causal_conv1d",
    "decode_attention",
    "gated_delta_rule",
    "gather_logps",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_kl",
    "linear_logps",
    "linear_sample_logps",
    "merge_image_features",
    "mrope_axes",
    "mrope_positions",
    "pack_patches",
    "placeholder_positions",
    "rotary",
    "rotary_table",
    "sample_logps",
    "tree_attention",
    "use_backend",
    "varlen_attention",
    "vision_layout",
]
