"""Decoding the completions of groups: each prompt runs once, and its keys and values serve all its completions.

The completions are decoded in slots. A decoding step is a function of the contents of device buffers (``Slots``) only, so that
on a GPU it runs as a CUDA graph, and the host reads the sampled tokens only every few steps.

A completion can have several turns (``decode_trajectories``): after a turn that calls tools, their results are appended to the
completion's own keys and values, and the next turn follows. While tools run, other completions use the slot.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmkernels.models.attention import check_tree_attention
from vlmkernels.models.few_rows import few_rows_linears
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.loading import base_model
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.completions import Completions, Decoded
from vlmkernels.rollout.decoder import Decoder
from vlmkernels.rollout.token_sampler import TokenSampler

if TYPE_CHECKING:
    from vlmkernels.rollout.episodes import Episodes


@torch.no_grad()
def decode_groups(
    model: PreTrainedModel,
    prompts: ModelInputs,
    num_generations: int,
    sampling: Sampling,
    *,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    as_generate: bool = False,
    uniform: torch.Tensor | None = None,
    record_experts: bool = False,
) -> Decoded:
    """Sample completions as ``model.generate`` does on ``num_generations`` copies of each prompt.

    Greedy completions equal those of ``generate`` up to rounding; sampled completions do so with ``as_generate``. Each prompt
    runs once, and its keys and values are stored once. When a completion ends, another takes its slot. The sampled tokens
    depend on ``uniform``, not on how many completions are decoded at the same time.

    Args:
        model: a model that ``vlmkernels.models.attention.use_tree_attention`` was called on; it may have adapters.
        prompts: P encoded prompts.
        num_generations: completions per prompt.
        sampling: how tokens are sampled, with ``eos_token_id`` and ``pad_token_id``, without ``generation_kwargs``.
        max_num_seqs: maximum number of completions decoded at the same time. Default: all.
        max_tokens: maximum number of prompt tokens in one forward pass. Default: no limit.
        tokenizer: needed for stop strings.
        as_generate: draw the random numbers that ``generate`` draws from the device's random state. Excludes ``max_num_seqs``
            and ``uniform``.
        uniform: (B, max_new_tokens) fp64 in [0, 1) on the CPU, one random number per token; not used if the temperature is 0.
            Default: from the CPU's random state.
        record_experts: record the experts of each token; see ``vlmkernels.models.router_replay``.

    Returns:
        See ``Decoded``.

    Raises:
        ValueError: an argument is out of range, there are no prompts, or a prompt has more than ``max_tokens``.
        NotImplementedError: ``use_tree_attention`` was not called on the model.

    Source: https://arxiv.org/abs/2402.05099 for attention to a shared prompt.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations must be >= 1, got {num_generations}")
    if as_generate and uniform is not None:
        raise ValueError("uniform must be None with as_generate, got a tensor")
    if as_generate and max_num_seqs is not None:
        raise ValueError(f"max_num_seqs must be None with as_generate, got {max_num_seqs}")
    group = [prompt for prompt in range(len(prompts)) for _ in range(num_generations)]
    if uniform is None and sampling.temperature > 0 and not as_generate:
        uniform = torch.rand(len(group), sampling.max_new_tokens, dtype=torch.float64)
    decoder = make_decoder(
        model, prompts, group, sampling, max_num_seqs=max_num_seqs, max_tokens=max_tokens, tokenizer=tokenizer, uniform=uniform
    )
    return _decoded(decoder, record_experts)


@torch.no_grad()
def decode_trajectories(
    model: PreTrainedModel,
    prompts: ModelInputs,
    episodes: "Episodes",
    sampling: Sampling,
    *,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    uniform: torch.Tensor | None = None,
    keeps_features: bool = False,
    record_experts: bool = False,
) -> Decoded:
    """Sample completions of several turns: the results of the tools that a turn calls are appended, and the next turn follows.

    Only new tokens run through the model: each prompt once, and each turn and each result once per completion. While the tools
    of a completion run, others use its slot. The result is what ``model.generate`` returns turn by turn, up to rounding. The
    tokens depend on ``uniform`` and on the results of tools, not on how long tools take.

    Args:
        model, prompts, max_num_seqs, tokenizer: see ``decode_groups``.
        episodes: the conversations; ``episodes.group`` has the prompt of each completion.
        sampling: see ``decode_groups``. ``max_new_tokens`` counts all tokens after the prompt, also those of results.
            ``min_new_tokens`` and ``stop_strings`` apply to each turn.
        max_tokens: maximum number of tokens of prompts, or of results, in one forward pass. A result runs in one pass.
        uniform: (B, max_new_tokens) fp64 in [0, 1) on the CPU; see ``decode_groups``.
        keeps_features: return results with image features in place of pixels; see ``encode_images``.
        record_experts: see ``decode_groups``.

    Returns:
        See ``Decoded``, with ``turns``.

    Raises:
        See ``decode_groups``, and ``Episodes``.
    """
    group = episodes.group.tolist()
    if uniform is None and sampling.temperature > 0:
        uniform = torch.rand(len(group), sampling.max_new_tokens, dtype=torch.float64)
    decoder = make_decoder(
        model, prompts, group, sampling, max_num_seqs=max_num_seqs, max_tokens=max_tokens, tokenizer=tokenizer, uniform=uniform
    )
    decoder.episodes, decoder.keeps_features = episodes, keeps_features
    return _decoded(decoder, record_experts)


def _decoded(decoder: Decoder, record_experts: bool) -> Decoded:
    """Run a decoder, and return the completions."""
    if record_experts:
        decoder.record_experts()
    with few_rows_linears(decoder.model):
        decoder.run()
    return decoder.decoded(with_turns=decoder.episodes is not None)


def make_decoder(
    model: PreTrainedModel,
    prompts: ModelInputs,
    group: Sequence[int],
    sampling: Sampling,
    *,
    max_num_seqs: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    uniform: torch.Tensor | None = None,
) -> Decoder:
    """Check the arguments of ``decode_groups`` or ``decode_trajectories`` and build the decoder.

    Args:
        group: the prompt of each completion, ascending.
        uniform: see ``TokenSampler``.
    """
    if max_num_seqs is not None and max_num_seqs < 1:
        raise ValueError(f"max_num_seqs must be None or >= 1, got {max_num_seqs}")
    if sampling.eos_token_id is None or sampling.pad_token_id is None:
        got = f"{sampling.eos_token_id} and {sampling.pad_token_id}"
        raise ValueError(f"sampling must have eos_token_id and pad_token_id (see Sampling.for_model), got {got}")
    if sampling.generation_kwargs:
        raise ValueError(f"generation_kwargs must be empty for decode_groups, got {', '.join(sampling.generation_kwargs)}")
    if sampling.stop_strings and tokenizer is None:
        raise ValueError("tokenizer must be given with stop_strings, got None")
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got none")
    if uniform is not None:
        _check_uniform(uniform, (len(group), sampling.max_new_tokens))
    check_tree_attention(base_model(model))
    vocab_size = model.config.get_text_config().vocab_size
    sampler = TokenSampler(sampling, prompts, group, vocab_size, uniform)
    completions = Completions(len(group), sampling, tokenizer)
    return Decoder(model, prompts, group, min(max_num_seqs or len(group), len(group)), max_tokens, sampler, completions)


def _check_uniform(uniform: torch.Tensor, shape: tuple[int, int]) -> None:
    if uniform.shape != shape:
        raise ValueError(f"uniform must be {shape}, one number per token, got {tuple(uniform.shape)}")
    bad = ~((uniform >= 0) & (uniform < 1))
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"uniform must be in [0, 1), got {uniform[row, column].item()} at ({row}, {column})")
