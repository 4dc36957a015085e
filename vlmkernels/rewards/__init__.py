"""Rewards of answers about images: pure functions of predictions and references, and how a run's rewards are composed.

| module | what it scores |
| --- | --- |
| ``answers`` | nothing: it finds answers in completions |
| ``text`` | words, options, yes and no, numbers, counts, formulas, charts, OCR |
| ``boxes``, ``detection`` | a box or point, sets of boxes |
| ``length``, ``hallucination`` | tokens of a completion, objects of a caption |

Torch and numpy alone are imported here; torchvision, rapidfuzz, scipy and math-verify where they are used (the extra
``rewards``).
"""
