"""From the tokens of a model to text: which special tokens are part of an answer, and which are not."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Special tokens that are tags of an answer: <think>, </answer>, <box>, <|box_start|>, <|end_of_box|>, <loc0012>, ...
_TAG = re.compile(
    r"</?([a-z_]+|(?:loc|seg)\d+)>|<\|([a-z_]+)_(?:start|end)\|>|<\|(?:begin|start|end)_of_([a-z_]+)\|>", re.IGNORECASE
)
# Words in the names of other special tokens of these forms: <pad>, </s>, <|im_end|>, <end_of_turn>, <|vision_start|>, ...
_CONTROL = {
    *("s", "bos", "eos", "pad", "unk", "cls", "sep", "mask", "text", "sentence", "document", "sop", "eop", "eot", "eom"),
    *("im", "turn", "utterance", "role", "message", "msg", "header", "user", "assistant", "system"),
    *("image", "img", "boi", "eoi", "vision", "video", "audio", "media"),
}


def decode_completions(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[Sequence[int]]) -> list[str]:
    """Decode completions without special tokens, except for those that are tags of an answer.

    ``skip_special_tokens=True``, as in TRL, would also remove ``<think>``, ``<answer>`` or ``<|box_start|>`` in tokenizers that
    declare them as special tokens.
    """
    hidden = control_tokens(tokenizer)
    kept = [[token for token in ids if token not in hidden] for ids in completion_ids]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the texts of the special tokens that are no tags of an answer, by id."""
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {token: text for token, text in special.items() if not _is_tag(text)}


def _is_tag(text: str) -> bool:
    """Return whether the text of a special token is a tag of an answer."""
    match = _TAG.fullmatch(text)
    return match is not None and _CONTROL.isdisjoint(match[match.lastindex or 0].lower().split("_"))
