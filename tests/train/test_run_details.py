"""What ``run.json`` says about rewards and data of every kind, and the hash of a dataset's rows."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from support import tiny
from support.training import config, length_reward

from vlmkernels.rewards import Rewards
from vlmkernels.train import GRPOTrainer
from vlmkernels.train.processes import digest_rows
from vlmkernels.train.run_details import run_details


def scaled(completions, scale=1.0, **kwargs):
    return [scale] * len(completions)


class Scored:
    """A reward with the attributes that it is given."""

    __name__ = "scored"

    def __init__(self, **options):
        self.__dict__.update(options, _private=1)

    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


class Slotted:
    __slots__ = ("scale",)
    __name__ = "slotted"

    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (partial(partial(scaled, scale=1.0), scale={"a": (1, None)}), {"scale": {"a": [1, None]}}),
        (lambda completions, **kwargs: [0.0] * len(completions), {}),
        (Slotted(), {}),
        (Scored(judge=torch.nn.Linear(2, 2), parse=len), {"judge": "torch.nn.modules.linear:Linear", "parse": "builtins:len"}),
        (Scored(names={"b", "a"}, pattern=re.compile("x+")), {"names": ["a", "b"], "pattern": "x+"}),
        (Scored(table=list(range(100))), {"table": [*range(32), "... 68 more"]}),
        (Scored(text="x" * 600), {"text": "x" * 512 + "... 88 more"}),
        (Scored(dtype=torch.float32), {"dtype": "torch.float32"}),
    ],
    ids=["nested partial", "lambda", "slots", "objects", "set and pattern", "long list", "long text", "dtype"],
)
def test_options_of_rewards(function, options):
    described = run_details(None, None, {}, Rewards([function], None), torch.nn.Linear(1, 1))["rewards"]
    assert described[0]["options"] == options
    assert json.loads(json.dumps(described)) == described


def test_large_dicts_are_cut():
    rewards = Rewards([Scored(words={str(index): index for index in range(100)})], None)
    words = run_details(None, None, {}, rewards, torch.nn.Linear(1, 1))["rewards"][0]["options"]["words"]
    assert len(words) == 33
    assert words["..."] == "68 more"


class Files(torch.utils.data.Dataset):
    """A dataset that reads its rows itself, and counts."""

    def __init__(self, bad=()):
        self.rows, self.bad, self.num_reads = tiny.rows(200), bad, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.num_reads += 1
        if index in self.bad:
            raise OSError("no such image")
        return self.rows[index]


def test_a_dataset_that_reads_files_is_read_once_and_may_have_bad_rows(tmp_path):
    data = Files(bad=(3, 1))
    options = {"on_bad_sample": "skip"}
    trainer = GRPOTrainer(tiny.vlm(), length_reward, config(tmp_path, **options), data, processing_class=tiny.processor())
    assert trainer.samples.bad.keys() == {1, 3}
    assert data.num_reads < 2 * len(data) + 300  # all rows for the checks, and some for two hashes


def test_the_hash_of_rows_is_the_same_in_every_process():
    """Images in a prompt have another address in each process."""

    def rows(text):
        content = [{"type": "image", "image": image} for image in (tiny.image(0), np.zeros((4, 4)))]
        return [{"prompt": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]}]

    assert digest_rows(rows("a")) == digest_rows(rows("a")) != digest_rows(rows("b"))
