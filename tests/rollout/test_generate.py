"""``decode_groups`` and the default engine against ``model.generate`` on copies of the prompts."""

import json

import pytest
import torch
from support import tiny, tiny_families
from support.groups import EOS, LENGTH, MODELS, PAD, SHARING, amplified, processed, prompts_of
from tokenizers import Tokenizer

from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.families import media_token_ids, missing_token_ids
from vlmkernels.models.tree_cache import TreeCache
from vlmkernels.ops.gather_logps import gather_logps
from vlmkernels.rollout.base import Sampling
from vlmkernels.rollout.decode import decode_groups
from vlmkernels.rollout.generate import Generate


def generated(model, prompts, times, **options):
    inputs = prompts.repeat(times).inputs
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def assert_same_tokens(decoded, expected):
    ended = torch.isin(expected, torch.tensor(EOS))
    mask = ended.cumsum(1) - ended.int() == 0
    width = decoded.mask.shape[1]
    assert not mask[:, width:].any()
    assert torch.equal(decoded.mask, mask[:, :width])
    assert torch.equal(decoded.ids, expected[:, :width].masked_fill(~decoded.mask, PAD))
    assert torch.equal(decoded.truncated, ~ended.any(1))


CASES = [(name, images) for name in MODELS for images in ((1, 1), (2, 0, 1), (0, 0)) if name != "qwen2" or not any(images)]


@pytest.mark.parametrize(("name", "images"), CASES)
def test_greedy_equals_generate(name, images):
    """For any number of slots and any token budget of the prompts. Each image is encoded once."""
    model = amplified(MODELS[name]())
    prompts = prompts_of(images, model)
    expected = generated(model, prompts, 3)
    use_tree_attention(model)
    patches = []
    if name != "qwen2":
        model.model.visual.register_forward_pre_hook(lambda module, args: patches.append(len(args[0])))
    longest = int(prompts.inputs["attention_mask"].sum(1).max())
    for slots, tokens in ((None, None), (1, None), (4, None), (None, longest)):
        patches.clear()
        sampling = Sampling(LENGTH, EOS, PAD, temperature=0)
        decoded = decode_groups(model, prompts, 3, sampling, max_num_seqs=slots, max_tokens=tokens)
        assert_same_tokens(decoded, expected)
        assert sum(patches) == (len(prompts.inputs["pixel_values"]) if any(images) else 0)


@pytest.mark.parametrize("name", SHARING)
def test_every_family_equals_generate(name):
    case = tiny_families.case(name)
    model, batch = case.model, processed(name)
    previous = model.config.get_text_config()._attn_implementation
    expected = generated(model, batch, 2, max_new_tokens=4, suppress_tokens=EOS)
    try:
        use_tree_attention(model)
        sampling = Sampling(4, EOS, PAD, temperature=0, suppress_tokens=EOS)
        assert_same_tokens(decode_groups(model, batch, 2, sampling, max_num_seqs=3), expected)
    finally:
        model.set_attn_implementation(previous)


OPTIONS = {
    "suppressed": {"suppress_tokens": [7, 8, 9, 10, 11, 151653]},  # the last id is beyond the vocabulary
    "at least": {"min_new_tokens": 9},
    "penalty": {"repetition_penalty": 1.7},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_equal_those_of_generate(case):
    model = amplified(tiny.text_model())
    prompts = prompts_of((0, 0), model).select(torch.tensor([1, 1]))  # generate's penalty counts padding
    expected = generated(model, prompts, 2, **OPTIONS[case])
    assert not torch.equal(expected, generated(model, prompts, 2)[:, : expected.shape[1]]) or case == "one token"
    use_tree_attention(model)
    sampling = Sampling(
        **{"max_new_tokens": LENGTH, "eos_token_id": EOS, "pad_token_id": PAD, "temperature": 0} | OPTIONS[case]
    )
    assert_same_tokens(decode_groups(model, prompts, 2, sampling, max_num_seqs=3), expected)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 2.0}]
)
def test_samples_do_not_depend_on_the_slots(options):
    """The tokens do not depend on the number of slots, and logps are those of the model at the temperature."""
    model = amplified(tiny.vlm())
    prompts = prompts_of((1, 0, 2), model)
    use_tree_attention(model)
    options = {"suppress_tokens": media_token_ids(model.config, tiny.processor()), **options}
    results = []
    for slots in (None, 1, 5):
        torch.manual_seed(3)
        results.append(decode_groups(model, prompts, 4, Sampling(LENGTH, EOS, PAD, **options), max_num_seqs=slots))
    first = results[0]
    assert len({tuple(row) for row in first.ids.tolist()}) > 4
    assert len(set(first.mask.sum(1).tolist())) > 2
    for other in results[1:]:
        assert torch.equal(other.ids, first.ids)
        torch.testing.assert_close(other.logps, first.logps, rtol=1e-5, atol=1e-5)
    inputs = prompts.repeat(4).append(first.ids, first.mask.long()).inputs
    with torch.no_grad():
        logits = model(**inputs).logits[:, -first.ids.shape[1] - 1 : -1]
    expected = gather_logps(logits, first.ids, temperature=options.get("temperature", 1.0), mask=first.mask)
    torch.testing.assert_close(first.logps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision(name):
    """Under autocast, rotary embeddings return queries and keys in fp32, while values are in bf16."""
    model = MODELS[name]()
    prompts = prompts_of((1, 0, 2) if name != "qwen2" else (0, 0), model)
    use_tree_attention(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        decoded = decode_groups(model, prompts, 3, Sampling(LENGTH, EOS, PAD, suppress_tokens=range(40, 60)), max_num_seqs=4)
        inputs = prompts.repeat(3).append(decoded.ids, decoded.mask.long()).inputs
        logits = model(**inputs).logits[:, -decoded.ids.shape[1] - 1 : -1].float()
    expected = gather_logps(logits, decoded.ids, mask=decoded.mask)
    torch.testing.assert_close(decoded.logps, expected, rtol=0.02, atol=0.1)
    assert (decoded.logps - expected).abs().mean() < 0.02


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_are_not_rounded(autocast):
    """Scores of 16-bit queries and keys are in fp32. Rounding to bf16 would change scores of about 50 by up to 0.1."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=rng).bfloat16().to(device)

    slots, query_heads, heads, length, width = 4, 4, 2, 40, 32
    key, value = 3 * randn(1, heads, length, width), randn(1, heads, length, width)
    query, own_key, own_value = (
        3 * randn(1, query_heads, slots, width),
        randn(1, heads, slots, width),
        randn(1, heads, slots, width),
    )
    cache = TreeCache(slots, device)
    cache.begin([0], [length])
    cache.fill(0, key, value)
    cache.arrange([0] * slots, [0] * slots)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        actual = cache.attend(0, query, own_key, own_value, None)

    def all_of(prefix, own):  # (slots, Hq, length + 1, D)
        prefix = prefix.expand(slots, -1, -1, -1)
        return torch.cat([prefix, own[0].transpose(0, 1).unsqueeze(2)], 2).float().repeat_interleave(query_heads // heads, 1)

    scores = query[0].transpose(0, 1).float().unsqueeze(2) @ all_of(key, own_key).mT * width**-0.5
    assert scores.abs().max() > 30
    expected = (scores.softmax(-1) @ all_of(value, own_value)).squeeze(2)
    torch.testing.assert_close(actual[0].float(), expected, rtol=2**-6, atol=2**-6)


def test_stop_strings():
    """A completion ends with the token that completes a stop string, with decode_groups and with model.generate."""
    model, tokenizer = amplified(tiny.text_model()), tiny.tokenizer()
    prompts = prompts_of((0, 0), model)
    plain = generated(model, prompts, 2, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    stop = tokenizer.decode(plain[0, 3:6])
    rollouts = []
    for share in (True, False):
        engine = Generate(model, tokenizer, Sampling(LENGTH, stop_strings=[stop]), share_prefix=share)
        rollouts.append(engine(model, prompts, 2, 0))
    ours, theirs = rollouts
    assert ours.completion_mask[0].sum() <= 6
    assert stop in tokenizer.decode(ours.completion_ids[0, ours.completion_mask[0]])
    assert not ours.truncated[0]
    assert torch.equal(ours.completion_mask, theirs.completion_mask)
    assert torch.equal(ours.completion_ids, theirs.completion_ids)
    assert torch.equal(ours.truncated, theirs.truncated)


@pytest.mark.parametrize(
    "kwargs",
    [{"eos_token_id": 29}, {"eos_token_id": [29, 12], "top_k": None, "min_new_tokens": None, "stop_strings": None}],
    ids=["one", "several"],
)
def test_the_generation_config_of_the_model_is_ignored(kwargs):
    """Both ways of sampling ignore the model's generation config, and the mask ends with the end-of-sequence token."""
    model, tokenizer = amplified(tiny.text_model()), tiny.tokenizer()
    prompts = prompts_of((0, 0), model)
    declared = {"min_p": 0.9, "no_repeat_ngram_size": 1, "min_new_tokens": 9, "suppress_tokens": [29]}
    model.generation_config.update(**declared)
    rollouts = []
    for share in (True, False):
        sampling = Sampling.from_kwargs(max_new_tokens=LENGTH, **kwargs)
        engine = Generate(model, tokenizer, sampling, share_prefix=share)
        rollouts.append(engine(model, prompts, 2, 0))
    ours, theirs = rollouts
    assert ours.truncated.tolist() in ([False, False, True, True], [False] * 4)
    for name in ("completion_ids", "completion_mask", "truncated"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert {name: getattr(model.generation_config, name) for name in declared} == declared


def test_end_of_sequence_tokens():
    """The tokenizer's and those of the model's generation config are used. Without any, the engine raises."""
    model, tokenizer = tiny.text_model(), tiny.tokenizer()
    tokenizer.eos_token = None
    engine = Generate(model, tokenizer, Sampling(2))
    assert engine.sampling.eos_token_id == [model.generation_config.eos_token_id]
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id must be set, or be in the tokenizer or the model's generation config"):
        Generate(model, tokenizer, Sampling(2))


def padded_model(make, likely):
    """A model whose vocabulary has 10 ids more than the tokenizer, and which gives the tokens ``likely`` a high probability."""
    model = make()
    model.resize_token_embeddings(len(tiny.tokenizer()) + 10)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # apart from the embedding
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    with torch.no_grad():
        head.bias[likely] += 9
    return model


def tokenizer_with_hole():
    """A tokenizer without the tokens 3 and 4."""
    tokenizer = tiny.tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {token: index for token, index in content["model"]["vocab"].items() if index not in (3, 4)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


@pytest.mark.parametrize("share", [True, False], ids=["decode_groups", "generate"])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_ids_without_a_token_are_never_sampled(share, temperature):
    """Ids beyond the tokenizer and in its holes. ``logps`` are over the whole vocabulary, the kept mass without these ids."""
    tokenizer = tokenizer_with_hole()
    missing = [3, 4, *range(len(tiny.tokenizer()), len(tiny.tokenizer()) + 10)]
    model = padded_model(tiny.text_model, missing)
    assert missing_token_ids(model.config, tokenizer) == missing
    prompts = prompts_of((0, 0), model)
    engine = Generate(model, tokenizer, Sampling(LENGTH), share_prefix=share)
    rollout = engine(model, prompts, 8, temperature)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    assert not torch.isin(ids, torch.tensor(missing)).any()
    if not share:
        return
    with torch.no_grad():
        logits = model(**prompts.repeat(8).append(ids, mask.long()).inputs).logits[:, -ids.shape[1] - 1 : -1]
    logps = (logits / (temperature or 1)).log_softmax(-1)
    torch.testing.assert_close(rollout.logps[mask], logps.gather(2, ids.unsqueeze(2)).squeeze(2)[mask], rtol=1e-4, atol=1e-4)
    if temperature:
        kept = logps.index_fill(2, torch.tensor(missing), -torch.inf).logsumexp(2)
        torch.testing.assert_close(rollout.log_kept_mass[mask], kept[mask], rtol=1e-4, atol=1e-4)
        assert kept[mask].max() < -1


def test_an_id_without_a_token_may_end_completions():
    """If it is named as an end-of-sequence token; and the ids of image tokens are banned as before."""
    model, last = padded_model(tiny.vlm, []), len(tiny.tokenizer()) + 9
    engine = Generate(model, tiny.processor(), Sampling(4, eos_token_id=[last]))
    media = media_token_ids(model.config, tiny.processor())
    assert sorted(engine.sampling.suppress_tokens) == sorted([*media, *range(last - 9, last)])
    assert missing_token_ids(tiny.vlm().config, tiny.processor()) == []


@pytest.mark.parametrize("reason", ["model", "options", "off"])
def test_falls_back_to_generate_on_copies(reason):
    model, kwargs = tiny.text_model(), {}
    if reason == "model":
        model.config.attention_dropout, said = 0.1, "attention_dropout must be 0, got 0.1"
    elif reason == "options":
        kwargs = {"num_beams": 2, "typical_p": 0.9}
        said = "generation_kwargs holds num_beams, typical_p"
    else:
        said = "share_prefix is False"
    sampling = Sampling.from_kwargs(max_new_tokens=4, **kwargs)
    engine = Generate(model, tiny.tokenizer(), sampling, share_prefix=reason != "off")
    assert not engine.shares_prefix
    assert not engine.returns_logps
    assert engine.copies_reason == said
    rollout = engine(model, prompts_of((0, 0), model), 3, 1.0)
    assert rollout.completion_ids.shape[0] == 6
    assert rollout.logps is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must be >= 0, got -1"),
        ({"min_p": 2}, r"min_p must be None or in \[0, 1\], got 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be > 0, got 0"),
        ({"stop_strings": "x"}, "stop_strings must be a list of strings, got 'x'"),
        ({"stop_strings": [""]}, "stop_strings must hold no empty string"),
        ({"generation_kwargs": {"beams": 2}}, "generation_kwargs must hold only arguments of GenerationConfig, got beams"),
        ({"generation_kwargs": {"top_k": 2}}, "generation_kwargs must not hold do_sample or fields of Sampling, got top_k"),
    ],
)
def test_bad_sampling(change, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 2, "eos_token_id": EOS, "pad_token_id": PAD} | change)


def test_bad_calls():
    model = use_tree_attention(tiny.text_model())
    prompts = prompts_of((0,), model)
    for times, sampling, slots, message in (
        (0, Sampling(2, EOS, PAD), None, "num_generations must be >= 1, got 0"),
        (1, Sampling(2, EOS, PAD), 0, "max_num_seqs must be None or >= 1, got 0"),
        (1, Sampling(2, EOS, PAD, stop_strings=["a"]), None, "tokenizer must be given with stop_strings"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_groups(model, prompts, times, sampling, max_num_seqs=slots)
    with pytest.raises(ValueError, match=r"max_tokens_per_microbatch must be at least \d+, a prompt of \d+ tokens"):
        decode_groups(model, prompts, 1, Sampling(2, EOS, PAD), max_tokens=1)


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_model_with_a_generate_of_its_own_keeps_it(where):
    model, calls = tiny.vlm(), []

    def own(self, *args, **kwargs):
        calls.append(1)
        standard = type(self).__base__ if where == "class" else type(self)
        return standard.generate(self, *args, **kwargs)

    if where == "class":
        model.__class__ = type("Own", (type(model),), {"generate": own})
    else:
        model.generate = own.__get__(model)
    engine = Generate(model, tiny.processor(), Sampling(LENGTH, EOS, PAD))
    assert not engine.shares_prefix
    assert "generate" in engine.copies_reason
    engine(model, prompts_of((1, 0), model), 2, 1.0)
    assert calls
