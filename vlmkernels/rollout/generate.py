"""The default engine: samples with the trainer's model."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from vlmkernels.data.samples import Sample, tokenizer_of
from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.deterministic import use_deterministic
from vlmkernels.models.families import prefix_sharing_unsupported
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model, sampling_override
from vlmkernels.models.router_replay import use_router_replay
from vlmkernels.models.trajectories import join
from vlmkernels.rollout.base import Engine, Rollout, Sampling
from vlmkernels.rollout.completions import Completions, Decoded
from vlmkernels.rollout.decode import decode_groups, decode_trajectories
from vlmkernels.rollout.token_sampler import stops

if TYPE_CHECKING:
    from vlmkernels.rollout.episodes import Episodes

logger = logging.get_logger(__name__)


def report_prefix_sharing(reasons: dict[str, str | None]) -> None:
    """Print which stages of a run share prefixes; log it as a warning if one does not.

    Args:
        reasons: by stage, such as "training", why each completion runs after a copy of its prompt, or None if it does not.
    """
    stages: dict[str | None, list[str]] = {}
    for stage, reason in reasons.items():
        stages.setdefault(reason, []).append(stage)
    parts = []
    for reason, names in stages.items():
        state, note = ("disabled", reason) if reason else ("enabled", "each prompt and its images run once per group")
        parts.append(f"{state} in {' and '.join(names)} ({note})")
    message = f"Prefix sharing: {', '.join(parts)}"
    if any(reasons.values()):
        logger.warning(message)
    else:
        print(message, flush=True)


class Generate(Engine):
    """Samples with the model itself.

    If the model and all options support it, ``decode_groups`` runs each prompt once for all its completions. Otherwise
    ``model.generate`` runs on a copy of the prompt per completion. The model's own generation config is ignored, except for its
    end-of-sequence tokens.

    Attributes:
        copies_reason: why ``model.generate`` is used, or None.
        reuses_image_features: whether images that tools return are encoded once, so that rollouts have their features in place
            of pixels; see ``encode_images``. False by default. Only with ``decode_groups``.

    Args:
        model, processor: the model, which may have adapters, and its processor or tokenizer.
        sampling: how completions are sampled.
        share_prefix: whether to use ``decode_groups`` if it is supported. False selects ``model.generate``.
        max_num_seqs, max_tokens: see ``decode_groups``.
        router_replay: record the experts of each token; see ``vlmkernels.models.router_replay``.
        deterministic: let tokens and log-probabilities not depend on ``max_num_seqs``, ``max_tokens`` and other prompts, bit
            for bit; see ``vlmkernels.models.deterministic``.

    Raises:
        ValueError: there is no end-of-sequence token; see ``Sampling.for_model``. Or ``router_replay`` or
            ``deterministic`` is set and ``model.generate`` would be used.
        NotImplementedError: see ``use_router_replay`` and ``use_deterministic``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        sampling: Sampling,
        *,
        share_prefix: bool = True,
        max_num_seqs: int | None = None,
        max_tokens: int | None = None,
        router_replay: bool = False,
        deterministic: bool = False,
    ):
        self.tokenizer = tokenizer_of(processor)
        self.sampling = sampling.for_model(model, processor)
        self.max_num_seqs, self.max_tokens = max_num_seqs, max_tokens
        plain = base_model(model)
        reason = prefix_sharing_unsupported(plain) if share_prefix else "share_prefix is False"
        if reason is None and sampling.generation_kwargs:
            reason = f"generation_kwargs holds {', '.join(sorted(sampling.generation_kwargs))}"
        self.copies_reason = reason or sampling_override(model)
        self.shares_prefix = self.returns_logps = self.copies_reason is None
        self.reuses_image_features = False
        if router_replay and not self.shares_prefix:
            raise ValueError(
                f"router_replay must be False with model.generate, which records no experts ({self.copies_reason}), got True"
            )
        if deterministic and not self.shares_prefix:
            raise ValueError(f"deterministic must be False with model.generate ({self.copies_reason}), got True")
        self.returns_experts = router_replay
        if self.shares_prefix:
            use_tree_attention(plain)
        if router_replay:
            use_router_replay(plain)
        if deterministic:
            use_deterministic(plain)

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        prompts: ModelInputs,
        num_generations: int,
        temperature: float,
        samples: list[Sample] | None = None,
        episodes: "Episodes | None" = None,
        *,
        uniform: torch.Tensor | None = None,
    ) -> Rollout:
        """See ``Engine``; ``samples`` is not used. ``uniform``: see ``decode_groups``; only with ``shares_prefix``."""
        sampling = self.sampling.at(temperature)
        shared: dict[str, Any] = {"max_num_seqs": self.max_num_seqs, "max_tokens": self.max_tokens, "uniform": uniform}
        shared |= {"tokenizer": self.tokenizer, "record_experts": self.returns_experts}
        if not self.shares_prefix and uniform is not None:
            raise ValueError("uniform must be None if model.generate samples, got a tensor")
        group = torch.arange(len(prompts)).repeat_interleave(num_generations) if episodes is None else episodes.group
        if self.shares_prefix and episodes is None:
            decoded = decode_groups(model, prompts, num_generations, sampling, **shared)
        elif self.shares_prefix:
            shared["keeps_features"] = self.reuses_image_features
            decoded = decode_trajectories(model, prompts, episodes, sampling, **shared)
        elif episodes is None:
            ids, mask, truncated = self._generate(model, prompts.select(group).inputs, sampling)
            decoded = Decoded(ids, mask, truncated)
        else:
            decoded = self._generate_turns(model, prompts, episodes, sampling)
        return Rollout(
            prompts,
            group,
            completion_ids=decoded.ids,
            completion_mask=decoded.mask,
            truncated=decoded.truncated,
            logps=decoded.logps,
            log_kept_mass=decoded.log_kept_mass,
            turns=decoded.turns,
            routed_experts=decoded.routed_experts,
        )

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        options = {name: getattr(sampling, name) for name in Sampling.names()} | dict(sampling.generation_kwargs)
        options |= {"bos_token_id": self.tokenizer.bos_token_id, "use_cache": True, "disable_compile": True}
        options |= {name: list(options[name]) or None for name in ("suppress_tokens", "stop_strings")}
        options["min_new_tokens"] = sampling.min_new_tokens or None
        if sampling.temperature == 0:
            greedy = {k: v for k, v in options.items() if k not in ("temperature", "top_p", "top_k", "min_p")}
            return GenerationConfig(**greedy, do_sample=False)
        return GenerationConfig(**options, do_sample=True)

    def _generate_turns(
        self, model: PreTrainedModel, prompts: ModelInputs, episodes: "Episodes", sampling: Sampling
    ) -> Decoded:
        """Sample turn by turn; every turn runs the prompt and all earlier turns again."""
        group, device = episodes.group.tolist(), prompts.inputs["input_ids"].device
        lengths = prompts.inputs["attention_mask"].sum(1).tolist()
        completions, running = Completions(len(group), sampling, self.tokenizer), list(range(len(group)))
        waiting: set[int] = set()
        while running:
            left = [sampling.max_new_tokens - len(completions.tokens[k]) for k in running]
            paths = [completions.path(k, prompts.select(torch.tensor([group[k]]))) for k in running]
            rows = join(paths, sampling.pad_token_id or 0)
            ids, mask, truncated = self._generate(model, rows.inputs, replace(sampling, max_new_tokens=max(left)))
            for row, (k, most) in enumerate(zip(running, left, strict=True)):
                turn = ids[row][mask[row]].tolist()
                cut = bool(truncated[row]) or len(turn) > most
                completions.append_turn(k, turn[:most], truncated=cut)
                if episodes.end_turn(k, turn[:most], not cut):
                    waiting.add(k)
            running = []
            while waiting:  # for all, as batches and their random numbers must not depend on how long tools take
                for k, observation in episodes.ready(wait=True):
                    waiting.remove(k)
                    result = observation.inputs.to(device)
                    if completions.has_room(k, result, lengths[group[k]], base_model(model)):
                        completions.observe(k, result)
                        running.append(k)
                    else:
                        episodes.refuse(k)
                        completions.truncated[k] = True
            running.sort()
        return completions.decoded(prompts, with_turns=True)

    def _generate(
        self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Call ``model.generate``. Returns the ids (B, C), their mask (B, C) and which completions did not end (B,)."""
        more = {"tokenizer": self.tokenizer} if sampling.stop_strings else {}
        plain = base_model(model)
        # generate takes values that our config leaves unset from the model's generation config.
        declared, plain.generation_config = plain.generation_config, GenerationConfig()
        try:
            sequences = model.generate(**inputs, generation_config=self._generation_config(sampling), **more)
        finally:
            plain.generation_config = declared
        ids = sequences[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(ids, torch.tensor(sampling.eos_token_id, device=ids.device))
        for row, tokens in enumerate(ids.tolist() if sampling.stop_strings else ()):
            ends = (n for n in range(1, len(tokens) + 1) if stops(tokens[:n], sampling.stop_strings, self.tokenizer))
            end = next(ends, None)
            if end is not None:
                ended[row, end - 1] = True
        mask = ended.cumsum(1) - ended.int() == 0  # up to and with the token that ends the completion
        width = int(mask.any(0).sum())
        ids, mask, truncated = ids[:, :width], mask[:, :width], ~ended.any(1)
        return ids.masked_fill(~mask, sampling.pad_token_id), mask, truncated
