"""The interface of rollout engines: sampling options, the base class of engines and the completions that they return.

See docs/rollout.md. ``make_engine`` in ``vlmkernels.rollout.make`` builds the engine of a run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from vlmkernels.data.samples import Sample, tokenizer_of
from vlmkernels.models.branches import branch_lengths, pack_branches, pad_branches, split_at_images
from vlmkernels.models.cut import cut_packs
from vlmkernels.models.families import media_token_ids, missing_token_ids
from vlmkernels.models.image_features import accepts_image_features, deduplicate_images, encode_images, with_pixels
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.masked_images import has_media
from vlmkernels.models.packs import ScoringBatch, pack_groups, pad_completions
from vlmkernels.models.positions import prompt_positions
from vlmkernels.models.router_replay import RoutedExperts
from vlmkernels.models.trajectories import Turns, join, pack_turns, pad_turns

if TYPE_CHECKING:
    from vlmkernels.rollout.episodes import Episodes


class RolloutError(RuntimeError):
    """A rollout engine failed or returned results that training cannot use; the message says why."""


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. Names and meanings are those of ``transformers.GenerationConfig``.

    Args:
        max_new_tokens: maximum number of tokens of a completion.
        eos_token_id: tokens that end a completion. Default: the end-of-sequence tokens of the tokenizer and of the model's
            generation config.
        pad_token_id: token that pads completions on the right. Default: the padding token of the tokenizer.
        temperature: 0 is greedy decoding.
        top_k: sample from the ``top_k`` most probable tokens. 0 keeps all tokens.
        top_p: sample from the most probable tokens whose probabilities add up to ``top_p``. 1 keeps all tokens.
        min_p: drop tokens less probable than ``min_p`` times the most probable token.
        repetition_penalty: above 1, tokens that occurred before become less probable. 1 is off.
        min_new_tokens: minimum number of tokens before an end-of-sequence token can be sampled.
        suppress_tokens: tokens that are never sampled. Engines add the image and video tokens of the model, and the ids of its
            vocabulary for which the tokenizer has no token.
        stop_strings: a completion ends with the token that completes one of them.
        generation_kwargs: further arguments of ``GenerationConfig``. Only ``model.generate`` supports them.

    Raises:
        ValueError: a value is out of range, or ``generation_kwargs`` has a name that ``GenerationConfig`` does not have.
    """

    max_new_tokens: int
    eos_token_id: Sequence[int] | None = None
    pad_token_id: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be None or in [0, 1], got {self.min_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be > 0, got {self.repetition_penalty}")
        if isinstance(self.stop_strings, str):
            raise ValueError(f"stop_strings must be a list of strings, got {self.stop_strings!r}")
        if not all(self.stop_strings):
            raise ValueError(f"stop_strings must hold no empty string, got {self.stop_strings}")
        if self.generation_kwargs:
            self._check_generation_kwargs()

    def _check_generation_kwargs(self) -> None:
        defaults = GenerationConfig()
        unknown = [name for name in self.generation_kwargs if not hasattr(defaults, name)]
        if unknown:
            raise ValueError(f"generation_kwargs must hold only arguments of GenerationConfig, got {', '.join(unknown)}")
        reserved = sorted(self.generation_kwargs.keys() & {*self.names(), "do_sample"})
        if reserved:
            raise ValueError(f"generation_kwargs must not hold do_sample or fields of Sampling, got {', '.join(reserved)}")

    @classmethod
    def names(cls) -> set[str]:
        """Return the names of the fields that are arguments of ``GenerationConfig``: all except ``generation_kwargs``."""
        return {f.name for f in fields(cls)} - {"generation_kwargs"}

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> "Sampling":
        """Build from arguments of ``GenerationConfig``.

        A value of None selects the default. ``eos_token_id`` may be an int. Arguments without a field of their own go to
        ``generation_kwargs``.
        """
        defaults = GenerationConfig()  # an unknown name raises even with None
        given = {name: value for name, value in kwargs.items() if value is not None or not hasattr(defaults, name)}
        own = {name: given.pop(name) for name in cls.names() & given.keys()}
        if isinstance(eos := own.get("eos_token_id"), int):
            own["eos_token_id"] = [eos]
        return cls(**own, generation_kwargs=given)

    def for_model(self, model: PreTrainedModel, processor: Any) -> "Sampling":
        """Fill in ``eos_token_id`` and ``pad_token_id``, and add the tokens that must not be sampled to ``suppress_tokens``.

        These are image and video tokens, and ids without a token, except those that end a completion.

        Raises:
            ValueError: neither the tokenizer nor the model's generation config has a token that ends a completion.
        """
        tokenizer, eos = tokenizer_of(processor), self.eos_token_id
        if eos is None:
            declared = model.generation_config.eos_token_id
            declared = declared if isinstance(declared, (list, tuple)) else [declared]
            eos = [token for token in dict.fromkeys([tokenizer.eos_token_id, *declared]) if token is not None]
            if not eos:
                raise ValueError("eos_token_id must be set, or be in the tokenizer or the model's generation config, got None")
        missing = [token for token in missing_token_ids(model.config, processor) if token not in eos]
        return replace(
            self,
            eos_token_id=list(eos),
            pad_token_id=tokenizer.pad_token_id if self.pad_token_id is None else self.pad_token_id,
            suppress_tokens=[*media_token_ids(model.config, processor), *missing, *self.suppress_tokens],
        )

    def at(self, temperature: float) -> "Sampling":
        """Return a copy with another temperature."""
        return replace(self, temperature=temperature)

    @property
    def truncates(self) -> bool:
        """Whether top_p, top_k or min_p excludes tokens."""
        return self.top_p < 1 or self.top_k > 0 or bool(self.min_p)

    @property
    def is_restricted(self) -> bool:
        """Whether anything but the temperature and suppress_tokens changes the probabilities that tokens are sampled with."""
        return self.truncates or self.repetition_penalty != 1 or self.min_new_tokens > 0


@dataclass(frozen=True)
class Rollout:
    """B sampled completions of P prompts.

    Args:
        prompts: the P prompts, each once.
        group: (B,) int64 on the CPU, the prompt of each completion.
        completion_ids: (B, C) int64, right-padded.
        completion_mask: (B, C) bool, the tokens of each completion up to and with the token that ended it.
        truncated: (B,) bool, whether a completion reached ``max_new_tokens`` without ending, or had no room for the results of
            its tools.
        logps: (B, C) fp32, log-probabilities of the sampled tokens under the model at the temperature, over the whole
            vocabulary. NaN for tokens without a value; None if the engine does not return them.
        log_kept_mass: (B, C) fp32, log of the total probability of the tokens that sampling did not exclude; see ``Decoded``.
            None if the engine does not return it.
        turns: the segments of multi-turn completions, whose tokens include the results of tools. None without tools.
        routed_experts: the experts of each token, which ``packed`` and ``padded`` pass on to the model; see
            ``vlmkernels.models.router_replay``. None if routers choose in training too.
        sampling_logps: (B, C) fp32, log-probabilities with which the tokens were sampled, from an engine that returns them
            alone. None: they are ``logps - log_kept_mass``, if the engine returns both.
        masked_prompts: the P prompts with masked images, for ``branches``. None if there are none.
    """

    prompts: ModelInputs
    group: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    truncated: torch.Tensor
    logps: torch.Tensor | None = None
    log_kept_mass: torch.Tensor | None = None
    turns: Turns | None = None
    routed_experts: RoutedExperts | None = None
    sampling_logps: torch.Tensor | None = None
    masked_prompts: ModelInputs | None = None

    def select(self, completions: torch.Tensor) -> "Rollout":
        """Return some completions with their prompts, without the columns that are all padding then.

        Args:
            completions: (n,) int64 on the CPU, ascending indices.
        """
        chosen, group = self.group[completions].unique_consecutive(return_inverse=True)
        width = int(self.completion_mask[completions].any(0).sum())
        columns = {name: x[completions, :width] for name in _PADDING if (x := getattr(self, name)) is not None}
        prompts = {name: x.select(chosen).trim() for name in _OF_PROMPTS if (x := getattr(self, name)) is not None}
        experts = self.routed_experts
        if experts is not None:
            length = prompts["prompts"].inputs["input_ids"].shape[1]
            experts = RoutedExperts(experts.prompts[chosen, -length:], experts.completions[completions, :width])
        turns = None if self.turns is None else self.turns.select(completions)
        parts: dict[str, Any] = {**prompts, **columns}
        return replace(self, group=group, truncated=self.truncated[completions], turns=turns, routed_experts=experts, **parts)

    @classmethod
    def join(cls, rollouts: Sequence["Rollout"], pad_token_id: int) -> "Rollout":
        """Join the completions of several rollouts, whose tokens ``pad_token_id`` pads to a common size.

        Raises:
            ValueError: only some of the rollouts have log-probabilities, turns or experts; see ``concat`` for others.
        """
        for f in fields(cls):
            missing = sum(getattr(rollout, f.name) is None for rollout in rollouts)
            if missing not in (0, len(rollouts)):
                raise ValueError(f"rollouts must all have {f.name} or none, got {missing} of {len(rollouts)} without")
        first, counts = rollouts[0], [len(rollout.prompts) for rollout in rollouts]
        groups = [rollout.group + sum(counts[:k]) for k, rollout in enumerate(rollouts)]
        columns = {
            name: _cat_padded([getattr(rollout, name) for rollout in rollouts], pad_token_id if value is None else value)
            for name, value in _PADDING.items()
            if getattr(first, name) is not None
        }
        turns = experts = None
        if first.turns is not None:
            turns = Turns.join([r.turns for r in rollouts if r.turns is not None], list(map(len, groups)), pad_token_id)
        if first.routed_experts is not None:
            of_prompts, of_completions = zip(*(r.routed_experts for r in rollouts if r.routed_experts is not None), strict=True)
            experts = RoutedExperts(_cat_padded(of_prompts, -1, left=True), _cat_padded(of_completions, -1))
        prompts = {
            name: join([getattr(rollout, name) for rollout in rollouts], pad_token_id)
            for name in _OF_PROMPTS
            if getattr(first, name) is not None
        }
        truncated = torch.cat([rollout.truncated for rollout in rollouts])
        parts: dict[str, Any] = {**prompts, **columns}
        return cls(group=torch.cat(groups), truncated=truncated, turns=turns, routed_experts=experts, **parts)

    @cached_property
    def sampled_mask(self) -> torch.Tensor:
        """The tokens that the model sampled, (B, C) bool: all of a completion but the results of tools."""
        return self.completion_mask if self.turns is None else self.turns.sampled_mask(self.completion_mask)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """Return, for each token that the model sampled, the value of its turn, (B, C); 0 elsewhere.

        Args:
            values: (B, T), one value per turn of the model. Turns without a value have 0.
        """
        turns = self.turns
        numbers = torch.zeros_like(self.completion_ids) if turns is None else turns.turn_numbers(self.completion_mask)
        missing = (1 if turns is None else turns.num_turns) - values.shape[1]
        values = torch.nn.functional.pad(values, (0, max(missing, 0)))
        return values.gather(1, numbers).masked_fill(~self.sampled_mask, 0)

    def with_inputs(self, change: Callable[[ModelInputs], ModelInputs]) -> "Rollout":
        """Return the same completions with changed model inputs of the prompts and of the results of tools.

        If ``change`` returns its argument, what is computed from it stays cached.
        """
        prompts, turns = change(self.prompts), self.turns
        if turns is not None and (inputs := change(turns.inputs)) is not turns.inputs:
            turns = replace(turns, inputs=inputs)
        return self if prompts is self.prompts and turns is self.turns else replace(self, prompts=prompts, turns=turns)

    def with_image_features(self, model: PreTrainedModel, pixels: ModelInputs | None = None) -> "Rollout":
        """Replace the pixels of the prompts, and of the results of tools, by features; see ``encode_images``.

        Args:
            pixels: the prompts with their pixels. If given, the pixels stay beside the features; see ``with_pixels``.
        """
        turns = self.turns
        if turns is not None and "pixel_values" in turns.inputs.inputs:
            # In parts with about as many images as the prompts have, because there are many more results than prompts.
            number = -(-int(turns.inputs.num_images.sum()) // max(int(self.prompts.num_images.sum()), 16))
            parts = torch.arange(len(turns.inputs)).tensor_split(number)
            encoded = [encode_images(model, turns.inputs.select(part)) for part in parts]
            inputs = join(encoded)
            turns = replace(turns, inputs=inputs if pixels is None else with_pixels(inputs, turns.inputs))
        masked = None if self.masked_prompts is None else encode_images(model, self.masked_prompts)
        prompts = encode_images(model, self.prompts)
        prompts = prompts if pixels is None else with_pixels(prompts, pixels)
        return replace(self, prompts=prompts, masked_prompts=masked, turns=turns)

    def token_ids(self) -> list[list[int]]:
        """Return the token ids of each completion, without padding."""
        return _rows(self.completion_ids, self.completion_mask)

    def sampled_ids(self) -> list[list[int]]:
        """Return the token ids of each completion that the model sampled."""
        return _rows(self.completion_ids, self.sampled_mask)

    def parts(
        self, samples: slice, max_tokens: int | None, *, shared: bool, hidden_size: int, branches: bool = False
    ) -> list[torch.Tensor]:
        """Split completions into parts of at most ``max_tokens`` tokens, as ``packed`` (or ``padded``) lays them out.

        Args:
            samples: the completions to split.
            max_tokens: token budget of a part; None for one part.
            shared: whether completions share their prompt (``packed``).
            hidden_size: hidden size of the model, from which ``cut_packs`` computes the cost of a pack.
            branches: whether ``branches`` lays them out. Without sharing, each completion then is two rows.

        Returns:
            The indices of each part's completions, (n,) int64.

        Raises:
            ValueError: a prompt and one completion exceed ``max_tokens``.
        """
        chosen = torch.arange(len(self.group))[samples]
        if max_tokens is None:
            return [chosen]
        prefixes = self.prompts.inputs["attention_mask"].sum(1).tolist()
        group, lengths = self.group.tolist(), self.completion_mask.sum(1).tolist()
        if branches and shared:
            prefixes, times = branch_lengths(self.prompts)
            lengths = [length * times[prompt] for prompt, length in zip(group, lengths, strict=True)]
        rows = 2 if branches and not shared else 1
        if shared and self.turns is not None:
            parts = self.turns.cut(prefixes, group, chosen.tolist(), max_tokens, hidden_size)
            return [torch.tensor(part) for part in parts]
        sizes = [(prefixes[index], length) for index, length in zip(group, lengths, strict=True)]

        def largest(rows: list[tuple[int, int]]) -> tuple[int, int]:  # copies are padded to the longest prompt and completion
            return max(rows, key=sum) if shared else (max(prefix for prefix, _ in rows), max(length for _, length in rows))

        needed = rows * sum(largest(sizes[samples]))
        if needed > max_tokens:  # the error counts those of the whole generation batch: other parts may need more
            prefix, length = (rows * size for size in largest(sizes))
            twice = " (with those of the masked images)" if branches else ""
            raise ValueError(
                f"max_tokens_per_microbatch must be at least {prefix + length}, a prompt of {prefix} tokens and a completion "
                f"of {length}{twice}, got {max_tokens}"
            )
        if shared:
            packs = cut_packs(prefixes, group[samples], lengths[samples], max_tokens, hidden_size)
            return [chosen[pack] for pack in packs]
        return list(chosen.tensor_split(-(-len(chosen) // (max_tokens // needed))))

    def padded(self, samples: torch.Tensor) -> ScoringBatch:
        """Return completions as padded rows, each after its own copy of the prompt, without columns that are all padding."""
        if self.turns is not None:
            batch = pad_turns(self.prompts, self.group.tolist(), self.turns, samples.tolist())
            return batch if self.routed_experts is None else self._with_experts(batch, self._paths(samples.tolist()))
        ids, mask = self._completions(samples)
        width = int(mask.any(0).sum())
        ids, mask = ids[:, :width], mask[:, :width]
        batch = pad_completions(self.prompts.select(self.group[samples]).trim().append(ids, mask).inputs, mask)
        if self.routed_experts is None:
            return batch
        prompts, completions = self._places
        places = torch.cat([prompts[self.group[samples]], completions[samples, :width]], 1)
        return self._with_experts(batch, places[:, -batch.inputs["input_ids"].shape[1] :])

    def packed(self, samples: torch.Tensor, model: PreTrainedModel) -> ScoringBatch:
        """Return completions packed by group, after one shared prompt per group. ``model`` computes the position ids."""
        if self.turns is not None:
            batch = pack_turns(model, self.prompts, self.group.tolist(), self.turns, samples.tolist())
            if self.routed_experts is None:
                return batch
            segments = self.turns.tree(len(self.prompts), self.group.tolist(), samples.tolist()).segments
            return self._with_experts(batch, self._segments(segments))
        chosen, group = self.group[samples].unique_consecutive(return_inverse=True)
        prompts = self.prompts.select(chosen)
        positions = prompt_positions(model, prompts.inputs)
        inputs = deduplicate_images(prompts) if accepts_image_features(model) else prompts.inputs
        batch = pack_groups(inputs, positions, group, *self._completions(samples), prompts.family)
        if self.routed_experts is None:
            return batch
        parts = [
            [prompt, *(len(self.prompts) + k for k in samples[self.group[samples] == prompt].tolist())]
            for prompt in chosen.tolist()
        ]
        return self._with_experts(batch, self._segments([segment for part in parts for segment in part]))

    def branches(self, samples: torch.Tensor, model: PreTrainedModel | None, loss_mask: torch.Tensor) -> ScoringBatch:
        """Return completions after their prompts and after ``masked_prompts``; see ``pack_branches``.

        From the first masked image on, routers choose their experts: the rollout has none for these tokens.

        Args:
            samples: (n,) int64, the completions.
            model: computes the position ids of a pack. None: rows with copies of the prompts, as ``padded`` returns them.
            loss_mask: (n, C) bool, the tokens to score.
        """
        assert self.masked_prompts is not None
        completions = self.group[samples], *self._completions(samples), loss_mask
        if model is None:
            batch = pad_branches(self.prompts, self.masked_prompts, *completions)
        else:
            batch = pack_branches(model, self.prompts, self.masked_prompts, *completions)
        if self.routed_experts is None:
            return batch
        places = self._places_of_rows(samples) if model is None else self._places_of_branches(samples)
        return self._with_experts(batch, places[:, -batch.inputs["input_ids"].shape[1] :])

    def _completions(self, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids and the mask of some completions, without waiting for the device."""
        places = samples.to(self.completion_ids.device, non_blocking=True)
        return self.completion_ids[places], self.completion_mask[places]

    # Routed experts. A place is the index of a token among those of all prompts and then of all completions, with padding.

    @cached_property
    def _places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The places of the tokens of the prompts, (P, L), and of the completions, (B, C)."""
        prompts, completions = self.prompts.inputs["input_ids"].shape, self.completion_ids.shape
        places = torch.arange(prompts.numel() + completions.numel()).split([prompts.numel(), completions.numel()])
        return places[0].view(prompts), places[1].view(completions)

    @cached_property
    def _places_of_segments(self) -> list[torch.Tensor]:
        """The places of the tokens of each prompt, and then of each completion, or of each segment of those with turns."""
        prompts, completions = self._places
        prompt_mask, mask = self.prompts.inputs["attention_mask"].bool().cpu(), self.completion_mask.cpu()
        lengths = mask.sum(1).tolist() if self.turns is None else self.turns.lengths
        return [*(row[kept] for row, kept in zip(prompts, prompt_mask, strict=True)), *completions[mask].split(lengths)]

    def _segments(self, segments: list[int]) -> torch.Tensor:
        """Return the places of the tokens of some segments, one after another, (1, T)."""
        return torch.cat([self._places_of_segments[segment] for segment in segments]).unsqueeze(0)

    def _paths(self, samples: list[int]) -> torch.Tensor:
        """Return the places of trajectories after their prompts, right-padded with -1, (n, L)."""
        assert self.turns is not None
        group, count = self.group.tolist(), len(self.prompts)
        paths = [self._segments([group[k], *(count + segment for segment in self.turns.members[k])])[0] for k in samples]
        return torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1)

    def _places_of_branches(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the places of the tokens of ``pack_branches``, (1, T); -1 from the first masked image on."""
        prompts, (before, rest) = self._places[0], self._before_images
        pieces: list[torch.Tensor] = []
        for prompt in self.group[samples].unique().tolist():
            members = samples[self.group[samples] == prompt].tolist()
            own = [prompts[prompt][rest[prompt]], *(self._places_of_segments[len(prompts) + k] for k in members)]
            masked = [torch.full_like(piece, -1) for piece in own] if has_media(self.prompts)[prompt] else []
            pieces += [prompts[prompt][before[prompt]], *own, *masked]
        return torch.cat(pieces).unsqueeze(0)

    def _places_of_rows(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the places of the tokens of ``pad_branches``, with all columns of the prompts; see ``_places_of_branches``."""
        group, width = self.group[samples], int(self.completion_mask[samples].any(0).sum())
        prompts, completions = self._places[0][group], self._places[1][samples, :width]
        doubled = has_media(self.prompts)[group]
        masked = prompts.masked_fill(~self._before_images[0][group], -1)[doubled]
        rows = torch.cat([prompts, completions], 1)
        return torch.cat([rows, torch.cat([masked, torch.full_like(completions[doubled], -1)], 1)])

    @cached_property
    def _before_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens of the prompts are before their first image, and which are the rest, (P, L) bool on the CPU each."""
        before, rest = (part.inputs["attention_mask"].bool().cpu() for part in split_at_images(self.prompts))
        return before, rest

    def _with_experts(self, batch: ScoringBatch, places: torch.Tensor) -> ScoringBatch:
        assert self.routed_experts is not None
        batch.inputs["routed_experts"] = self.routed_experts.at(places)
        return batch


# The fields of a rollout that are model inputs of its P prompts.
_OF_PROMPTS = ("prompts", "masked_prompts")
# The fields of a rollout with a value per token of the completions, and the value of padding; None for pad_token_id.
_PADDING = {"completion_ids": None, "completion_mask": False, "logps": 0, "log_kept_mass": 0, "sampling_logps": 0}


def _cat_padded(parts: Sequence[torch.Tensor], value: float, left: bool = False) -> torch.Tensor:
    """Concatenate tensors (n, L, ...) of different lengths, which ``value`` pads on the right or the left."""
    length = max(part.shape[1] for part in parts)
    result = parts[0].new_full((sum(map(len, parts)), length, *parts[0].shape[2:]), value)
    for part, rows in zip(parts, result.split([len(part) for part in parts]), strict=True):
        rows[:, length - part.shape[1] if left else 0 :][:, : part.shape[1]] = part
    return result


def _rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def pad_token_ids(rows: Sequence[Sequence[int]], pad_token_id: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B rows of token ids as a right-padded tensor, (B, C) int64, and the mask of their tokens, (B, C) bool."""
    if pad_token_id is None:
        raise ValueError("pad_token_id must be set, or be in the tokenizer, got None")
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.full(mask.shape, pad_token_id)
    ids[mask] = torch.tensor([token for row in rows for token in row])
    return ids, mask


class Engine(ABC):
    """Samples completions of prompts.

    Attributes:
        sampling: how completions are sampled, with the tokens that end them.
        shares_prefix: whether the engine runs the trainer's model once per prompt for all its completions.
        returns_logps: whether rollouts have the log-probabilities that a rollout correction needs.
        returns_experts: whether rollouts have the experts of each token, as router replay needs.
    """

    sampling: Sampling
    shares_prefix: bool = False
    returns_logps: bool = False
    returns_experts: bool = False

    def sync_weights(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """Update the engine's weights to those of ``model`` and return metrics of the update.

        A no-op if the engine samples with ``model`` itself, or has the weights of ``step`` already. Every rank must call it.
        Under FSDP2 the parameters of ``model`` must be gathered (``vlmkernels.train.parallel.gathered``).

        Args:
            model: the policy.
            step: number of optimizer steps done.

        Raises:
            RolloutError: the update failed, or the engine's weights differ from the model's after it.
        """
        return {}

    @abstractmethod
    def __call__(
        self,
        model: PreTrainedModel,
        prompts: ModelInputs,
        num_generations: int,
        temperature: float,
        samples: list[Sample] | None = None,
        episodes: "Episodes | None" = None,
    ) -> Rollout:
        """Sample completions.

        Args:
            model: the policy, with the same weights as in the last call of ``sync_weights``.
            prompts: P encoded prompts.
            num_generations: completions per prompt.
            temperature: 0 is greedy decoding.
            samples: the P samples that ``prompts`` encodes. Only the vLLM engines need them.
            episodes: the conversations of the completions with their tools. ``episodes.group`` then has the prompt of each
                completion, and ``num_generations`` is not used. None: every completion is one turn.

        Returns:
            P * num_generations completions, or one per trajectory of ``episodes``; those of a prompt are consecutive.
        """
