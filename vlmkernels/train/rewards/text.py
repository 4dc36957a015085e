"""Rewards that compare a completion's text with the column ``answer``."""


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, given as text or as messages."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def exact_match(completions, answer, **kwargs) -> list[float]:
    """1 where the completion is the answer, surrounding white space aside, else 0."""
    return [float(completion_text(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def cer(completions, answer, **kwargs) -> list[float]:
    """1 - min(1, character error rate), the rate being the edit distance over the length of the answer."""
    from rapidfuzz.distance import Levenshtein

    scores = []
    for completion, truth in zip(completions, answer, strict=True):
        text, truth = completion_text(completion).strip(), str(truth).strip()
        scores.append(1 - min(1.0, Levenshtein.distance(text, truth) / max(len(truth), 1)))
    return scores
