"""Turns of a trajectory: read from its messages, stored as JSON, and shown as HTML.

Schema of one turn::

    {"role": "assistant", "text": "...", "calls": [{"name": "zoom", "arguments": "{\"x\": 3}"}], "trained": true}
    {"role": "tool", "name": "zoom", "text": "...", "images": [0], "error": false}

- ``arguments`` is JSON. ``images`` are positions in a list of thumbnails, which holds equal images once.
- ``error``: whether the call failed; ``text`` is then what the model got instead of a result.
- ``trained``: whether the loss counts the tokens of the turn. ``reward``: the turn's own reward.
- Keys whose value is the default of ``TurnRow`` are left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from html import escape
from typing import Any, NamedTuple

from PIL import Image

from vlmkernels.record.html import Thumbnail, thumbnail

LABELS = {"assistant": "model", "tool": "tool", "user": "prompt"}  # by role
# Results of calls that failed begin with one of these.
ERRORS = ("{'error': ", '{"error": ')
LEGEND = '<span class="legend">trained on</span>'


class CallRow(NamedTuple):
    """A call of a tool. ``arguments`` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class TurnRow:
    """One message of a trajectory: a turn of the model, the result of one call, or a prompt that its group does not share.

    Args:
        role: "assistant", "tool" or "user".
        text: the text, without the reasoning and the calls.
        reasoning: the reasoning of a turn of the model, if its messages have it apart from the text.
        name: name of the tool that returned the result.
        calls: the calls of a turn of the model.
        images: the images of a result or prompt.
        error: whether the call failed.
        trained: whether the loss counts the tokens of the turn.
        reward: the turn's own reward, if it has one.
    """

    role: str
    text: str
    reasoning: str | None = None
    name: str | None = None
    calls: list[CallRow] = field(default_factory=list)
    images: list[Thumbnail] = field(default_factory=list)
    error: bool = False
    trained: bool = False
    reward: float | None = None


class Counts(NamedTuple):
    """Numbers of a trajectory's turns of the model, of its calls that were run, and of those that failed."""

    turns: int
    calls: int
    failures: int

    def __str__(self) -> str:
        named = zip(self, ("turn", "call", "failure"), strict=True)
        return " · ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in named)


def turn_rows(
    messages: Sequence[Mapping[str, Any]], *, trained: bool = False, rewards: Sequence[float] | None = None
) -> list[TurnRow]:
    """Return the turns of a trajectory.

    Args:
        messages: the trajectory's messages, of the roles "assistant" (with ``tool_calls``) and "tool" (with ``name``).
        trained: whether the loss counts the tokens of the model.
        rewards: the rewards of the turns of the model, in their order, NaN = not scored. Default: turns have no rewards.
    """
    rows, of_turns = [], iter(rewards or ())
    for message in messages:
        content = message.get("content") or ""
        parts: Sequence[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part.get("text") or "" for part in parts)
        if message["role"] == "tool":
            images = [thumbnail(part["image"]) for part in parts if isinstance(part.get("image"), Image.Image)]
            rows.append(TurnRow("tool", text, name=message.get("name"), images=images, error=text.startswith(ERRORS)))
        else:
            calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
            found = [CallRow(str(call.get("name")), _arguments_text(call.get("arguments"))) for call in calls]
            reward = next(of_turns, math.nan)
            value = reward if math.isfinite(reward) else None
            rows.append(
                TurnRow("assistant", text, message.get("reasoning_content"), calls=found, trained=trained, reward=value)
            )
    return rows


def _arguments_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)


def count(turns: Sequence[TurnRow]) -> Counts:
    """Return the numbers of turns, calls and failures of a trajectory."""
    num_turns, num_calls = (sum(turn.role == role for turn in turns) for role in ("assistant", "tool"))
    return Counts(num_turns, num_calls, sum(turn.error for turn in turns))


def transcript(turns: Sequence[TurnRow]) -> str:
    """Return a trajectory as text, for example for a cell of a table."""
    lines = []
    for turn in turns:
        calls = [f"{call.name} {call.arguments}" for call in turn.calls]
        images = [f"[image, {image.width} x {image.height}]" for image in turn.images]
        label = turn.name or LABELS[turn.role]
        texts = ((turn.reasoning or "").strip(), turn.text.strip(), *calls, *images)
        lines.append(f"{label}: " + "\n".join(text for text in texts if text))
    return "\n".join(lines)


def to_json(turns: Sequence[TurnRow], places: dict[Thumbnail, int]) -> list[dict[str, Any]]:
    """Return the JSON objects of turns. ``places`` has the position of each stored image; new images are added to it."""
    found = []
    for turn in turns:
        value = {f.name: getattr(turn, f.name) for f in fields(turn)}
        value["calls"] = [call._asdict() for call in turn.calls]
        value["images"] = [places.setdefault(image, len(places)) for image in turn.images]
        found.append({name: item for name, item in value.items() if item is not None and item is not False and item != []})
    return found


def from_json(values: Any, thumbnails: Sequence[Thumbnail]) -> list[TurnRow]:
    """Return the turns of JSON objects. ``thumbnails`` are the stored images.

    Raises:
        ValueError, TypeError, KeyError, IndexError: the objects have another schema.
    """
    turns = []
    for value in values:
        calls = [CallRow(**call) for call in value.get("calls", ())]
        images = [thumbnails[place] for place in value.get("images", ())]
        turn = TurnRow(**{**value, "calls": calls, "images": images})
        texts = [turn.text, turn.reasoning or "", turn.name or "", *(text for call in calls for text in call)]
        is_number = turn.reward is None or isinstance(turn.reward, (int, float))
        if turn.role not in LABELS or not is_number or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"a turn must have a role of {', '.join(LABELS)}, texts and a number as reward, got {value!r:.80}")
        turns.append(turn)
    return turns


class Shots:
    """The images of results within one element, whose style holds each of them once.

    First the content of the element is made, with ``html``, and then its start tag: ``f"<div{shots.style()}>"``.
    """

    def __init__(self) -> None:
        self._names: dict[Thumbnail, str] = {}

    def html(self, image: Thumbnail) -> str:
        """Return an element that shows the image."""
        name = self._names.setdefault(image, f"--shot-{len(self._names)}")
        size = f"width: {image.width:d}px; aspect-ratio: {image.width:d} / {image.height:d}"
        small = " small" if image.magnified else ""
        return f'<i class="shot{small}" role="img" style="{size}; background-image: var({name})"></i>'

    def style(self) -> str:
        """Return the attribute ``style`` of the element around the images; an empty string without images."""
        variables = "; ".join(f"{name}: url('{image.source}')" for image, name in self._names.items())
        return f' style="{escape(variables)}"' if variables else ""


def turns_html(turns: Sequence[TurnRow], shots: Shots) -> str:
    """Return a trajectory from top to bottom: texts, calls, and results with their images."""
    return f'<div class="turns">{"".join(_turn_html(turn, shots) for turn in turns)}</div>'


def _turn_html(turn: TurnRow, shots: Shots) -> str:
    label = turn.name or LABELS[turn.role]
    notes = ["failed"] if turn.error else [] if turn.reward is None else [f"reward {turn.reward:.3f}"]
    reasoning, text = escape((turn.reasoning or "").strip()), escape(turn.text.strip())
    texts = (f'<pre class="reasoning">{reasoning}</pre>' if reasoning else "") + (f"<pre>{text}</pre>" if text else "")
    calls = "".join(f'<pre class="call"><b>{escape(call.name)}</b> {escape(call.arguments)}</pre>' for call in turn.calls)
    images = "".join(map(shots.html, turn.images))
    images = f'<div class="shots">{images}</div>' if images else ""
    classes = " ".join(("turn", *(["trained"] * turn.trained), *(["error"] * turn.error)))
    head = f"<small>{escape(' · '.join((label, *notes)))}</small>"
    return f'<div class="{classes}">{head}<div>{texts}{calls}{images}</div></div>'
