"""Scores of VLMEvalKit as its source defines them (commit e8e78f0), for comparisons without its installation.

The names are those of the files and functions of VLMEvalKit. Its judge is ``exact_matching``.
"""

import ast
import re

import numpy as np

from support.harnesses import answer_processor


def accepted(answer) -> list[str]:
    """``process_line`` evaluates an answer that looks like a list."""
    try:
        value = ast.literal_eval(str(answer))
    except (ValueError, SyntaxError):
        value = None
    return [str(one) for one in value] if isinstance(value, list) else [str(answer)]


def process_punctuation(text: str) -> str:
    """smp/misc.py. The third argument of ``sub`` there is the count, and ``re.UNICODE`` is 32."""
    thousands = re.search("[0-9٠-٩０-９],[0-9٠-٩０-９]", text)
    out = text
    for mark in [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]:
        next_to_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "") if next_to_space or thousands else out.replace(mark, " ")
    kept, removed = "", 0
    for place, character in enumerate(out):
        before, after = out[place - 1 : place], out[place + 1 : place + 2]
        if character == "." and removed < 32 and not before.isdecimal() and not after.isdecimal():
            removed += 1
        else:
            kept += character
    return kept


def process_answer(text: str) -> str:
    """utils/vqa_eval.py. Its table of words is that of the VQA evaluation, which lmms-eval has as well."""
    text = process_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    return answer_processor().process_digit_article(text)


def vqa_score(prediction: str, people: list[str]) -> float:
    """utils/vqa_eval.py: the mean over people."""
    ours, theirs = process_answer(prediction), [process_answer(one) for one in people]
    shares = [min(1, sum(one == ours for j, one in enumerate(theirs) if j != i) / 3) for i in range(len(theirs))]
    return sum(shares) / len(shares)


def _distance(a: str, b: str) -> int:
    """Levenshtein distance by rows; a prefix minimum replaces the loop over insertions."""
    if not a or not b:
        return max(len(a), len(b))
    letters, steps = np.array(list(b)), np.arange(len(b) + 1)
    row = steps
    for i, letter in enumerate(a, 1):
        best = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def anls(prediction: str, answer) -> float:
    """utils/vqa_eval.py: ``anls_compute`` and the threshold of ``hit_calculate``."""
    shares = []
    for one in accepted(answer):
        length = max(len(one.upper()), len(prediction.upper()))
        distance = _distance(" ".join(one.strip().lower().split()), " ".join(prediction.strip().lower().split()))
        shares.append(distance / length if length else 0.0)
    return 0.0 if 1 - min(shares) < 0.5 else 1 - min(shares)


def _number(text: str) -> float | None:
    percent = text[-1:] == "%"
    try:
        return float(text.rstrip("%")) / 100.0 if percent else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, answer) -> float:
    """utils/vqa_eval.py: ``relaxed_correctness``; the best of several answers counts."""
    prediction, hits = prediction.strip(), []
    for one in accepted(answer):
        ours, theirs = _number(prediction), _number(one)
        compared = ours is not None and theirs is not None and theirs != 0
        hits.append(abs(ours - theirs) / abs(theirs) <= 0.05 if compared else prediction.lower() == one.lower())
    return float(any(hits))


def accuracy(prediction: str, answer) -> float:
    """utils/vqa_eval.py, of GQA and OCRVQA."""
    return float(prediction.strip().lower() in [one.strip().lower() for one in accepted(answer)])


def yes_or_no(prediction: str) -> str:
    """utils/yorn.py: ``YOrN_Extraction``."""
    words = process_punctuation(prediction.lower()).split()
    return {(True, False): "Yes", (False, True): "No"}.get(("yes" in words, "no" in words), "Unknown")


def pope(predictions: list[str], answers: list[str]) -> dict[str, float]:
    """utils/yorn.py: ``POPE_rating``, as shares. What is unknown counts as not yes."""
    said = np.array([yes_or_no(one) == "Yes" for one in predictions])
    true = np.array([one.capitalize() == "Yes" for one in answers])
    precision, recall = (said & true).sum() / max(said.sum(), 1), (said & true).sum() / max(true.sum(), 1)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    correct = [yes_or_no(one) == answer.capitalize() for one, answer in zip(predictions, answers, strict=True)]
    return {"accuracy": np.mean(correct), "precision": precision, "recall": recall, "f1": f1}


def mme(correct: list[bool], categories: list[str], images: list[str]) -> float:
    """utils/yorn.py: ``MME_rating``, summed over all categories."""
    total = 0.0
    for category in set(categories):
        places = [i for i, name in enumerate(categories) if name == category]
        pairs: dict[str, list[bool]] = {}
        for i in places:
            pairs.setdefault(images[i], []).append(correct[i])
        total += 100 * np.mean([correct[i] for i in places]) + 100 * np.mean([all(pair) for pair in pairs.values()])
    return total


def can_infer(answer: str, choices: dict[str, str]) -> str | None:
    """utils/matching_util.py: ``can_infer``. None stands for False, and for "Z", which is no option."""
    words = "".join(" " if character in ".()[],:;!*#{}" else character for character in answer).split()
    refused = (
        "help with images of people yet",
        "I can't process this file.",
        "but without the image provided",
        "determine the answer",
    )
    if "Failed to obtain answer via API" not in answer:
        whole = ("Sorry, I can't {}.", "{}", "I'm sorry, {}", "Cannot {}")
        if any(form.format(text) in answer for form, text in zip(whole, refused, strict=True)):
            return None
        named = [letter for letter in choices if words.count(letter)]
        if len(named) == 1 and len(words) - words.index(named[0]) < 5:
            return named[0]
        if not named and "Z" in words:
            return None
        stated = re.search(r"(?i)answer\s+is\s+\**([a-d])", answer)
        if stated and stated.group(1).upper() in choices:
            return stated.group(1).upper()
    if len(answer.lower()) > 2 * sum(len(text) for text in choices.values()):
        return None
    held = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return held[0] if len(held) == 1 else None


def count_bench(prediction: str, answer) -> float:
    """image_vqa.py: ``CountBenchQA.evaluate``."""
    return float(prediction.find(str(answer)) >= 0)
