"""Tools and environments that fail, and arguments that cannot be used, at the level of the trainer."""

import copy
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support import tool_models
from support.tool_models import Microscope, picture, tool_model
from support.tool_runs import GREEDY, OPTIONS, Seen, build, logs_of, per_turn, texts
from support.training import config
from transformers import TrainerCallback

from vlmkernels.rewards import answers
from vlmkernels.train import GRPOTrainer

torch.set_num_threads(1)
ENVIRONMENT = {"environment_factory": Microscope}


@pytest.fixture(scope="module")
def made():
    return tool_model("qwen2_5_vl")


# ---- Tools that fail ----


class Unprintable:
    def __str__(self):
        raise ValueError("it has no text")


def hang(index):
    time.sleep(1000)


# What the tool does in each step, and the result of its first call in the conversation; None: it is refused.
ACTS = {
    "as usual": (tool_models.zoom, ["crop 0", (32, 32)]),
    "raises": (lambda index: {}[f"no {index}"], "'no 0'"),
    "hangs": (hang, "zoom returned no result within 1 s"),
    "ends its process": (lambda index: os._exit(3), "the process of zoom ended with exit code 3"),
    "is killed": (lambda index: os.kill(os.getpid(), signal.SIGKILL), "the process of zoom was killed by SIGKILL"),
    "large image": (
        lambda index: Image.new("RGB", (65, 64)),
        "result[0] is not an image that can be used: image must have at most 4096 pixels (max_image_pixels), got 65 x 64",
    ),
    "100 images": (lambda index: [picture(0)] * 100, "result must have at most 16 images, got 100"),
    "nothing": (lambda index: None, ["None"]),
    "an empty list": (lambda index: [], [""]),
    "a number": (lambda index: 3.5, ["3.5"]),
    "a path": (lambda index: "/nowhere.png", ["/nowhere.png"]),
    "no image": (
        lambda index: {"type": "image", "image": "/nowhere.png"},
        "result[0] is not an image that can be used: [Errno 2] No such file or directory: '/nowhere.png'",
    ),
    "no text": (lambda index: Unprintable(), "it has no text"),
    "placeholder": (lambda index: "<|image_pad|>", "the result cannot be encoded"),
    "longer than the budget": (lambda index: "x " * 500, None),
}
# What is replaced in the model's turns before they are parsed.
CALLS = {
    "malformed call": ("}}", "hm "),
    "unknown tool": ("zoom", "describe"),
    "unknown argument": ("index", "where"),
    "endless calls": ("", ""),
}


class Act(TrainerCallback):
    """Selects what happens in each step. The tool reads it from a file."""

    def __init__(self, path, acts):
        self.path, self.acts = path, list(acts)

    def on_step_begin(self, args, state, control, **kwargs):
        self.path.write_text(self.acts[state.global_step])


@pytest.fixture(scope="module")
def acts(made, tmp_path_factory):
    """For each of ``ACTS`` and ``CALLS`` what the reward got, the log and the rollout of a step of four greedy trajectories."""
    folder = tmp_path_factory.mktemp("acts")
    path, names = folder / "act", [*ACTS, *CALLS]

    def zoom(index: int) -> list:
        """Return a part of the image.

        Args:
            index: which part.
        """
        return ACTS.get(path.read_text(), ACTS["as usual"])[0](index)

    seen, rollouts, tokenizer = Seen(), [], made.processor.tokenizer

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            rollouts.append(trainer._experience.rollout)

    limits = {"max_image_pixels": 64 * 64, "tool_timeout": 1.0, "max_tool_calling_iterations": 2}
    callbacks = [Act(path, names), Keep()]
    trainer = build(folder, made, seen, made.rows[:1], {"tools": [zoom]}, callbacks, max_steps=len(names), **limits, **GREEDY)
    parse = trainer.agent.parser

    def parser(ids, *arguments):
        act, text = path.read_text(), tokenizer.decode(ids)
        if act == "endless calls":
            text = '<tool_call>\n{"name": "zoom", "arguments": {"index": 0}}\n</tool_call><|im_end|>'
        return parse(tokenizer(text.replace(*CALLS.get(act, ("", ""))), add_special_tokens=False)["input_ids"], *arguments)

    trainer.agent.parser = parser
    trainer.train()
    return dict(zip(names, zip(seen.calls, logs_of(trainer), rollouts, strict=True), strict=True))


@pytest.mark.parametrize("act", ACTS)
def test_a_tool_that_fails_is_told_to_the_model(acts, act):
    expected = ACTS[act][1]
    call, log, rollout = acts[act]
    conversations = [texts(messages) for messages in call["completions"]]
    assert all(messages == conversations[0] for messages in conversations)  # greedy: equal, each after its own failure
    if expected is None:
        assert [role for role, _ in conversations[0]] == ["assistant"]
        assert (log["tools/refused"], log["completions/clipped_ratio"]) == (1, 1)
        assert rollout.sampled_mask.equal(rollout.completion_mask)
        return
    failed = isinstance(expected, str)
    assert conversations[0][1] == ("tool", [str({"error": expected})] if failed else expected)
    assert log["tools/call_frequency"] >= 1
    assert log["tools/failure_frequency"] == log["tools/zoom/failures"] == failed
    turns = sum(role == "assistant" for role, _ in conversations[0])
    assert log["tools/turns/mean"] == log["tools/turns/max"] == turns == rollout.turns.num_turns
    assert log["tools/lost_environments"] == 0


def test_malformed_calls_and_calls_of_unknown_tools_fail(acts):
    found = {act: texts(acts[act][0]["completions"][0])[1][1][0] for act in CALLS}
    assert "a tool call must be valid JSON" in found["malformed call"]
    assert found["unknown tool"] == str({"error": "there is no tool 'describe', the tools are zoom"})
    assert found["unknown argument"] == str({"error": "zoom has no argument 'where', its arguments are index"})
    for act in ("malformed call", "unknown tool", "unknown argument"):
        log = acts[act][1]
        assert log["tools/failure_frequency"] == 1, act
    assert acts["unknown tool"][1]["tools/unknown/calls"] == acts["unknown tool"][1]["tools/call_frequency"]
    assert acts["unknown argument"][1]["tools/zoom/failures"] == 1


def test_calls_beyond_the_limit_are_not_run(acts):
    call, log, rollout = acts["endless calls"]
    for messages in call["completions"]:
        assert [m["role"] for m in messages] == ["assistant", "tool", "assistant", "tool", "assistant"]
        assert all("tool_calls" in m for m in messages[::2])
    assert (log["tools/call_frequency"], log["tools/turns/mean"], log["tools/refused"]) == (2, 3, 0)
    assert log["completions/clipped_ratio"] == 0
    assert not rollout.truncated.any()


def test_images_that_run_are_counted_once_per_shared_beginning(acts):
    """Four equal trajectories with one image each in the prompt and in both results."""
    log = acts["as usual"][1]
    assert log["images_run"] == 3 + 3  # in sampling and in training
    assert log["images_if_unshared"] == 2 * 4 * 3


CHANGED = []


def test_tools_cannot_change_the_process_of_the_trainer(made, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    monkeypatch.setenv("VLMK_TEST_TOOL", "trainer")

    def zoom(index: int) -> str:
        """Change whatever a reward may depend on.

        Args:
            index: which part.
        """
        CHANGED.append(index)
        answers.text_of = lambda messages: "everything is right"
        os.environ["VLMK_TEST_TOOL"] = "tool"
        Seen.__call__ = lambda self, completions, **kwargs: [100.0] * len(completions)
        torch.manual_seed(1)
        os.chdir("/")
        with open(pids, "a") as file:
            file.write(f"{os.getpid()} {os.getppid()}\n")
        return "crop"

    original, folder, seen = answers.text_of, os.getcwd(), Seen()
    trainer = build(tmp_path, made, seen, tools={"tools": [zoom]}, **GREEDY)
    trainer.train()
    written = {int(pid) for pid in pids.read_text().split()}
    assert written
    assert os.getpid() not in written
    assert logs_of(trainer)[0]["reward"] == 1.5
    assert (CHANGED, answers.text_of, os.environ["VLMK_TEST_TOOL"], os.getcwd()) == ([], original, "trainer", folder)


def test_other_trajectories_go_on_while_a_tool_runs(made, tmp_path):
    """The first call ends only after the other seven trajectories have made their two calls, in two slots."""

    def zoom(index: int) -> list:
        """Return a part of the image.

        Args:
            index: which part.
        """
        try:
            os.close(os.open(tmp_path / "first", os.O_CREAT | os.O_EXCL))
            while len(list(tmp_path.glob("call *"))) < 14:
                time.sleep(0.01)
        except FileExistsError:
            (tmp_path / f"call {time.monotonic_ns()} {os.getpid()}").touch()
        return tool_models.zoom(index)

    seen = Seen()
    options = {"per_device_train_batch_size": 8, "num_generations": 8, "max_num_seqs": 2, "tool_timeout": 60.0, **GREEDY}
    trainer = build(tmp_path, made, seen, made.rows[:1], {"tools": [zoom]}, **options)
    trainer.train()
    expected = [("tool", ["crop 0", (32, 32)]), ("tool", ["crop 1", (64, 32)])]
    assert [texts(messages)[1::2] for messages in seen.calls[0]["completions"]] == [expected] * 8
    log = logs_of(trainer)[0]
    assert (log["tools/failure_frequency"], log["completions/clipped_ratio"]) == (0, 0)


# ---- Environments ----


class Fragile(Microscope):
    """The first of several environments to be called is lost in its first call."""

    once = ""  # a file

    def zoom(self, index: int) -> list:
        """Return a part of the image.

        Args:
            index: which part.
        """
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().zoom(index)
        time.sleep(1000)


def fragile(path, **members):
    return {"environment_factory": type("Fragile", (Fragile,), {"once": str(path / "once"), **members})}


def test_a_lost_environment_is_not_scored(made, tmp_path):
    seen = Seen()
    options = {"tool_timeout": 1.0, "reward_weights": [1.0], **GREEDY}  # the environment's own reward has weight 1
    trainer = build(tmp_path, made, seen, made.rows[:1], fragile(tmp_path), **options)
    trainer.train()
    (call,), log = seen.calls, logs_of(trainer)[0]
    assert [e.calls for e in call["environments"]] == [2, 2, 2]
    assert [len(messages) for messages in call["completions"]] == [5, 5, 5]
    assert log["tools/lost_environments"] == 0.25
    # The rewards of the others are 0 + 2, 1 + 2 and 2 + 2.
    expected = iter([-1 / 1.0001, 0, 1 / 1.0001])
    rewards, advantages = trainer._last_scored[0].scores.rewards, trainer._experience.advantages
    lost = rewards.isnan().all(1).tolist()
    assert sum(lost) == 1
    assert advantages.tolist() == pytest.approx([0 if is_lost else next(expected) for is_lost in lost], abs=1e-6)
    assert (log["reward"], log["reward_std"], log["rewards/Fragile/mean"], log["rewards/seen/mean"]) == (3, 1, 2, 1)


def test_a_step_in_which_all_environments_are_lost(made, tmp_path):
    """No reward function is called, and nothing is learned."""

    class Lost(Microscope):
        def zoom(self, index: int) -> list:
            """End.

            Args:
                index: which part.
            """
            os._exit(1)

    seen, before = Seen(), {key: x.clone() for key, x in made.model.state_dict().items()}
    trainer = build(tmp_path, made, seen, made.rows[:1], {"environment_factory": Lost}, top_k=1)
    trainer.train()
    log = logs_of(trainer)[0]
    assert seen.calls == []
    assert (log["tools/lost_environments"], log["loss"], log["grad_norm"], log["reward"]) == (1, 0, 0, None)
    assert all(x.equal(before[key]) for key, x in trainer.policy.state_dict().items())


def test_a_lost_environment_with_more_turns_than_all_others(made, tmp_path):
    """The rewards of turns have fewer columns than the rollout has turns."""

    def zoom(self, index: int) -> str:
        """Return a part of the image.

        Args:
            index: which part.
        """
        try:
            os.close(os.open(self.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return "x " * 500  # does not fit
        os._exit(1)

    trainer = build(tmp_path, made, per_turn, made.rows[:1], fragile(tmp_path, zoom=zoom), **GREEDY)
    trainer.train()
    experience = trainer._experience
    turns = experience.rollout.turns
    (lost,) = (k for k in range(4) if len(turns.members[k]) > 1)
    assert not experience.advantages[lost].any()
    others = [k for k in range(4) if k != lost]
    for advantage, k in zip((-1 / 1.0001, 0, 1 / 1.0001), others, strict=True):  # rewards 0, 1, 2
        mask = experience.rollout.sampled_mask[k]
        assert experience.advantages[k][mask].tolist() == pytest.approx([advantage] * int(mask.sum()), abs=1e-6)


def raise_error(self, **row):
    raise KeyError("no level")


RESETS = {
    "raises": (raise_error, "the environment could not be reset: .*KeyError: 'no level'"),
    "hangs": (lambda self, **row: hang(0), "the environment could not be reset: reset returned no result within 0.5 s"),
    "returns a number": (lambda self, **row: 3, "reset must return None, a string or a list of content blocks, got 3"),
}


@pytest.mark.parametrize("name", RESETS)
def test_a_reset_that_fails_ends_the_run_with_its_reason(made, tmp_path, name):
    """Afterwards the trainer still works."""
    reset, message = RESETS[name]
    fails = tmp_path / "fails"
    fails.touch()

    def reset_or_fail(self, **row):
        return reset(self, **row) if fails.exists() else Microscope.reset(self)

    tools = {"environment_factory": type("Reset", (Microscope,), {"reset": reset_or_fail})}
    trainer = build(tmp_path, made, Seen(), made.rows[:1], tools, tool_timeout=0.5, **GREEDY)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        trainer.train()
    fails.unlink()
    trainer.train()
    assert logs_of(trainer)[0]["rewards/Reset/mean"] == 2


class Owner(Microscope):
    """An environment that owns the data: its observation is the whole prompt."""

    def reset(self, **row):
        self.calls, self.level = 0, random.randrange(4)
        return [{"type": "image", "image": picture(self.level)}, {"type": "text", "text": f"look {self.level}"}]


LEVELS = [{"level": k} for k in range(3)]
DATA = {
    "no dataset": None,
    "rows without prompts": LEVELS,
    "Dataset without prompts": Dataset.from_list(LEVELS),
}


@pytest.mark.parametrize("name", DATA)
def test_an_environment_owns_the_data(made, tmp_path, name):
    """Without reward functions; the trajectories of a group draw the same observation in ``reset``."""
    data = DATA[name]
    args = config(tmp_path, **OPTIONS, eval_strategy="steps", eval_steps=1, num_generations_eval=2)
    trainer = GRPOTrainer(
        copy.deepcopy(made.model),
        args=args,
        train_dataset=data,
        eval_dataset=LEVELS if data is None else {"levels": data},
        processing_class=made.processor,
        environment_factory=Owner,
    )
    trainer.train()
    rollout, (scored, *_) = trainer._experience.rollout, trainer._last_scored
    levels = [episode.environment.level for episode in scored.episodes]
    assert len(levels) == 4
    assert len({*levels}) == len(rollout.prompts) == 1
    for k, sample in enumerate(scored.samples):
        (message,) = sample.prompt
        assert message["content"][-2:] == [{"type": "image"}, {"type": "text", "text": f"look {levels[k]}"}]
        assert np.array_equal(sample.images[0], picture(levels[k]))
    prompts = rollout.prompts.select(rollout.group)
    assert len({tuple(row.tolist()) for row in prompts.inputs["input_ids"]}) == len({*levels})
    calls = [float(episode.environment.calls) for episode in scored.episodes]
    assert scored.scores.rewards[:, 0].tolist() == calls
    evaluated = [log for log in trainer.state.log_history if any(key.startswith("eval") for key in log)]
    prefix = "eval" if data is None else "eval_levels"
    assert evaluated[0][f"{prefix}_rewards/Owner/mean"] == pytest.approx(evaluated[0][f"{prefix}_tools/zoom/calls"])


def test_a_mapping_of_environments(made, tmp_path):
    class Tired(Microscope):
        """Only one call."""

        def zoom(self, index: int) -> str:
            """Return a part of the image.

            Args:
                index: which part.
            """
            super().zoom(index)
            return "saw "

    rows = [row | {"environment": "tired" if k % 2 else "usual"} for k, row in enumerate(made.rows)]
    seen, tools = Seen(), {"environment_factory": {"usual": Microscope, "tired": Tired}}
    trainer = build(tmp_path, made, seen, rows, tools, steps_per_generation=2, **GREEDY)
    trainer.train()
    kinds = [type(e) for e in seen.calls[0]["environments"]]
    assert kinds == [Microscope] * 4 + [Tired] * 4
    log = logs_of(trainer)[0]
    results = [m["content"] for c in seen.calls[0]["completions"][4:] for m in c if m["role"] == "tool"]
    assert {*results} == {"saw "}
    assert (log["rewards/Microscope/mean"], log["rewards/Tired/mean"]) == (2, len(results) / 4)


# ---- Arguments ----

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
REFUSED = {
    "string prompt": ({"rows": [{"prompt": "look 0"}]}, "train_dataset: sample 0: prompt must be a conversation"),
    "wrong environment": (
        {
            "rows": [{"prompt": [{"role": "user", "content": "look 0"}], "environment": "scop"}],
            "tools": {"environment_factory": {"scope": Microscope}},
        },
        r"train_dataset: sample 0: the column environment must be one of scope, .*, got 'scop' \(did you mean scope\?\)",
    ),
    "wrong environment in eval_dataset": (
        {
            "rows": [{"prompt": [{"role": "user", "content": "look 0"}], "environment": "scope"}],
            "eval_dataset": {"all": [{"prompt": [{"role": "user", "content": "look 0"}]}]},
            "tools": {"environment_factory": {"scope": Microscope}},
        },
        r"eval_dataset\['all'\]: sample 0: the column environment must be one of scope",
    ),
    "no prompt without an environment": ({"rows": LEVELS}, "train_dataset must have a column 'prompt'"),
    "no time": ({"tool_timeout": 0.0}, "timeout must be a finite number > 0, got 0.0"),
    "negative limit": ({"max_tool_calling_iterations": -1}, "max_tool_calling_iterations must be >= 0, got -1"),
    "format": ({"tool_format": "xnl"}, "tool_format must be one of .*, got 'xnl'"),
    "one name twice": ({"tools": {"tools": [tool_models.zoom], **ENVIRONMENT}}, "two are named 'zoom'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(made, tmp_path, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build(tmp_path, made, Seen(), **options)


def test_data_that_is_missing_is_refused(made, tmp_path):
    def trainer(**arguments):
        options = {**OPTIONS, **arguments.pop("options", {})}
        arguments = {"args": config(tmp_path, **options), "processing_class": made.processor, **arguments}
        return GRPOTrainer(copy.deepcopy(made.model), **arguments)

    with pytest.raises(ValueError, match="max_steps must be > 0 without train_dataset, got -1"):
        trainer(options={"max_steps": -1}, **ENVIRONMENT)
    with pytest.raises(ValueError, match="train_dataset must be given with several environments"):
        trainer(environment_factory={"scope": Microscope})
    with pytest.raises(ValueError, match="reward_funcs must be given without a teacher or an environment that has"):
        trainer(train_dataset=made.rows, tools=[made.tool])
    without_data = trainer(reward_funcs=Seen(), tools=[made.tool])
    with pytest.raises(ValueError, match="train_dataset must be given to train, got None"):
        without_data.train()


def test_a_chat_template_without_tools_is_refused(made, tmp_path):
    processor = copy.deepcopy(made.processor)
    processor.chat_template = processor.tokenizer.chat_template = PLAIN
    rows = [{"prompt": row["prompt"]} for row in made.rows]
    args = config(tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="chat_template must write the tool_calls of the assistant"):
        GRPOTrainer(copy.deepcopy(made.model), Seen(), args, rows, None, processor, tools=[made.tool])


def test_rows_that_cannot_be_used_with_tools_are_skipped(made, tmp_path):
    """One row has no environment, and one a prompt that is too long with the observation of its environment."""

    class Talkative(Microscope):
        def reset(self, words=1, **row):
            self.calls = 0
            return "saw " * words

    rows = [row | {"environment": "talk", "words": 40 if k == 1 else 1} for k, row in enumerate(made.rows)]
    rows[0] = made.rows[0]
    seen = Seen()
    options = {"on_bad_sample": "skip", "max_prompt_length": 40, "steps_per_generation": 3, "max_steps": 3, **GREEDY}
    trainer = build(tmp_path, made, seen, rows, {"environment_factory": {"talk": Talkative}}, **options)
    trainer.train()
    assert [row[0]["content"] for row in seen.calls[0]["prompts"][::4]] == ["look 2saw "] * 3
    assert logs_of(trainer)[0]["frac_samples_replaced"] == pytest.approx(2 / 3)
