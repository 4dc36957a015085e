"""Trajectories with given results of tools."""

import copy
import random

import torch

from support import tiny_families
from support.trees import segments_of
from vlmkernels.models.families import family_of


class Observation:
    def __init__(self, inputs):
        self.inputs = inputs


class ScriptedEpisodes:
    """Tools that return given model inputs, in random order and after random numbers of polls.

    Args:
        group: the prompt of each trajectory.
        results: for each trajectory the model inputs of its results, one after each turn.
    """

    def __init__(self, group, results, seed=0):
        self.group, self.results = torch.tensor(group), results
        self.turns = [[] for _ in group]
        self.refused, self.running, self.rng = [], {}, random.Random(seed)

    def end_turn(self, k, ids, ended):
        self.turns[k].append(ids)
        number = len(self.turns[k])
        if not ended or number > len(self.results[k]):
            return False
        self.running[k] = self.rng.randrange(4)
        return True

    def ready(self, wait):
        done = [k for k, polls in self.running.items() if polls == 0]
        if wait and not done:
            done = [min(self.running, key=self.running.get)] if self.running else []
        self.running = {k: max(polls - 1, 0) for k, polls in self.running.items() if k not in done}
        self.rng.shuffle(done)
        return [(k, Observation(self.results[k][len(self.turns[k]) - 1])) for k in done]

    def refuse(self, k):
        self.refused.append(k)


def sample_of(segments, index):
    """One segment without padding."""
    one = segments.select(torch.tensor([index]))
    mask = one.inputs["attention_mask"][0].bool()
    per_token = [name for name in one.inputs if segments.family.axis(name) == "token"]
    one.inputs.update({name: one.inputs[name][:, mask] for name in per_token})
    return one


def media_tokens(model):
    ids = [getattr(model.config, f"{kind}_token_id", None) for kind in ("image", "video")]
    return [token for token in ids if token is not None]


def setting(name, images=True):
    """A model, two prompts, the trajectories' prompts and their results: of several turns, with images, and none."""
    case = tiny_families.case(name)
    count = len(case.samples)
    spans = family_of(case.model.config).bidirectional
    with_images = images and not (spans is not None and spans.linked)
    chosen = [1, 0, *(range(count) if with_images else [0, 0])]
    segments = segments_of(name, chosen)
    if name.startswith("paligemma"):
        segments.inputs["token_type_ids"][1] = 0
    prompts = segments.select(torch.tensor([0, 1]))
    results = [sample_of(segments, 2 + k) for k in range(len(chosen) - 2)]
    group = [0, 0, 0, 1, 1]
    return (
        copy.deepcopy(case.model).eval(),
        prompts,
        group,
        [[results[0], results[-1]], [results[-1]], [], [results[-1], results[0]], [results[0]]],
    )


def vocabulary_ends(model):
    """Half of the text tokens end a turn, so that turns of a random model are short."""
    size = model.config.get_text_config().vocab_size
    return [token for token in range(size) if random.Random(token).random() < 0.3]
