"""Sampling: which tokens can be sampled, and whether the tokens in the loss are those that were sampled."""

from collections.abc import Iterator, Mapping, Sequence

from vlmkernels.conformance.adapter import Adapter
from vlmkernels.conformance.alone import exact, greedy_alone
from vlmkernels.conformance.batches import Sample
from vlmkernels.conformance.contract import Case, Violation, contract
from vlmkernels.conformance.models import END_OF_TURN, PLACEHOLDER, scripted, tiny, token_ids

SCRIPT = "The model, whose tokens depend on the last one in a known way (``scripted``)"
EXACT = "0: token ids"
PROMPTS = (Sample("hi"), Sample("what do you see"))
Script = Mapping[str | None, Sequence[str]]


def prompts_of(kind: str) -> tuple[Sample, ...]:
    return PROMPTS if kind == "text" else (Sample("hi", ((1, 28, 28),)), Sample("what do you see", ((2, 56, 28),)))


def sample_script(kind: str, after: Script, num_generations: int, max_tokens: int, rule: str) -> str:
    return f"""\
model, processor = scripted("{kind}", {dict(after)!r}, adapter.device)
samples = {list(prompts_of(kind))!r}
print("got", adapter.sample(model, processor, samples, {num_generations}, {max_tokens}, 1.0))
print("expected", {rule!r})"""


def kind_cases(adapter: Adapter) -> Iterator[Case]:
    return (Case(kind, {"kind": kind}) for kind in adapter.models)


def ids_cases(adapter: Adapter) -> Iterator[Case]:
    """Yield scripts whose completion, decoded and encoded again, has other ids: "a", "b" is the token "ab"."""
    scripts = {"limit": {None: ("a",), "a": ("b",)}, "end": {None: ("a",), "a": ("b",), "b": (END_OF_TURN,)}}
    for kind in adapter.models:
        for name, after in scripts.items():
            ids = [*token_ids(*"abab")] if name == "limit" else [*token_ids("a", "b", END_OF_TURN)]
            yield Case(f"{kind}-{name}", {"kind": kind, "after": after, "ids": ids})


def ids_script(kind: str, after: Script, ids: list[int]) -> str:
    return sample_script(kind, after, 2, 4, f"four times {ids}, sampled and trained")


@contract("sample/ids", "sample", source=SCRIPT, tolerance=EXACT, cases=ids_cases, reproduce=ids_script)
def ids(adapter: Adapter, kind: str, after: Script, ids: list[int]) -> None:
    """The ids in the loss are those sampled, not those of the decoded text, from the first up to and with the end token."""
    out = adapter.sample(*scripted(kind, after, adapter.device), prompts_of(kind), 2, 4, 1.0)
    for index, completion in enumerate(out):
        for name, got in completion._asdict().items():
            if [*got] != ids:
                raise Violation(f"{name} of completion {index} is {[*got]}, expected {ids}")


END_AFTER: Script = {None: ("a", "y", END_OF_TURN)}


def end_script(kind: str) -> str:
    return sample_script(kind, END_AFTER, 4, 6, "up to and with the first end token, or 6 tokens")


@contract("sample/end", "sample", source=SCRIPT, tolerance=EXACT, cases=kind_cases, reproduce=end_script)
def end(adapter: Adapter, kind: str) -> None:
    """A completion ends with its first end token, whatever the lengths of the others, or at the limit."""
    out = adapter.sample(*scripted(kind, END_AFTER, adapter.device), prompts_of(kind), 4, 6, 1.0)
    stop = token_ids(END_OF_TURN)[0]
    for index, completion in enumerate(out):
        for name, got in completion._asdict().items():
            ended, cut = [*got][-1:] == [stop], len(got) == 6
            if stop in [*got][:-1] or not (ended or cut) or not {*got} <= {*token_ids("a", "y", END_OF_TURN)}:
                raise Violation(
                    f"{name} of completion {index} is {[*got]}, expected one that ends with its first token {stop},"
                    " or at 6 tokens"
                )


def placeholder_after(kind: str) -> Script:
    return {None: ("a", PLACEHOLDER[kind])}


def placeholder_cases(adapter: Adapter) -> Iterator[Case]:
    return (case for case in kind_cases(adapter) if case.id in PLACEHOLDER)


def placeholder_script(kind: str) -> str:
    return sample_script(kind, placeholder_after(kind), 4, 6, f"no token {token_ids(PLACEHOLDER[kind])[0]}, of images")


@contract(
    "sample/image-token",
    "sample",
    source="Model: an image token without features of an image has no meaning, and most models refuse it",
    tolerance="0; a sampler without the rule passes with a probability of 2**-48",
    cases=placeholder_cases,
    reproduce=placeholder_script,
)
def image_token(adapter: Adapter, kind: str) -> None:
    """No image token can be sampled, however probable."""
    out = adapter.sample(*scripted(kind, placeholder_after(kind), adapter.device), prompts_of(kind), 4, 6, 1.0)
    banned = token_ids(PLACEHOLDER[kind])[0]
    for index, completion in enumerate(out):
        if banned in completion.sampled_ids:
            raise Violation(f"completion {index} is {[*completion.sampled_ids]}, which has the image token {banned}")


COLD = 1 / 256  # a temperature: the logit of the best token is ahead by at least 0.1, other tokens together have 1e-8
GREEDY_TEXTS = (Sample("hi"), Sample("what do you see"), Sample("how many"))
# The texts are equal, so that the completions differ by the images.
GREEDY_IMAGES = (Sample("hi", ((5, 84, 84),)), Sample("hi", ((7, 84, 84),)), Sample("hi", ((8, 56, 56), (9, 28, 56))))


def greedy_samples(kind: str) -> tuple[Sample, ...]:
    return GREEDY_TEXTS if kind == "text" else GREEDY_IMAGES


def prompt_script(kind: str) -> str:
    return f"""\
model, processor = tiny("{kind}", adapter.device)
samples = {list(greedy_samples(kind))!r}
print("got", [each.sampled_ids for each in adapter.sample(model, processor, samples, 2, 3, {COLD})])
print("expected, each twice", greedy_alone(double(tiny("{kind}")[0]), processor, samples, 3))"""


@contract(
    "sample/prompt",
    "sample",
    source="Model: at a low temperature, sampling is the choice of the most probable token",
    tolerance="0; the most probable token has a probability above 1 - 1e-8",
    cases=kind_cases,
    reproduce=prompt_script,
)
def prompt(adapter: Adapter, kind: str) -> None:
    """The completions of a prompt follow from its own text and images, and are returned in the order of prompts."""
    model, processor = tiny(kind, adapter.device)
    samples = greedy_samples(kind)
    right = greedy_alone(*exact(kind), samples, 3)
    for index, completion in enumerate(adapter.sample(model, processor, samples, 2, 3, COLD)):
        if [*completion.sampled_ids] != right[index // 2]:
            raise Violation(
                f"completion {index}, of prompt {index // 2}, is {[*completion.sampled_ids]}, expected {right[index // 2]},"
                " the most probable tokens"
            )


EITHER: Script = {None: ("a", "y")}
ONE: Script = {None: ("a",)}


def differ_script(kind: str) -> str:
    return sample_script(kind, EITHER, 8, 8, "different completions of each prompt")


@contract(
    "sample/different",
    "sample",
    source=SCRIPT,
    tolerance="0; a sampler passes with a probability of 1 - 2**-55",
    cases=kind_cases,
    reproduce=differ_script,
)
def different(adapter: Adapter, kind: str) -> None:
    """The completions of a prompt are sampled independently: 8 of 8 tokens, each one of two, are not all equal."""
    out = adapter.sample(*scripted(kind, EITHER, adapter.device), prompts_of(kind), 8, 8, 1.0)
    for index in range(len(prompts_of(kind))):
        rows = {tuple(completion.sampled_ids) for completion in out[8 * index : 8 * index + 8]}
        if len(rows) == 1:
            raise Violation(f"all 8 completions of prompt {index} are {[*rows.pop()]}, expected different ones")


def trained_script(kind: str) -> str:
    return f"""\
model, processor = scripted("{kind}", {ONE!r}, adapter.device)
samples = {list(prompts_of(kind))!r}
before = adapter.sample(model, processor, samples, 2, 4, 1.0)
model.load_state_dict(scripted("{kind}", {dict.fromkeys(ONE, ("y",))!r})[0].state_dict())
print("got", adapter.sample(model, processor, samples, 2, 4, 1.0))
print("expected", "{[*token_ids(*"yyyy")]} four times")"""


@contract("sample/trained", "sample", source=SCRIPT, tolerance=EXACT, cases=kind_cases, reproduce=trained_script)
def trained(adapter: Adapter, kind: str) -> None:
    """After a step of the optimizer, completions are sampled from the new weights."""
    model, processor = scripted(kind, ONE, adapter.device)
    adapter.sample(model, processor, prompts_of(kind), 2, 4, 1.0)
    model.load_state_dict(scripted(kind, dict.fromkeys(ONE, ("y",)))[0].state_dict())
    right = [*token_ids(*"yyyy")]
    for index, completion in enumerate(adapter.sample(model, processor, prompts_of(kind), 2, 4, 1.0)):
        if [*completion.sampled_ids] != right:
            raise Violation(f"completion {index} is {[*completion.sampled_ids]}, expected {right}, as the new weights say")
