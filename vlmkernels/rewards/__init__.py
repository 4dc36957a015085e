"""Reward functions for answers about images, and how a run combines them.

| module | purpose |
| --- | --- |
| ``signature`` | the interface of reward functions |
| ``answers`` | find the answer in a completion, and parse it |
| ``text`` | score text, option letters, yes or no, numbers, counts, formulas, chart answers, OCR |
| ``boxes``, ``detection`` | score one box or point, convert coordinate frames; score sets of boxes |
| ``length``, ``hallucination``, ``alignment`` | score the length, the objects in a caption, image-text alignment |
| ``judge`` | score with an LLM judge or a reward model |
| ``formula_equality`` | compare formulas, in a process |
| ``batch`` | shared code of the scoring functions |
| ``builtin`` | the built-in reward functions, by name |
| ``compose`` | the reward functions of a run: names, weights, options |
| ``calls`` | call reward functions with time limits, and attribute errors to completions |
| ``workers`` | threads and processes that call a function with a time limit |

``import vlmkernels.rewards`` needs only torch and NumPy. The rewards that use torchvision, rapidfuzz, scipy, math-verify (the
extra ``rewards``) or transformers import them on first use.
"""

from vlmkernels.rewards.batch import Unparsed
from vlmkernels.rewards.builtin import NAMES
from vlmkernels.rewards.compose import Rewards, Scores
from vlmkernels.rewards.signature import RewardFunction

__all__ = ["NAMES", "RewardFunction", "Rewards", "Scores", "Unparsed"]
