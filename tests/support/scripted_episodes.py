"""Tools with given results, for decoding of several turns."""

import random

import torch


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
