"""``Sequences``: decodes completions turn by turn, for TRL's loop over tool calls."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from vlmkernels.integrations.trl.segments import split_rows
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.completions import Completions
from vlmkernels.rollout.decoder import Decoder
from vlmkernels.rollout.token_sampler import TokenSampler


class Sequences(Decoder):
    """The prompts and completions of one ``_generate`` of a TRL trainer, which calls ``model.generate`` for every turn.

    ``begin`` samples the first turn of every completion, ``resume`` another turn of some of them. Both draw the random numbers
    that ``generate`` draws. Only new tokens run through the model.

    Args:
        model: the policy.
        prompts: P prompts.
        group: the prompt of each completion.
        sampling: how tokens are sampled. ``max_new_tokens`` counts the tokens of one turn, as in TRL.
        keep: whether to keep the keys and values of completions for ``resume``.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: ModelInputs, group: Sequence[int], sampling: Sampling, *, keep: bool
    ) -> None:
        vocab_size = model.config.get_text_config().vocab_size
        sampler = TokenSampler(sampling, prompts, group, vocab_size, None)
        super().__init__(model, prompts, group, len(group), None, sampler, _TurnCompletions(len(group), sampling, None))
        self.keeps = keep
        ids = prompts.inputs["input_ids"].masked_fill(prompts.inputs["attention_mask"] == 0, -1)
        self._is_ambiguous = keep and len(ids.unique(dim=0)) < len(prompts)

    @torch.no_grad()
    def begin(self) -> list[list[int]]:
        """Return the tokens of the first turn of each completion."""
        return self._decode([*range(len(self.group))])

    @torch.no_grad()
    def resume(self, rows: ModelInputs, encode: Callable[[ModelInputs], ModelInputs]) -> list[list[int]] | None:
        """Return the tokens of the next turns of some completions, and drop all others.

        Args:
            rows: the left-padded prompts and completions, with results of tools at the end.
            encode: applied to the model inputs of results, for example to replace pixels by features.

        Returns:
            The tokens, or None if ``rows`` do not continue the completions in their order, or if it is unknown which they
            continue, because prompts differ only in their images.
        """
        if self._is_ambiguous:
            return None
        mask = rows.inputs["attention_mask"].bool()
        tokens = [ids[kept].tolist() for ids, kept in zip(rows.inputs["input_ids"], mask, strict=True)]
        candidates = iter(sorted(self.stored))
        known = [self._continued(ids, candidates) for ids in tokens]
        if any(completion is None for completion in known):
            return None
        width = mask.shape[1]
        completions = [k for k, _ in filter(None, known)]
        ends = [width - len(ids) + length for ids, (_, length) in zip(tokens, filter(None, known), strict=True)]
        segments = split_rows(rows, [(0, end, width) for end in ends])
        if segments is None:
            return None
        results = encode(segments.select(torch.arange(1, len(segments), 2)))
        self.stored = {k: self.stored[k] for k in completions}
        for row, k in enumerate(completions):
            self.resumed.append((k, results.select(torch.tensor([row])).trim()))
        return self._decode(completions)

    def _continued(self, ids: list[int], candidates: Iterator[int]) -> tuple[int, int] | None:
        """Return the next candidate that begins ``ids``, and its number of tokens with its prompt."""
        for k in candidates:
            ids_of_prompt, mask = (self.prompts.inputs[name][self.group[k]] for name in ("input_ids", "attention_mask"))
            known = [*ids_of_prompt[mask.bool()].tolist(), *self.completions.tokens[k]]
            if len(known) < len(ids) and ids[: len(known)] == known:
                return k, len(known)
        return None

    def _decode(self, completions: list[int]) -> list[list[int]]:
        self.sampler.draw_for(completions)
        while self.pending or self.slots.occupied or self.resumed:
            if self.resumed:
                self._resume(self.cache.num_slots)
            elif self.pending:
                self._admit([self.pending.popleft() for _ in range(len(self.pending))])
            else:
                self._decode_steps()
        return [self.completions.turn(k) for k in completions]

    @property
    def _has_turns(self) -> bool:
        return self.keeps

    def _continues(self, k: int) -> bool:
        return self.keeps and not self.completions.truncated[k]

    def _encode(self, results: list[ModelInputs]) -> list[ModelInputs]:
        return results  # their image_keys, which are those of one call of resume, tell the pack which images are equal


class _TurnCompletions(Completions):
    """Completions in which ``max_new_tokens`` counts the tokens of a turn."""

    @property
    def most_tokens(self) -> None:
        return None

    def index(self, k: int) -> int:
        return len(self.turn(k))
