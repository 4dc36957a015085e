"""Base class of both vLLM engines: sampling parameters, checks of replies, and weight updates with a check of the result."""

import logging
import math
import shutil
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from vlmkernels.data.samples import Sample, prompt_ids, render, tokenizer_of
from vlmkernels.models.families import family_of, missing_token_ids
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.router_replay import RoutedExperts
from vlmkernels.models.trajectories import Turns
from vlmkernels.rollout.base import Engine, Rollout, RolloutError, Sampling, pad_token_ids
from vlmkernels.rollout.vllm.config import VLLMConfig, check_sampling
from vlmkernels.rollout.vllm.experts import moe_layers, routed_experts
from vlmkernels.rollout.vllm.fingerprint import TOLERANCE, Fingerprint, relative_difference
from vlmkernels.rollout.vllm.main_process import on_main_process
from vlmkernels.rollout.vllm.requests import Key, Prompt, Reply, Requests, Video, VLLMCompletion
from vlmkernels.rollout.vllm.trajectory import Trajectory
from vlmkernels.rollout.vllm.weights import active_adapter, check_adapters, checkpoint_tensors, save_weights

if TYPE_CHECKING:
    from vlmkernels.rollout.episodes import Episodes

logger = logging.getLogger(__name__)

POLL = 0.02  # seconds to wait for vLLM before looking for results of tools, while both run
BAN = -100.0
"""Logit bias of banned tokens. exp(-100) is negligible, but the unbiased log-probability can still be recovered."""
GREEDY = {"temperature": 1.0, "top_k": 1}
"""Greedy sampling by a vLLM that returns sampling masks, which refuses a temperature of 0."""
MAX_COUNTED = 64
"""Largest number of banned tokens whose log-probabilities are requested for every sampled token."""


class StaleWeights(RolloutError):
    """vLLM sampled with weights other than those of the last update."""


class VLLM(Engine):
    """Base class of the vLLM engines. Subclasses send requests and load weights.

    Every rank samples its own prompts; the main process updates the weights.

    Args:
        model, processor: the trainer's model, which may have LoRA adapters on its decoder, and its processor.
        sampling: how completions are sampled in training.
        config: options of vLLM.
        accelerator: the trainer's.

    Raises:
        ValueError: vLLM does not support the sampling or the adapters.
    """

    returns_logps = True  # check_sampling ensures that they are those of the rollout correction
    in_memory: bool  # whether weights go to vLLM in memory, not through a folder
    dtype: torch.dtype  # dtype that vLLM runs in
    logprobs_mode: str  # vLLM's option of this name
    max_length: int  # maximum number of tokens of a prompt and its completion in vLLM
    returns_mask: bool = False  # whether vLLM returns the tokens that sampling did not exclude

    def __init__(
        self, model: PreTrainedModel, processor: Any, sampling: Sampling, config: VLLMConfig, accelerator: Accelerator
    ):
        check_sampling(sampling, config.policy)
        check_adapters(model)
        self.processor, self.config, self.accelerator = processor, config, accelerator
        self.sampling = sampling.for_model(model, processor)
        self.tokenizer, self.family, self.adapter = tokenizer_of(processor), family_of(model.config), active_adapter(model)
        size = model.config.get_text_config().vocab_size  # a generation config may name tokens that the model lacks
        self.banned = sorted(token for token in {*self.sampling.suppress_tokens} if token < size)
        self.counted = self._counted(model, processor)
        # vLLM returns one log-probability per requested token, but the first is the sampled token's: request one more.
        self.returned_ids = [*self.counted, next(token for token in range(size) if token not in self.banned)]
        self.fingerprint = Fingerprint.from_model(model, processor, self.banned, config.chat_template_kwargs)
        self.run = uuid.uuid4().hex[:8]
        self.version: str | None = None
        self.step: int | None = None
        self.keeps_folder = self.adapter is not None  # vLLM may evict an adapter from memory and load it again
        self.in_use: Path | None = None
        self.folder = Path(config.weights_dir).absolute()
        self.moe_layers = moe_layers(model) if config.routed_experts else []
        self.returns_experts = config.routed_experts

    def _counted(self, model: PreTrainedModel, processor: Any) -> list[int]:
        """Return the banned tokens whose probability ``_logp`` adds to that of the tokens that can be sampled."""
        if len(self.banned) <= MAX_COUNTED:
            return self.banned
        missing = {*missing_token_ids(model.config, processor)}
        return [token for token in self.banned if token not in missing]

    def _warn_of_uncounted(self) -> None:
        """Warn if ``_logp`` leaves out banned tokens. Subclasses call it when they know ``logprobs_mode``."""
        number = len(self.banned) - len(self.counted)
        if number and self.logprobs_mode == "processed_logprobs" and not self._is_exact:
            text = "log-probabilities from vLLM take the probability of the %d ids without a token as 0: more than %d"
            logger.warning(text, number, MAX_COUNTED)

    @abstractmethod
    def _requests(self) -> Requests:
        """Return an empty set of requests."""

    @abstractmethod
    def _load_folder(self, folder: Path) -> None:
        """Load the weights in ``folder``."""

    @abstractmethod
    def _load_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the tensors of a checkpoint."""

    @abstractmethod
    def _update(self, load: Callable[[], None], version: str) -> None:
        """Call ``load``, drop all caches of the old weights and set the version of the weights."""

    def _choose_transfer(self, obstacle: str | None, memory: str) -> None:
        """Choose how weights go to vLLM, and print it.

        Args:
            obstacle: why they cannot go in memory, or None if they can. Adapters cannot.
            memory: how they go in memory.
        """
        choice = self.config.weight_transfer
        if self.adapter:
            obstacle = "vLLM loads LoRA adapters from a folder"
        if choice == "memory" and obstacle:
            raise ValueError(f"vllm_weight_transfer must be 'auto' or 'folder', because {obstacle}, got 'memory'")
        self.in_memory = choice != "folder" and obstacle is None
        reason = f", because {obstacle}" if choice == "auto" and obstacle else ""
        how = memory if self.in_memory else f"through the folder {self.folder}{reason}"
        print(f"Weights go to vLLM {how}", flush=True)

    # Sampling

    def _has_logps(self, temperature: float) -> bool:
        """Whether vLLM can return log-probabilities at the temperature."""
        return temperature in (0, 1) if self.logprobs_mode == "raw_logprobs" else temperature > 0

    @property
    def _is_exact(self) -> bool:
        """Whether vLLM's log-probabilities are those with which tokens are sampled, and give none of the whole vocabulary."""
        return self.logprobs_mode == "processed_logprobs" and self.sampling.is_restricted

    def _params(self, temperature: float) -> dict[str, Any]:
        """Return the parameters that all requests have in common; ``_limited`` adds the others."""
        sampling = self.sampling
        params = {
            "temperature": temperature,
            "repetition_penalty": sampling.repetition_penalty,
            "ignore_eos": True,  # vLLM's own end-of-sequence tokens; stop_token_ids replaces them
            "stop_token_ids": list(sampling.eos_token_id or ()),
            "stop": list(sampling.stop_strings),
            "logit_bias": dict.fromkeys(self.banned, BAN),
            "skip_special_tokens": False,  # a stop string can be a tag that is a special token
        }
        if temperature:
            params |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p or 0.0}
        elif self.returns_mask:
            params |= GREEDY
        if self._has_logps(temperature):
            params["logprobs"] = 0
            if self.logprobs_mode == "processed_logprobs" and not self._is_exact:
                params |= {"logprobs": len(self.returned_ids), "logprob_token_ids": self.returned_ids}
        return params

    def _logp(self, token: int, returned_logps: dict[int, float], temperature: float) -> tuple[float, float]:
        """Return the log-probability of the sampled token over the whole vocabulary at the temperature, and that with which it
        was sampled; NaN for one that is not known.

        Processed log-probabilities are those of the biased logits: l' = l - log(1 - b), with b the probability of all banned
        tokens. The log-probabilities of the banned tokens give b: b / (1 - b) = sum exp(l'_k - BAN / temperature). The sum is
        over ``counted``: if there are many ids without a token, they are left out, and their probability counts as 0.
        """
        logp = returned_logps[token]
        if self.logprobs_mode == "raw_logprobs":
            return logp, math.nan
        if self._is_exact:
            return math.nan, logp
        return logp - math.log1p(sum(math.exp(returned_logps[k] - BAN / temperature) for k in self.counted)), logp

    def _prompts(self, samples: list[Sample]) -> list[Prompt]:
        prompts = []
        for sample in samples:
            text = render(sample, self.processor, **self.config.chat_template_kwargs)
            videos = [Video(frames, sample.fps) for frames in sample.videos]
            self._check_videos(videos, sample.name)
            prompts.append(Prompt(prompt_ids(sample, text, self.processor), sample.images, videos))
        return prompts

    def _check_videos(self, videos: list[Video], name: str) -> None:
        """Raise ValueError if vLLM would sample from other frames or at another frame rate."""

    def _check(self, reply: Reply, name: str, expected: list[int], params: dict[str, Any]) -> None:
        """Raise unless vLLM tokenized the prompt as the trainer did and returned completions that can be trained on.

        Args:
            name: name of the prompt in error messages.
            expected: the trainer's token ids of the prompt.
            params: sampling parameters of the request.
        """
        who = f"{name}: vLLM"
        if reply.token_ids != expected:
            pairs = enumerate(zip(reply.token_ids, expected, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(reply.token_ids), len(expected)))
            raise RolloutError(
                f"{who} encoded the prompt as {len(reply.token_ids)} tokens and the trainer as {len(expected)}, which differ "
                f"from position {first} on: the tokenizers or the image processors differ (min_pixels, max_pixels, size, "
                "patch_size)"
            )
        if len(reply.completions) != params["n"]:
            raise RolloutError(f"{who} must return {params['n']} completions, got {len(reply.completions)}")
        for completion in reply.completions:
            self._check_completion(completion, who, params)

    def _check_completion(self, completion: VLLMCompletion, who: str, params: dict[str, Any]) -> None:
        ids, logps = completion.token_ids, completion.logps
        if not 1 <= len(ids) <= params["max_tokens"]:
            raise RolloutError(f"{who}'s completions must have 1 to {params['max_tokens']} tokens, got {len(ids)}")
        if banned := sorted({*ids} & {*self.banned}):
            raise RolloutError(f"{who} must not sample the banned tokens {self.banned!s:.200}, got {banned}")
        if "logprobs" in params and not self._logps_complete(ids, logps, "logprob_token_ids" in params):
            raise RolloutError(f"{who} must return a finite log-probability of every sampled token, got {logps!r:.200}")
        if self.returns_mask and not _contains(completion.sampling_mask, ids):
            raise RolloutError(
                f"{who} must return a sampling mask with every sampled token, got {completion.sampling_mask!r:.200} for {ids}"
            )
        if self.version is not None and completion.version not in (None, self.version):
            raise StaleWeights(
                f"{who} sampled with weights {completion.version!r}, not {self.version!r}: it was restarted, or "
                "another run updated its weights"
            )

    def _logps_complete(self, ids: list[int], logps: list[dict[int, float]] | None, with_banned: bool) -> bool:
        if logps is None or len(logps) != len(ids):
            return False
        needed = {*self.counted} if with_banned else set()
        # vLLM clamps log-probabilities of -inf to -9999.
        return all({i, *needed} <= x.keys() and -9999 < x[i] <= 1e-3 for i, x in zip(ids, logps, strict=True))

    def __call__(
        self,
        model: PreTrainedModel,
        prompts: ModelInputs,
        num_generations: int,
        temperature: float,
        samples: list[Sample] | None = None,
        episodes: "Episodes | None" = None,
    ) -> Rollout:
        """See ``Engine``. Raises RolloutError if vLLM fails or a reply cannot be trained on."""
        if samples is None:
            raise ValueError("samples must be given to sample with vLLM, got None")
        params = self._params(temperature)
        group = torch.arange(len(samples)).repeat_interleave(num_generations) if episodes is None else episodes.group
        input_ids, attention_mask = (prompts.inputs[name].cpu() for name in ("input_ids", "attention_mask"))
        tokens = [row[keep].tolist() for row, keep in zip(input_ids, attention_mask.bool(), strict=True)]
        sent, budget = self._prompts(samples), self.sampling.max_new_tokens

        def sample() -> list[Trajectory]:
            started = [Trajectory(samples[p].index, sent[p], tokens[p], len(tokens[p]), budget) for p in group.tolist()]
            self._sample(started, group.tolist(), params, episodes)
            return started

        trajectories = self._with_current_weights(model, sample)
        device, logps, turns = prompts.inputs["input_ids"].device, {}, None
        ids, mask = pad_token_ids([trajectory.completion_ids for trajectory in trajectories], self.sampling.pad_token_id)
        if "logprobs" in params:
            values = torch.zeros(*mask.shape, 2)
            values[mask] = torch.tensor([pair for trajectory in trajectories for pair in trajectory.logps])
            full, sampling = values.to(device).unbind(-1)
            if self.logprobs_mode == "raw_logprobs":
                logps = {"logps": full}
            else:
                logps = {"sampling_logps": sampling} if self._is_exact else {"logps": full, "log_kept_mass": full - sampling}
        if episodes is not None:
            segments = [trajectory.segments for trajectory in trajectories]
            turns = Turns.from_parts(segments, prompts.family, device, self.sampling.pad_token_id)
        return Rollout(
            prompts,
            group=group,
            completion_ids=ids.to(device),
            completion_mask=mask.to(device),
            truncated=torch.tensor([trajectory.truncated for trajectory in trajectories], device=device),
            turns=turns,
            routed_experts=self._experts(prompts, group, trajectories, mask) if self.returns_experts else None,
            **logps,
        )

    def _with_current_weights(self, model: PreTrainedModel, sample: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        """Return ``sample()``. A subclass whose weights others can change updates them if it raises StaleWeights."""
        return sample()

    def _experts(
        self, prompts: ModelInputs, group: torch.Tensor, trajectories: list[Trajectory], mask: torch.Tensor
    ) -> RoutedExperts:
        experts = [trajectory.experts for trajectory in trajectories]
        for trajectory, found in zip(trajectories, experts, strict=True):
            shape = None if found is None else found.shape
            expected = len(trajectory.token_ids) - 1
            if shape is None or len(shape) != 3 or shape[0] != expected or shape[1] <= max(self.moe_layers):
                raise RolloutError(
                    f"{trajectory.name}: vLLM must return the experts of {expected} tokens and of at least "
                    f"{1 + max(self.moe_layers)} layers, got {'none' if shape is None else f'the shape {shape}'}"
                )
        return routed_experts(prompts, group.tolist(), mask, experts, self.moe_layers)

    def _sample(
        self, trajectories: list[Trajectory], group: list[int], params: dict[str, Any], episodes: "Episodes | None"
    ) -> None:
        """Sample trajectories to their end: with one request for the first turns of a prompt, and one for each further turn.

        vLLM and the tools run at the same time. The first turns of a prompt arrive together; from then on, each trajectory
        continues as soon as its own tools are done.

        Args:
            group: the prompt of each trajectory.
            params: see ``_params``.
        """
        keys: dict[int, Key] = {}
        for k, prompt in enumerate(group):
            keys[prompt] = (*keys.get(prompt, ()), k)
        waiting: set[int] = set()  # trajectories whose tools run
        can_repeat = True
        with self._requests() as requests:
            for key in keys.values():
                requests.send(key, trajectories[key[0]].prompt, self._limited(params, key, trajectories))
            while requests or waiting:
                for key, reply in requests.replies(POLL if waiting else None) if requests else ():
                    self._check_turns(reply, trajectories[key[0]], self._limited(params, key, trajectories), can_repeat)
                    can_repeat = episodes is None
                    for k, completion in zip(key, reply.completions, strict=True):
                        trajectories[k].add_turn(completion.token_ids, self._logps(completion, params), completion.ended)
                        trajectories[k].experts = completion.experts  # of all tokens so far
                        if episodes is not None and episodes.end_turn(k, completion.token_ids, completion.ended):
                            waiting.add(k)
                if episodes is not None and waiting:
                    for k, observation in episodes.ready(wait=not requests):
                        waiting.remove(k)
                        if trajectories[k].add_result(observation, self.max_length):
                            requests.send((k,), trajectories[k].prompt, self._limited(params, (k,), trajectories))
                        else:
                            episodes.refuse(k)

    def _limited(self, params: dict[str, Any], key: Key, trajectories: list[Trajectory]) -> dict[str, Any]:
        """Return the parameters of a request for the next turns of trajectories whose tokens are equal so far."""
        room = trajectories[key[0]].room
        return params | {"n": len(key), "max_tokens": room, "min_tokens": min(self.sampling.min_new_tokens, room)}

    def _check_turns(self, reply: Reply, trajectory: Trajectory, params: dict[str, Any], can_repeat: bool) -> None:
        """Check the reply to a request; see ``_check``. Without ``can_repeat``, StaleWeights becomes a final error."""
        try:
            self._check(reply, trajectory.name, trajectory.token_ids, params)
        except StaleWeights as error:
            if can_repeat:
                raise
            raise RolloutError(
                f"{error}. The batch cannot be sampled again, because its tools may have run and may have had side effects"
            ) from error

    def _logps(self, completion: VLLMCompletion, params: dict[str, Any]) -> list[tuple[float, float]]:
        """Return both log-probabilities of each sampled token (see ``_logp``), or [] if they were not requested."""
        if completion.logps is None or "logprobs" not in params:
            return []
        pairs = zip(completion.token_ids, completion.logps, strict=True)
        return [self._logp(token, returned, params["temperature"]) for token, returned in pairs]

    # Weights

    def sync_weights(self, model: PreTrainedModel, step: int, force: bool = False) -> dict[str, float]:
        """See ``Engine``. With ``force``, update the weights even if vLLM has those of ``step`` already."""
        if step == self.step and not force:
            return {}
        self.version, metrics = on_main_process(self.accelerator, lambda: self._push(model, step))
        self.step = step
        return metrics

    def _push(self, model: PreTrainedModel, step: int) -> tuple[str, dict[str, float]]:
        start, version = time.perf_counter(), f"{self.run}-{step}"
        if self.in_memory:
            self._update(partial(self._load_tensors, checkpoint_tensors(model, self.dtype)), version)
        else:
            self._push_folder(model, version)
        self.version, seconds = version, time.perf_counter() - start
        difference = self._compare(model, "after its weights were updated")
        return version, {"vllm/sync_time": seconds, "vllm/fingerprint": difference}

    def _push_folder(self, model: PreTrainedModel, version: str) -> None:
        folder, before = self.folder / version, self.in_use
        try:
            self._update(partial(self._load_folder, save_weights(model, folder, self.dtype)), version)
            self.in_use, unused = (folder, before) if self.keeps_folder else (None, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if unused not in (None, self.in_use):
            shutil.rmtree(unused, ignore_errors=True)

    def _compare(self, model: PreTrainedModel, when: str) -> float:
        """Return the difference between vLLM's and the trainer's fingerprints; raise if it exceeds the tolerance."""
        returned_logps = self._fingerprint_logps()
        logps, bound = self.fingerprint.logps(model), self.config.fingerprint_tolerance
        bound = TOLERANCE[self.dtype] if bound is None else bound
        difference = relative_difference(logps, returned_logps)
        if difference > bound:
            raise RolloutError(
                f"vLLM and the trainer disagree {when}: the relative difference of the log-probabilities of a fixed prompt is "
                f"{difference:.2g}, more than {bound:.2g} (vllm_fingerprint_tolerance): trainer "
                f"{[round(x, 3) for x in logps[:4]]}, vLLM {[round(x, 3) for x in returned_logps[:4]]}"
            )
        return difference

    def _fingerprint_logps(self) -> list[float]:
        """Return vLLM's log-probabilities of the fingerprint's tokens."""
        sample, tokens = self.fingerprint.sample, self.fingerprint.tokens
        [prompt] = self._prompts([sample])
        prompt = prompt._replace(token_ids=[*prompt.token_ids, *tokens])
        bias = dict.fromkeys(self.banned, BAN)
        params: dict[str, Any] = {"n": 1, "temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "logit_bias": bias}
        if self.returns_mask:
            params |= GREEDY
        with self._requests() as requests:
            requests.send((), prompt, params)
            [(_, reply)] = requests.replies(None)
        expected = [*self.fingerprint.prompt.inputs["input_ids"][0].tolist(), *tokens]
        self._check(reply, f"sample {sample.index}", expected, params)
        if reply.prompt_logps is None or len(reply.prompt_logps) < len(tokens):
            raise RolloutError(f"vLLM must return the log-probabilities of a prompt's tokens, got {reply.prompt_logps!r:.100}")
        return reply.prompt_logps[-len(tokens) :]


def _contains(masks: list[list[int]] | None, token_ids: list[int]) -> bool:
    """Whether there is one mask per token, and each has its token."""
    if masks is None or len(masks) != len(token_ids):
        return False
    return all(token in mask for token, mask in zip(token_ids, masks, strict=True))
