"""Rewards of answers about images: pure functions of predictions and references, and the composition of a run's rewards.

| module | what it holds |
| --- | --- |
| ``answers`` | finding the answer in a completion, and reading it |
| ``text`` | words, options, yes and no, numbers, counts, formulas, charts, OCR |
| ``boxes``, ``detection`` | a box or point, and its frame; sets of boxes |
| ``length``, ``hallucination``, ``alignment`` | tokens of a completion, objects of a caption, CLIPScore |
| ``judge`` | an endpoint's model, a reward model |
| ``builtin`` | all of these by name, with the trainer's signature |
| ``compose`` | the rewards of a run: weights, time-outs, errors |

Torch and NumPy alone are imported here; torchvision, rapidfuzz, scipy, math-verify (the extra ``rewards``) and transformers
where they are used.
"""

from vlmkernels.rewards.batch import Unparsed
from vlmkernels.rewards.builtin import NAMES
from vlmkernels.rewards.compose import Rewards, Scores

__all__ = ["NAMES", "Rewards", "Scores", "Unparsed"]
