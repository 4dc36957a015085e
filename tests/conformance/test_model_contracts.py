"""Contracts on models: a plain forward pass of transformers keeps them, and planted faults break them."""

import copy
from dataclasses import replace

import pytest
import torch
from support.conformance import output_of

from vlmkernels.conformance import Adapter, Sampled, encode, greedy_alone, load, run, tiny
from vlmkernels.conformance.alone import exact, logits_alone
from vlmkernels.conformance.contract import cases_of, run_case
from vlmkernels.conformance.contracts import sampling
from vlmkernels.conformance.models import captured_positions, scripted, token_ids
from vlmkernels.conformance.suite import all_contracts

METHODS = ("logps", "process", "split", "positions", "sample")


class Plain(Adapter):
    """The model of transformers on a padded batch."""

    name = "plain"
    models = ("text", "qwen2_5_vl", "llava")

    def logits(self, model, processor, samples):
        return model(**encode(processor, samples, completions=True)).logits

    def logps(self, model, processor, samples, temperature):
        logits, out = self.logits(model, processor, samples), []
        for row, sample in zip(logits, samples, strict=True):
            ids = torch.tensor(sample.completion_ids)
            # Completions of unequal lengths end at the last column of a batch that is padded on the left.
            out.append((row[-len(ids) - 1 : -1] / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1))
        return out

    def process(self, processor, samples):
        return encode(processor, samples)

    def split(self, inputs, num_images, num_chunks):
        size, shape = len(num_images) // num_chunks, inputs["input_ids"].shape
        ends = [sum(num_images[: (chunk + 1) * size]) for chunk in range(num_chunks)]
        out = []
        for chunk, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            rows = {name: x[chunk * size : (chunk + 1) * size] for name, x in inputs.items() if x.shape == shape}
            out.append(rows | self.images(inputs, start, end))
        return out

    def images(self, inputs, start, end):
        """The inputs of the images from ``start`` to ``end``."""
        if "pixel_values" not in inputs or start == end:
            return {}
        grids = inputs.get("image_grid_thw")
        if grids is None:
            return {"pixel_values": inputs["pixel_values"][start:end]}
        patches = grids.prod(-1)
        rows = slice(int(patches[:start].sum()), int(patches[:end].sum()))
        return {"pixel_values": inputs["pixel_values"][rows], "image_grid_thw": grids[start:end]}

    def positions(self, model, inputs):
        return captured_positions(model, inputs)

    def generated(self, model, processor, samples, **options):
        inputs = encode(processor, samples)
        banned = [token_ids("<|image_pad|>")[0], token_ids("<image>")[0]]
        options = {"do_sample": True, "top_k": 0, "suppress_tokens": banned, **options}
        out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
        end = model.generation_config.eos_token_id
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in out]

    def sample(self, model, processor, samples, num_generations, max_tokens, temperature):
        # Not num_return_sequences: with it, generate of transformers 5.17 mixes up the images of LLaVA.
        repeated = [sample for sample in samples for _ in range(num_generations)]
        options = {"max_new_tokens": max_tokens, "temperature": temperature}
        return [Sampled(ids, ids) for ids in self.generated(model, processor, repeated, **options)]


class ImageDropped(Plain):
    def logits(self, model, processor, samples):
        inputs = encode(processor, samples, completions=True)
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


class PatchesShifted(Plain):
    """The patches of a sample go to the next one."""

    def logits(self, model, processor, samples):
        inputs = encode(processor, samples, completions=True)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].roll(1, 0)
        return model(**inputs).logits


class ImagesSwapped(Plain):
    """The images of a sample in reversed order, as those of a stack."""

    def logits(self, model, processor, samples):
        inputs, own = encode(processor, samples, completions=True), {}
        if "pixel_values" in inputs:
            parts = [self.images(inputs, index, index + 1) for index in reversed(range(sum(len(x.images) for x in samples)))]
            own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return model(**inputs | own).logits


class TowerWithoutGradient(Plain):
    def logits(self, model, processor, samples):
        tower = getattr(model.model, "visual", None) or getattr(model.model, "vision_tower", None)
        tower.forward = torch.no_grad()(tower.forward)
        return super().logits(model, processor, samples)


class PlainPositions(Plain):
    """M-RoPE forgotten: positions count tokens."""

    def logits(self, model, processor, samples):
        inputs = encode(processor, samples, completions=True)
        return model(**inputs, position_ids=inputs["attention_mask"].cumsum(-1)).logits

    def positions(self, model, inputs):
        return inputs["attention_mask"].cumsum(-1)


class StalePositions(Plain):
    """The positions of the first batch that was at least as long."""

    first = None

    def positions(self, model, inputs):
        self.first = captured_positions(model, inputs) if self.first is None else self.first
        width = inputs["input_ids"].shape[1]
        if self.first.shape[-1] >= width and self.first.shape[-2] >= len(inputs["input_ids"]):
            return self.first[..., : len(inputs["input_ids"]), -width:]
        return captured_positions(model, inputs)


class PaddingAttended(Plain):
    def logits(self, model, processor, samples):
        inputs = encode(processor, samples, completions=True)
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return model(**inputs).logits


class SortedByLength(Plain):
    """Samples are sorted for padding, and results are not sorted back."""

    def logps(self, model, processor, samples, temperature):
        order = sorted(range(len(samples)), key=lambda index: len(samples[index].completion_ids))
        rows = super().logps(model, processor, [samples[index] for index in order], temperature)
        width = max(map(len, rows))
        padded = [torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]
        return [row[: len(sample.completion_ids)] for row, sample in zip(padded, samples, strict=True)]


class TemperatureForgotten(Plain):
    def logps(self, model, processor, samples, temperature):
        return super().logps(model, processor, samples, 1.0)


class OneTokenLate(Plain):
    """The logits of a token in place of those that predict it."""

    def logits(self, model, processor, samples):
        return super().logits(model, processor, samples).roll(-1, 1)


class HalfPrecision(Plain):
    def logits(self, model, processor, samples):
        return super().logits(model, processor, samples).bfloat16().float()


class DetachedPrompt(Plain):
    """No gradient by the embeddings, as if these were frozen."""

    def logits(self, model, processor, samples):
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.detach())
        return super().logits(model, processor, samples)


class ImagesByText(Plain):
    """Samples with the text of a sample before share its images, as copies of one prompt."""

    def logits(self, model, processor, samples):
        first = {}
        for sample in samples:
            first.setdefault((sample.text, len(sample.images)), sample.images)
        shared = [replace(sample, images=first[sample.text, len(sample.images)]) for sample in samples]
        return super().logits(model, processor, shared)


class MaskFromIds(Plain):
    """Padding is found by its token, which a model may also sample."""

    def logits(self, model, processor, samples):
        inputs = encode(processor, samples, completions=True)
        inputs["attention_mask"] = (inputs["input_ids"] != token_ids("<|endoftext|>")[0]).long()
        return model(**inputs).logits


class StaleHead(Plain):
    """A copy of the head from the first call."""

    head = None

    def logits(self, model, processor, samples):
        self.head = model.lm_head.weight.clone() if self.head is None else self.head
        return model.model(**encode(processor, samples, completions=True)).last_hidden_state @ self.head.T


class SlicedBySample(Plain):
    """Rows of pixels are counted as samples."""

    def images(self, inputs, start, end):
        return {name: inputs[name][start:end] for name in ("pixel_values", "image_grid_thw") if name in inputs}


class OneImageEach(Plain):
    def split(self, inputs, num_images, num_chunks):
        return super().split(inputs, [1] * len(num_images), num_chunks)


class EmptyPixels(Plain):
    """Micro-batches without images have pixels of no rows."""

    def split(self, inputs, num_images, num_chunks):
        chunks = super().split(inputs, num_images, num_chunks)
        return [{name: x[:0] for name, x in inputs.items() if name in ("pixel_values", "image_grid_thw")} | c for c in chunks]


class LastChunkRepeated(Plain):
    def split(self, inputs, num_images, num_chunks):
        chunks = super().split(inputs, num_images, num_chunks)
        return [*chunks[:-1], chunks[0]]


class ImageTokensCut(Plain):
    """Prompts are cut to 16 tokens from the left."""

    def process(self, processor, samples):
        inputs = encode(processor, samples)
        shape = inputs["input_ids"].shape
        return {name: x[:, -16:] if x.shape == shape else x for name, x in inputs.items()}


class ImagesReversed(Plain):
    def process(self, processor, samples):
        inputs = encode(processor, samples)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        return inputs


class ImageTokensSampled(Plain):
    def generated(self, model, processor, samples, **options):
        return super().generated(model, processor, samples, **options, suppress_tokens=None)


class Retokenized(Plain):
    def sample(self, model, processor, samples, *options):
        tokenizer = getattr(processor, "tokenizer", processor)
        out = super().sample(model, processor, samples, *options)
        return [Sampled(ids, tokenizer(tokenizer.decode(ids))["input_ids"]) for ids, _ in out]


class EndDropped(Plain):
    def sample(self, model, *options):
        end = model.generation_config.eos_token_id
        return [Sampled(ids, [token for token in ids if token != end]) for ids, _ in super().sample(model, *options)]


class AfterTheEnd(Plain):
    """Tokens after the end, which other completions of the batch have not reached."""

    def generated(self, model, processor, samples, **options):
        inputs = encode(processor, samples)
        return model.generate(**inputs, do_sample=True, **options)[:, inputs["input_ids"].shape[1] :].tolist()


class OneSeed(Plain):
    """Each completion of a prompt is sampled with the same seed."""

    def sample(self, model, processor, samples, num_generations, *options):
        rounds = []
        for _ in range(num_generations):
            torch.manual_seed(0)
            rounds.append(super().sample(model, processor, samples, 1, *options))
        return [each for completions in zip(*rounds, strict=True) for each in completions]


class StaleEngine(Plain):
    """The engine gets the weights of the first call."""

    engine = None

    def generated(self, model, processor, samples, **options):
        self.engine = copy.deepcopy(model) if self.engine is None else self.engine
        return super().generated(self.engine, processor, samples, **options)


class GenerationsFirst(Plain):
    """The first completions of all prompts, then the second ones."""

    def sample(self, model, processor, samples, num_generations, *options):
        out = super().sample(model, processor, samples, num_generations, *options)
        return [each for first in range(num_generations) for each in out[first::num_generations]]


FAULTS = {
    ImageDropped: ("qwen2_5_vl", "llava", {"logps/value", "logps/image", "logps/pixels"}),
    PatchesShifted: ("qwen2_5_vl", "llava", {"logps/value", "logps/pixels"}),
    ImagesSwapped: ("qwen2_5_vl", "llava", {"logps/image"}),
    TowerWithoutGradient: ("qwen2_5_vl", "llava", {"logps/pixels", "logps/gradient"}),
    PlainPositions: ("qwen2_5_vl", {"logps/value", "positions/value"}),
    StalePositions: ("qwen2_5_vl", {"positions/after-another"}),
    PaddingAttended: ("text", "qwen2_5_vl", "llava", {"logps/value", "logps/batch"}),
    SortedByLength: ("text", "llava", {"logps/value", "logps/order"}),
    TemperatureForgotten: ("text", "qwen2_5_vl", {"logps/value"}),
    OneTokenLate: ("text", {"logps/value"}),
    HalfPrecision: ("text", {"logps/value"}),
    DetachedPrompt: ("text", {"logps/gradient"}),
    ImagesByText: ("qwen2_5_vl", "llava", {"logps/value"}),
    MaskFromIds: ("text", {"logps/value"}),
    StaleHead: ("text", {"logps/trained"}),
    SlicedBySample: ("qwen2_5_vl", {"split/value"}),
    OneImageEach: ("qwen2_5_vl", "llava", {"split/value"}),
    EmptyPixels: ("qwen2_5_vl", "llava", {"split/forward"}),
    LastChunkRepeated: ("text", {"split/value"}),
    ImageTokensCut: ("qwen2_5_vl", {"process/placeholders", "process/tokens"}),
    ImagesReversed: ("qwen2_5_vl", "llava", {"process/images"}),
    ImageTokensSampled: ("qwen2_5_vl", "llava", {"sample/image-token"}),
    Retokenized: ("text", "qwen2_5_vl", {"sample/ids"}),
    EndDropped: ("text", {"sample/ids"}),
    AfterTheEnd: ("text", {"sample/end"}),
    OneSeed: ("text", {"sample/different"}),
    StaleEngine: ("text", {"sample/trained"}),
    GenerationsFirst: ("text", {"sample/prompt"}),
}


@pytest.mark.parametrize("kind", Plain.models)
def test_transformers_pass(kind):
    adapter = type("Plain", (Plain,), {"models": (kind,)})()
    results = [result for method in METHODS for result in run(adapter, f"{method}/*")]
    assert {result.contract.split("/")[0] for result in results} == {*METHODS}
    assert not [result for result in results if result.status not in ("pass", "not applicable")]
    assert sum(result.status == "pass" for result in results) > 15


@pytest.mark.parametrize(
    ("fault", "kind", "name"),
    [(fault, kind, name) for fault, (*kinds, names) in FAULTS.items() for kind in kinds for name in sorted(names)],
)
def test_faults_are_found(fault, kind, name):
    adapter = type(fault.__name__, (fault,), {"models": (kind,)})()
    (contract,) = [each for each in all_contracts() if each.name == name]
    # The smallest failing case is what a report shows.
    failure = next(
        (result for case in cases_of(adapter, contract) if (result := run_case(adapter, contract, case)).status != "pass"), None
    )
    assert failure is not None
    assert failure.status == "fail", failure.message
    assert failure.reproduction


@pytest.mark.parametrize("contract", [each for each in all_contracts() if each.method in METHODS], ids=lambda each: each.name)
def test_reproductions_run(contract):
    adapter = load(f"{__file__}:Plain")
    got, expected = output_of(contract.reproduce(**cases_of(adapter, contract)[-1].arguments), adapter)
    assert got
    assert expected


OURS = ("logps/value", "logps/gradient", "logps/pixels", "split/value", "process/tokens", "positions/value", "sample/ids")


@pytest.mark.parametrize("name", ["SharedPrefix", "Copies"])
@pytest.mark.parametrize("contract", [each for each in all_contracts() if each.name in OURS], ids=lambda each: each.name)
def test_our_trainer_passes_the_largest_case(name, contract):
    adapter = load(f"vlmkernels_trainer:{name}")
    case = [each for each in cases_of(adapter, contract) if each.arguments["kind"] == "qwen2_5_vl"][-1]
    result = run_case(adapter, contract, case)
    assert result.status == "pass", result.message


def test_tokens_do_not_survive_text():
    _, tokenizer = tiny("text")
    ids = token_ids("a", "b")
    assert tokenizer.decode(ids) == "ab"
    assert tuple(tokenizer("ab")["input_ids"]) == token_ids("ab")


def test_scripted_models_follow_their_script():
    model, _ = scripted("llava", {None: ["a"], "a": ["b", "x"], "b": ["y"]})
    logits = model(input_ids=torch.tensor([token_ids("z", "a", "b")])).logits[0]
    likely = [{int(token) for token in (row > 20).nonzero()} for row in logits]
    assert likely == [{*token_ids("a")}, {*token_ids("b", "x")}, {*token_ids("y")}]


@pytest.mark.parametrize("kind", Plain.models)
def test_the_most_probable_tokens_are_certain(kind):
    """sample/prompt expects them at its temperature."""
    model, processor = exact(kind)
    samples = sampling.greedy_samples(kind)
    for sample, ids in zip(samples, greedy_alone(model, processor, samples, 3), strict=True):
        with torch.no_grad():
            logits = logits_alone(model, processor, replace(sample, completion_ids=tuple(ids)))[:-1]
        best = (logits / sampling.COLD).softmax(-1)[range(3), ids]
        assert (best > 1 - 1e-8).all()


def test_copies_are_independent():
    model, _ = tiny("text")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert tiny("text")[0].lm_head.weight.abs().sum() > 0


def test_kinds_are_checked():
    with pytest.raises(ValueError, match="kind must be one of text, qwen2_5_vl, llava; got 'bert'"):
        tiny("bert")
