"""Rollout engines that stand in for sampling."""

from vlmkernels.rollout.base import Engine


class FunctionEngine(Engine):
    """Calls ``function(model, prompts, num_generations, temperature)`` for the completions."""

    def __init__(self, function, shares_prefix: bool = False):
        self.function, self.shares_prefix = function, shares_prefix

    def __call__(self, model, prompts, num_generations, temperature, samples=None):
        return self.function(model, prompts, num_generations, temperature)
