"""The rollout engines by name, and what builds the engine of a run."""

from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from vlmkernels.ops.checks import require_one_of
from vlmkernels.rollout.base import Engine, Sampling
from vlmkernels.rollout.generate import Generate
from vlmkernels.rollout.vllm.colocate import VLLMColocate
from vlmkernels.rollout.vllm.config import MODES, VLLMConfig
from vlmkernels.rollout.vllm.server import VLLMServer

ENGINES = ("transformers", *(f"vllm_{mode}" for mode in MODES))
"""Names of the engines: the trainer's own model, a vLLM server, and vLLM in the process."""


def engine_name(rollout_engine: str | None, use_vllm: bool | None, vllm_mode: str | None) -> str:
    """Return the name of the engine that the options of ``GRPOConfig`` with these names select.

    ``use_vllm`` and ``vllm_mode`` are TRL's names. Each option may be None.

    Raises:
        ValueError: there is no engine of the name, or the options select different engines.
    """
    if vllm_mode is not None:
        require_one_of("vllm_mode", vllm_mode, MODES)
    if rollout_engine is None:
        return f"vllm_{vllm_mode or 'colocate'}" if use_vllm else "transformers"
    require_one_of("rollout_engine", rollout_engine, ENGINES)
    is_vllm = rollout_engine != "transformers"
    given = {"use_vllm": use_vllm, "vllm_mode": vllm_mode if is_vllm else None}
    selected = {"use_vllm": is_vllm, "vllm_mode": rollout_engine.removeprefix("vllm_")}
    for name, value in given.items():
        if value is not None and value != selected[name]:
            raise ValueError(
                f"{name} must be {selected[name]!r} with rollout_engine={rollout_engine!r}, or None, got {value!r}"
            )
    return rollout_engine


def make_engine(
    model: PreTrainedModel,
    processor: Any,
    sampling: Sampling,
    accelerator: Accelerator,
    *,
    vllm: VLLMConfig | None = None,
    share_prefix: bool = True,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    router_replay: bool = False,
    deterministic: bool = False,
) -> Engine:
    """Build the engine that samples with the model itself, or with vLLM if ``vllm`` is given. Every rank calls it.

    Args:
        model, processor: the model, which may have LoRA adapters, and its processor.
        sampling: how completions are sampled in training.
        accelerator: the trainer's; only its main process updates the weights of a vLLM server.
        vllm: options of the vLLM engines; ``vllm.mode`` selects one. None selects ``Generate``.
        share_prefix, max_num_seqs, max_tokens, router_replay, deterministic: options of ``Generate``, ignored with ``vllm``.

    Raises:
        ValueError: the engine does not support an option.
        ImportError: colocated vLLM is selected, but vLLM is not installed.
        RolloutError: the vLLM server cannot be reached or serves another model.
    """
    if vllm is None:
        return Generate(
            model, processor, sampling, share_prefix=share_prefix, max_num_seqs=max_num_seqs, max_tokens=max_tokens,
            router_replay=router_replay, deterministic=deterministic,
        )  # fmt: skip
    engine = VLLMServer if vllm.mode == "server" else VLLMColocate
    return engine(model, processor, sampling, vllm, accelerator)
