"""What both vLLM engines share: requests, their answers checked, weights through a folder, and the fingerprint after it."""

import math
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from PIL import Image

from vlmkernels.data.samples import Sample, encode, read_sample, render
from vlmkernels.models.families import TEXT, family_of, media_token_ids
from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.models.inputs import Batch
from vlmkernels.ops.checks import require
from vlmkernels.rollout.base import RolloutError, on_main_process
from vlmkernels.rollout.generate import Rollout, eos_token_ids, tokenizer_of

BAN = -100.0  # added to the logits of tokens that must not be sampled: exp(-100) is nothing, and what it was can be recovered
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.02}
"""The greatest mean |difference| of the fingerprint's log-probabilities, over their mean 1 + |log-probability|, by the dtype
that vLLM runs in."""


class StaleWeights(RolloutError):
    """vLLM samples with other weights than it was given last."""


class Prompt(NamedTuple):
    """token_ids: one placeholder per image. images: each once."""

    token_ids: list[int]
    images: list[Image.Image]


class Completion(NamedTuple):
    """logps: at each token those told, by token; the sampled one among them. version: of the weights it was sampled with."""

    token_ids: list[int]
    logps: list[dict[int, float]] | None
    ended: bool
    version: str | None


class Answer(NamedTuple):
    """token_ids: the prompt's, with all placeholders of each image. logps: of its last tokens, where asked for."""

    token_ids: list[int]
    completions: list[Completion]
    logps: list[float] | None = None


@dataclass(frozen=True)
class Fingerprint:
    """A fixed prompt with an image and 16 tokens behind it, spread over the vocabulary."""

    sample: Sample
    batch: Batch
    tokens: list[int]

    @classmethod
    def of(cls, model, processor, args, banned: list[int]) -> "Fingerprint":
        family = family_of(model.config)
        row = {"prompt": [{"role": "user", "content": "what is in the image?"}]}
        if family is not TEXT:
            # Noise at two scales, of a size that the processor must change: its resize and normalisation show.
            rng = torch.Generator().manual_seed(0)
            coarse, fine = (torch.randint(0, 256, (h, w, 3), generator=rng).byte() for h, w in ((9, 13), (180, 260)))
            pixels = (coarse.repeat_interleave(20, 0).repeat_interleave(20, 1) // 2 + fine // 2).numpy()
            row["images"] = [Image.fromarray(pixels)]
        sample = read_sample(row, 0)
        size = model.config.get_text_config().vocab_size
        tokens = [token for token in torch.linspace(0, size - 1, 16 + len(banned)).long().tolist() if token not in banned]
        return cls(sample, encode([sample], processor, family, args.chat_template_kwargs), tokens[:16])

    @torch.no_grad()
    def logps(self, model) -> list[float]:
        """Of the tokens under the trainer's model, at temperature 1."""
        training = model.training
        model.eval()
        head = output_head(model)
        ids = torch.tensor([self.tokens], device=head.weight.device)
        prompts, mask = self.batch.to(ids.device), torch.ones_like(ids, dtype=torch.bool)
        rollout = Rollout(prompts, torch.zeros(1, dtype=torch.int64), ids, mask, mask[:, 0])
        try:
            batch = rollout.padded(torch.arange(1))
            options = {"head": head, "arguments": logit_arguments(model, head), "temperature": 1.0}
            return completion_logps(model, batch, **options).tolist()
        finally:
            model.train(training)


def difference(first: list[float], second: list[float]) -> float:
    """Mean |difference| over mean 1 + |log-probability|; infinite where one is not finite."""
    pairs = list(zip(first, second, strict=True))
    relative = sum(abs(a - b) for a, b in pairs) / sum(1 + abs(a) for a, _ in pairs)
    return relative if math.isfinite(relative) else math.inf


def adapter_of(model) -> str | None:
    """The name of the active adapter; None of a model without adapters."""
    return model.active_adapter if is_peft_model(model) else None


def check_adapters(model) -> None:
    """Raise for adapters that vLLM would leave out or refuse."""
    if not is_peft_model(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    require(isinstance(model.active_adapter, str), "peft_config", "make one adapter active", model.active_adapter)
    config, plain = model.peft_config[model.active_adapter], model.get_base_model()
    require(config.peft_type == "LORA", "peft_config", "be of LoRA with use_vllm", config.peft_type)
    for name in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias"):
        value = getattr(config, name, None)
        require(not value, "peft_config", f"leave out {name} with use_vllm, which does not know it", value)
    require(config.bias == "none", "peft_config", "have bias='none' with use_vllm", repr(config.bias))
    decoder = {id(module) for module in plain.get_decoder().modules()}
    tuned = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and id(module) not in decoder]
    rule = "adapt the decoder alone with use_vllm, which leaves other adapters out (target_modules='.*language_model.*_proj')"
    require(not tuned, "peft_config", rule, ", ".join(tuned[:3]))


def parameters(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers as they are now, in ``dtype``, on the CPU.

    Not ``state_dict()``, which has FSDP2 shard again what ``gathered`` made whole.
    """
    tensors = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        kept = {
            name: x for name, x in module._buffers.items() if x is not None and name not in module._non_persistent_buffers_set
        }
        tensors |= {f"{prefix}.{name}" if prefix else name: x for name, x in kept.items()}
    return {name: x.detach().to("cpu", dtype if x.is_floating_point() else None) for name, x in tensors.items()}


def save_weights(model, folder: Path, dtype: torch.dtype) -> Path:
    """Write what vLLM is to load, a checkpoint's weights or those of the active adapter: the folder they are in."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = adapter_of(model)
    if adapter is None:
        model.save_pretrained(folder, state_dict=parameters(model, dtype))
        return folder
    tensors = {name: x for name, x in model.named_parameters() if "lora_" in name}
    model.save_pretrained(
        folder, selected_adapters=[adapter], state_dict={name: x.detach().cpu() for name, x in tensors.items()}
    )
    return folder if adapter == "default" else folder / adapter


class VLLM:
    """A rollout engine around vLLM; how it is reached is a subclass's.

    Args:
        model, processor: the trainer's, the model perhaps with LoRA adapters.
        args: checked by ``GRPOConfig`` for what vLLM does not know.
        accelerator: the main process pushes weights; every process samples its own prompts.
    """

    dtype: torch.dtype  # that vLLM runs in
    logprobs_mode: str

    def __init__(self, model, processor, args, accelerator: Accelerator):
        check_adapters(model)
        self.processor, self.args, self.accelerator = processor, args, accelerator
        self.tokenizer, self.family = tokenizer_of(processor), family_of(model.config)
        self.adapter = adapter_of(model)
        options = {name: value for name, value in (args.generation_kwargs or {}).items() if value is not None}
        eos = options.get("eos_token_id")
        self.eos = eos_token_ids(model, self.tokenizer) if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.pad = options.get("pad_token_id", self.tokenizer.pad_token_id)
        size = model.config.get_text_config().vocab_size  # configurations may name tokens that the model does not have
        banned = {*media_token_ids(model.config, processor), *options.get("suppress_tokens", ())}
        self.banned = sorted(token for token in banned if token < size)
        # vLLM tells as many log-probabilities as tokens are named, the sampled one's first: one more is named than needed.
        self.told = [*self.banned, next(token for token in range(size) if token not in banned)]
        self.options = options
        self.fingerprint = Fingerprint.of(model, processor, args, self.banned)
        self.run, self.step, self.version = uuid.uuid4().hex[:8], None, None
        self.reads_again = self.adapter is not None  # vLLM reads an adapter again when it has dropped it from its memory
        self.in_use: Path | None = None
        self.folder = Path(args.vllm_weights_dir or os.path.join(args.output_dir, "vllm-weights")).absolute()

    # What a subclass does

    def _answers(self, prompts: list[Prompt], params: dict[str, Any]) -> list[Answer]:
        """The completions of each prompt; params: of vllm.SamplingParams."""
        raise NotImplementedError

    def _load(self, folder: Path, version: str) -> None:
        """Load the weights in ``folder``, drop everything computed with the old ones, and take the name ``version``."""
        raise NotImplementedError

    # Sampling

    def _tells_logps(self, temperature: float) -> bool:
        raw, truncated = self.logprobs_mode == "raw_logprobs", self.args.sampling_is_restricted
        return temperature in (0, 1) if raw else temperature > 0 and not truncated

    def _params(self, num_generations: int, temperature: float) -> dict[str, Any]:
        args, options = self.args, self.options
        params = {
            "n": num_generations,
            "temperature": temperature,
            "max_tokens": options.get("max_new_tokens", args.max_completion_length),
            "min_tokens": options.get("min_new_tokens", 0),
            "repetition_penalty": options.get("repetition_penalty", args.repetition_penalty),
            "ignore_eos": True,  # the engine's own: ours follow
            "stop_token_ids": self.eos,
            "stop": list(options.get("stop_strings", ())),
            "logit_bias": dict.fromkeys(self.banned, BAN),
        }
        if temperature:
            limits = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p or 0.0}
            params |= {name: options.get(name, value) for name, value in limits.items()}
        if self._tells_logps(temperature):
            params["logprobs"] = 0
            if self.logprobs_mode == "processed_logprobs":
                params |= {"logprobs": len(self.told), "logprob_token_ids": self.told}
        return params

    def _logp(self, token: int, told: dict[int, float], temperature: float) -> float:
        """Of the sampled token over the whole vocabulary at the temperature.

        Processed log-probabilities are of the banned logits: l' = l - log(1 - b), b the mass of what was banned. Each banned
        token's own tells its share: b / (1 - b) = sum exp(l'_k - BAN / temperature).
        """
        if self.logprobs_mode == "raw_logprobs":
            return told[token]
        return told[token] - math.log1p(sum(math.exp(told[k] - BAN / temperature) for k in self.banned))

    def _prompts(self, samples: list[Sample]) -> list[Prompt]:
        prompts = []
        for sample in samples:
            rule = "be absent with use_vllm, which has no lossless way to take them"
            require(not sample.videos, f"sample {sample.index}: videos", rule, len(sample.videos))
            text = render(sample, self.processor, **(self.args.chat_template_kwargs or {}))
            ids = self.tokenizer(text, add_special_tokens=isinstance(sample.prompt, str))["input_ids"]
            prompts.append(Prompt(ids, sample.images))
        return prompts

    def _check(self, answer: Answer, sample: Sample, expected: list[int], num_generations: int, params: dict) -> None:
        """Raise unless vLLM made the trainer's tokens of the prompt, and completions of it that can be trained on."""
        who = f"sample {sample.index}: vLLM"
        if answer.token_ids != expected:
            first = next((i for i, (a, b) in enumerate(zip(answer.token_ids, expected, strict=False)) if a != b), "the end")
            raise RolloutError(
                f"{who} made {len(answer.token_ids)} tokens of the prompt, the trainer {len(expected)}, not the same from "
                f"{first} on: their tokenizers or image processors differ (min_pixels, max_pixels, size, patch_size)"
            )
        if len(answer.completions) != num_generations:
            raise RolloutError(f"{who} must answer with {num_generations} completions, got {len(answer.completions)}")
        for completion in answer.completions:
            ids, logps = completion.token_ids, completion.logps
            if not 1 <= len(ids) <= params["max_tokens"]:
                raise RolloutError(f"{who}'s completions must have 1 to {params['max_tokens']} tokens, got {len(ids)}")
            if banned := sorted({*ids} & {*self.banned}):
                raise RolloutError(f"{who} must not sample the banned tokens {self.banned}, got {banned}")
            wanted = {*self.banned} if "logprob_token_ids" in params else set()
            if "logprobs" in params and not (
                logps is not None
                and len(logps) == len(ids)
                and all({i, *wanted} <= x.keys() and -9999 < x[i] <= 1e-3 for i, x in zip(ids, logps, strict=True))
            ):
                raise RolloutError(f"{who} must tell a finite log-probability of every sampled token, got {logps!r:.200}")
            if self.version is not None and completion.version not in (None, self.version):
                raise StaleWeights(
                    f"{who} sampled with weights {completion.version!r}, not {self.version!r}: it was restarted, or "
                    "another run gave it weights"
                )

    def __call__(
        self, model, prompts: Batch, num_generations: int, temperature: float, samples: list[Sample] | None = None
    ) -> Rollout:
        params = self._params(num_generations, temperature)
        ids, mask = (prompts.inputs[name].cpu() for name in ("input_ids", "attention_mask"))
        expected = [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
        answers = self._answers(self._prompts(samples), params)
        for answer, sample, tokens in zip(answers, samples, expected, strict=True):
            self._check(answer, sample, tokens, num_generations, params)
        completions = [completion for answer in answers for completion in answer.completions]
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        ids, logps = torch.full(mask.shape, self.pad), None
        ids[mask] = torch.tensor([token for completion in completions for token in completion.token_ids])
        if "logprobs" in params:
            logps = torch.zeros(mask.shape)
            told = [pair for c in completions for pair in zip(c.token_ids, c.logps, strict=True)]
            logps[mask] = torch.tensor([self._logp(token, logp, temperature) for token, logp in told])
        truncated = torch.tensor([not completion.ended for completion in completions])
        group, device = torch.arange(len(samples)).repeat_interleave(num_generations), prompts.inputs["input_ids"].device
        tensors = (None if x is None else x.to(device) for x in (ids, mask, truncated, logps))
        return Rollout(prompts, group, *tensors)

    # Weights

    def synchronise(self, model, step: int, again: bool = False) -> dict[str, float]:
        """See ``Engine``. again: although vLLM was given them."""
        if step == self.step and not again:
            return {}
        self.version, metrics = on_main_process(self.accelerator, lambda: self._push(model, step))
        self.step = step
        return metrics

    def _push(self, model, step: int) -> tuple[str, dict[str, float]]:
        start, version = time.perf_counter(), f"{self.run}-{step}"
        folder, before = self.folder / version, self.in_use
        try:
            self._load(save_weights(model, folder, self.dtype), version)
            self.in_use, unused = (folder, before) if self.reads_again else (None, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if unused not in (None, self.in_use):
            shutil.rmtree(unused, ignore_errors=True)
        self.version, seconds = version, time.perf_counter() - start
        gap = self._compare(model, "after its weights were updated")
        return version, {"vllm/sync_time": seconds, "vllm/fingerprint": gap}

    def _compare(self, model, when: str) -> float:
        """The fingerprint's difference between the trainer and vLLM; raises where it is beyond the bound."""
        answer = self._fingerprint_answer()
        mine, bound = self.fingerprint.logps(model), self.args.vllm_fingerprint_tolerance
        bound = TOLERANCE[self.dtype] if bound is None else bound
        gap = difference(mine, answer.logps)
        if gap > bound:
            raise RolloutError(
                f"vLLM and the trainer disagree {when}: the log-probabilities of a fixed prompt differ by {gap:.2g} of their "
                f"size, the bound being {bound:.2g} (vllm_fingerprint_tolerance): trainer {[round(x, 3) for x in mine[:4]]}, "
                f"vLLM {[round(x, 3) for x in answer.logps[:4]]}"
            )
        return gap

    def _fingerprint_answer(self) -> Answer:
        [prompt] = self._prompts([self.fingerprint.sample])
        prompt = prompt._replace(token_ids=[*prompt.token_ids, *self.fingerprint.tokens])
        params = {
            "n": 1,
            "temperature": 0,
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "logit_bias": dict.fromkeys(self.banned, BAN),
        }
        [answer] = self._answers([prompt], params)
        inputs, number = self.fingerprint.batch.inputs, len(self.fingerprint.tokens)
        self._check(answer, self.fingerprint.sample, [*inputs["input_ids"][0].tolist(), *self.fingerprint.tokens], 1, params)
        if answer.logps is None or len(answer.logps) < number:
            raise RolloutError(f"vLLM must tell the log-probabilities of a prompt's tokens, got {answer.logps!r:.100}")
        return answer._replace(logps=answer.logps[-number:])
