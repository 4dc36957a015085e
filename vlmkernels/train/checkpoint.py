"""Which checkpoints count, and the generation batch saved with them.

``transformers`` writes a checkpoint in place, file by file, ``trainer_state.json`` last. A checkpoint counts once that file is
whole; ``GRPOTrainer`` removes it before it writes into a folder that has one, so a run killed at any moment leaves either a
complete checkpoint or one that is passed over.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether training can go on from this folder."""
    folder = Path(checkpoint)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return any(folder.glob("rng_state*.pth"))  # absent under save_only_model


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint of the highest step in ``output_dir``."""
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) and is_complete(folder):
            steps[int(match[1])] = str(folder)
    return steps[max(steps)] if steps else None


def find_checkpoint(resume: str | bool, output_dir: str | os.PathLike) -> str:
    """The checkpoint that ``resume_from_checkpoint`` means: True = the last complete one of ``output_dir``."""
    if resume is True:
        found = last_complete_checkpoint(output_dir)
        if found is None:
            raise ValueError(f"resume_from_checkpoint must find a complete checkpoint in output_dir, got none in {output_dir}")
        return found
    if not is_complete(resume):
        raise ValueError(f"resume_from_checkpoint must be a complete checkpoint, got {resume}")
    return str(resume)


def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Give the model, sharded or not, the checkpoint's weights, all of them.

    ``Trainer`` reads the file without the renaming that ``save_pretrained`` did and passes over what does not fit: a
    Qwen2.5-VL would go on with its initial weights and a warning.
    """
    kind = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # which fully_shard derives from it
    saved = kind.from_pretrained(checkpoint, dtype=torch.float32)
    set_model_state_dict(model, saved.state_dict(), options=StateDictOptions(full_state_dict=True, strict=True))


def experience_path(checkpoint: str | os.PathLike, process: int) -> Path:
    return Path(checkpoint) / f"experience_{process}.pt"


def save_experience(experience, checkpoint: str, process: int) -> None:
    torch.save(experience.state_dict(), experience_path(checkpoint, process))


def load_experience(checkpoint: str, process: int) -> dict | None:
    """The generation batch that was in use when the checkpoint was written; None where it was used up."""
    path = experience_path(checkpoint, process)
    return torch.load(path, weights_only=True) if path.exists() else None
