"""Atomic checkpoints: a folder ``checkpoint-N`` is complete at every moment.

A checkpoint is written to ``.checkpoint-N.partial``, flushed to the disk, and renamed. The file that is written last,
``vlmkernels.json``, lists all other files with their sizes. If a run is killed or its disk is full, its earlier checkpoints
remain. The files that ``transformers`` writes into a checkpoint are unchanged.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from vlmkernels.models.families import Family
from vlmkernels.record.phases import Phases, phase
from vlmkernels.train import reference
from vlmkernels.train.config import GRPOConfig
from vlmkernels.train.experience import Experience
from vlmkernels.train.faults import first_error
from vlmkernels.train.parallel import is_zero3_sharded
from vlmkernels.version import __version__

logger = logging.get_logger(__name__)

MANIFEST = "vlmkernels.json"
FORMAT = 2  # format of a checkpoint's files; resuming from a later format raises an error
# Raised by open and rename, torch.save, safetensors, and the save_pretrained of configurations and processors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, ValueError, TypeError, AttributeError)


# Reading


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether training can resume from this folder: every file in its manifest exists with the listed size.

    A checkpoint of ``transformers.Trainer`` has no manifest. It needs a trainer state, which is written last, and random
    states.
    """
    folder = Path(checkpoint)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
        if (folder / MANIFEST).exists():
            files = json.loads((folder / MANIFEST).read_text())["files"]
            return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False
    return any(folder.glob("rng_state*.pth"))  # absent under save_only_model


def _checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """Return the checkpoint folders by step."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return {int(step): folder for folder in found if (step := folder.name.rpartition("-")[2]).isdecimal()}


def _partials(output_dir: str | os.PathLike) -> list[Path]:
    return list(Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial"))


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the complete checkpoint in ``output_dir`` that was written last, or None.

    Its step may be lower than that of an earlier run's checkpoint. A complete checkpoint that was not yet renamed when the run
    was killed is renamed first.
    """
    for partial in _partials(output_dir):
        if (partial / MANIFEST).exists() and is_complete(partial):
            try:
                _publish(partial)
            except FileNotFoundError:  # another process renamed it
                continue
    return _last_complete(output_dir)


def _last_complete(output_dir: str | os.PathLike) -> str | None:
    complete = [folder for folder in _by_age(output_dir) if is_complete(folder)]
    return str(complete[-1]) if complete else None


def _by_age(output_dir: str | os.PathLike) -> list[Path]:
    """Return checkpoints in the order in which they were written. Those without a time come first, by step."""

    def time_written(folder: Path) -> float:
        try:
            return float(json.loads((folder / MANIFEST).read_text()).get("time", 0))
        except (OSError, ValueError):
            return 0.0

    return [folder for _, folder in sorted(_checkpoints(output_dir).items(), key=lambda item: (time_written(item[1]), item[0]))]


def find_checkpoint(resume: str | bool, output_dir: str | os.PathLike) -> str:
    """Return the checkpoint that ``resume_from_checkpoint`` names.

    Args:
        resume: the folder of a checkpoint, or True for the last complete checkpoint in ``output_dir``.

    Raises:
        ValueError: there is no complete checkpoint.
    """
    if resume is True:
        found = last_complete_checkpoint(output_dir)
        if found is None:
            raise ValueError(f"resume_from_checkpoint must find a complete checkpoint in output_dir, got none in {output_dir}")
        return found
    if not is_complete(resume):
        raise ValueError(f"resume_from_checkpoint must be a complete checkpoint, got {resume}")
    return str(resume)


def check_checkpoint(checkpoint: str | os.PathLike, model: PreTrainedModel, processes: int) -> None:
    """Check that a checkpoint can be resumed by this version, with this model and this number of processes.

    Raises:
        ValueError: the checkpoint cannot be resumed; the message says why.
    """
    folder, name = Path(checkpoint), f"resume_from_checkpoint {checkpoint}"
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).exists() else {"format": FORMAT}
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{name} must have a format that vlmkernels {__version__} can read, at most {FORMAT}, got {manifest['format']}, "
            f"written by vlmkernels {manifest.get('vlmkernels')}"
        )
    model_type = model.config.model_type
    if (saved_type := manifest.get("model_type", model_type)) != model_type:
        raise ValueError(f"{name} must hold a model of type {model_type}, like the trained model, got {saved_type}")
    has_adapters = any(folder.glob("adapter_config.json")) or any(folder.glob("*/adapter_config.json"))
    if is_peft_model(model) and not has_adapters:
        raise ValueError(f"{name} must hold LoRA adapters, like the trained model, got a checkpoint of a whole model")
    if has_adapters and not is_peft_model(model):
        raise ValueError(f"{name} must hold a whole model, like the trained model, got a checkpoint of LoRA adapters")
    if has_adapters and not is_zero3_sharded(model):
        from peft import get_peft_model_state_dict, load_peft_weights

        for adapter in model.active_adapters:
            weights = folder if adapter == "default" or not (folder / adapter).is_dir() else folder / adapter
            if not (weights / "adapter_config.json").exists():
                raise ValueError(f"{name} must hold the adapter {adapter!r}, like the trained model, got none of this name")
            own = get_peft_model_state_dict(model, adapter_name=adapter)
            _check_shapes(name, own, load_peft_weights(str(weights), device="cpu"))
    saved_by = len(list(folder.glob("experience_*.pt")))
    if saved_by not in (0, processes):
        raise ValueError(f"{name} was saved mid-batch by {saved_by} processes: resume with {saved_by}, got {processes}")
    if saved_by and manifest["format"] != FORMAT:
        raise ValueError(
            f"{name} was saved mid-batch in format {manifest['format']} by vlmkernels {manifest['vlmkernels']}: "
            f"resume with that version, got vlmkernels {__version__}, which reads batches of format {FORMAT}"
        )


def _check_shapes(name: str, own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    """Check that the parameters of the model and of a checkpoint have the same names and shapes."""
    own, saved = ({key: tuple(value.shape) for key, value in state.items()} for state in (own, saved))
    for key in sorted(own.keys() | saved.keys()):
        if own.get(key) != saved.get(key):
            raise ValueError(f"{name} must have a parameter {key} of shape {own.get(key)}, got {saved.get(key)}")


def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Load all weights of a checkpoint into the model, which may be sharded by FSDP2.

    ``Trainer`` reads the file without the key renaming of ``save_pretrained`` and skips keys that do not match: a Qwen2.5-VL
    would continue with its initial weights and a warning.
    """
    model_class = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # fully_shard derives a class
    saved = model_class.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    _check_shapes(f"checkpoint {checkpoint}", model.state_dict(), saved)
    set_model_state_dict(model, saved, options=StateDictOptions(full_state_dict=True, strict=True))


def _experience_path(checkpoint: str, process: int) -> Path:
    return Path(checkpoint) / f"experience_{process}.pt"


def save_experience(experience: Experience, checkpoint: str, process: int) -> None:
    """Add the generation batch in use to a checkpoint, so that a resumed run continues it."""
    torch.save(experience.state_dict(), _experience_path(checkpoint, process))


def load_experience(
    checkpoint: str, process: int, family: Family, args: GRPOConfig, *, has_rewards: bool, has_teacher: bool
) -> Experience | None:
    """Load the generation batch in use when the checkpoint was written, or None if the batch was used up.

    Args:
        has_rewards, has_teacher: see ``Experience.check_arguments``.

    Raises:
        ValueError: the batch was made with other arguments.
    """
    path = _experience_path(checkpoint, process)
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)  # the device that saved it need not exist
    experience = Experience.from_state_dict(state, family, args.device)
    experience.check_arguments(args, checkpoint, has_rewards=has_rewards, has_teacher=has_teacher)
    return experience


def _load_default_adapter(model: Any, checkpoint: Path) -> None:
    """Load the adapter "default" from a checkpoint with several adapters, in which transformers 5.17 loads only the others."""
    has_others = any(checkpoint.glob("*/adapter_config.json"))
    if has_others and "default" in model.peft_config and (checkpoint / "adapter_config.json").exists():
        active = model.active_adapters
        model.load_adapter(str(checkpoint), "default", is_trainable="default" in active)
        model.set_adapter(active[0])


class CheckpointedTrainer(Trainer):
    """A ``Trainer`` that writes, finds and loads checkpoints with the functions of this module."""

    phases: Phases
    reference_adapter: dict[str, torch.Tensor]  # weights of the frozen adapter; empty if there is none

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # Trainer would take one more step if a finished run is resumed
            super()._run_epoch(**arguments)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_peft_model(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            _load_default_adapter(self.model, Path(resume_from_checkpoint))
        else:
            load_weights(self.model, resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with reference.hidden(self.model):
            super()._save(output_dir, state_dict)

    def _load_best_model(self) -> None:
        if is_peft_model(self.model) or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, self.state.best_model_checkpoint)

    @phase("save")
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        save_checkpoint(self, self._get_output_dir(trial), skip=self.args.on_save_error == "skip")


# Writing


def save_checkpoint(trainer: Trainer, output_dir: str, skip: bool) -> None:
    """Write the checkpoint of this step. Every process calls it, and runs all collectives even if a write failed.

    Args:
        skip: whether to log a warning instead of raising if the checkpoint cannot be written.

    Raises:
        OSError: a process could not write its files. The partial checkpoint is removed.
    """
    state, writes = trainer.state, trainer.args.should_save
    final = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    partial = final.with_name(f".{final.name}.partial")
    previous_best = state.best_model_checkpoint
    best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
    if state.best_global_step and (best == final or best.exists()):
        state.best_model_checkpoint = str(best)
    stages: tuple[Iterable[Callable], ...] = (
        [lambda: _prepare(partial)] if writes else [],
        _parts(trainer, str(partial)),
        [lambda: _flush(*partial.rglob("*"))],
        [lambda: _seal(trainer, partial)] if writes else [],
        [lambda: _publish(partial)] if writes else [],
    )
    for stage in stages:
        error = first_error(trainer.accelerator, _attempt(stage, raise_at_once=trainer.is_deepspeed_enabled))
        if error is not None:
            break
    if error is not None:
        state.best_model_checkpoint = previous_best
        if writes:
            _discard(partial)
        free, last = shutil.disk_usage(output_dir).free / 2**30, _last_complete(output_dir)
        text = f"{final} could not be written ({error}; {free:.1f} GiB are free); the last complete checkpoint is {last}"
        if not skip:
            raise OSError(text)
        logger.warning("%s. Training continues (on_save_error='skip')", text)
        return
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(final))
    if writes:
        _rotate(final, state.best_model_checkpoint, trainer.args.save_total_limit)


def _attempt(parts: Iterable[Callable[[], None]], raise_at_once: bool) -> str | None:
    """Run all parts even if one fails, and return the first error.

    Args:
        raise_at_once: raise the first error instead. DeepSpeed needs this, because one of its parts runs collectives between
            writes: after an error, the next collectives of this rank would not match those of the other ranks.
    """
    first = None
    for part in parts:
        try:
            part()
        except WRITE_ERRORS as error:
            if raise_at_once:
                raise
            first = first or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return first


def _prepare(partial: Path) -> None:
    """Create the folder, after removing what a killed run left, which may fill the disk."""
    for folder in _partials(partial.parent):
        _discard(folder)
    partial.mkdir(parents=True)


def _parts(trainer: Trainer, folder: str) -> Iterator[Callable[[], None]]:
    """Yield the writes of ``Trainer._save_checkpoint`` in parts; within a part, all collectives run before the first write."""
    if trainer.hp_search_backend is None:
        yield trainer.store_flos
    yield lambda: trainer.save_model(folder, _internal_call=True)
    if trainer.args.save_only_model:
        return
    if trainer.args.should_save and trainer.reference_adapter:
        yield lambda: reference.save(trainer.reference_adapter, folder)
    if trainer.is_fsdp_enabled:
        plugin, accelerator, model = trainer.accelerator.state.fsdp_plugin, trainer.accelerator, trainer.model
        yield lambda: save_fsdp_model(plugin, accelerator, model, folder, adapter_only=True)
        yield lambda: save_fsdp_optimizer(plugin, accelerator, trainer.optimizer, model, folder)
        if trainer.args.should_save:
            yield lambda: torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))
    else:
        yield lambda: trainer._save_optimizer_and_scheduler(folder)
    yield lambda: trainer._save_scaler(folder)
    yield lambda: trainer._save_rng_state(folder)


def _seal(trainer: Trainer, partial: Path) -> None:
    """Write the trainer's state and the manifest, after all other files are on the disk."""
    callbacks = [c for c in [*trainer.callback_handler.callbacks, trainer.control] if isinstance(c, ExportableState)]
    states = trainer.state.stateful_callbacks
    for callback in callbacks:
        name, state = type(callback).__name__, callback.state()
        if isinstance(states[name], list):
            states[name].append(state)
        else:
            states[name] = state
    trainer.state.save_to_json(str(partial / TRAINER_STATE_NAME))
    files = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
    model = trainer.accelerator.unwrap_model(trainer.model)
    manifest = {"format": FORMAT, "vlmkernels": __version__, "model_type": model.config.model_type}
    manifest["reference"] = reference.kind_of(model, trainer.args.beta)
    manifest |= {"time": time.time(), "files": files}  # seconds since 1970
    _flush(partial / TRAINER_STATE_NAME)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(partial / MANIFEST, partial)


def _flush(*paths: Path) -> None:
    """Flush files and folders to the disk. Some file systems report only now that the disk is full."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path) -> None:
    """Rename a complete checkpoint to its final name, replacing a checkpoint of an earlier run."""
    final = partial.with_name(partial.name[1:].removesuffix(".partial"))
    try:
        partial.rename(final)
    except FileNotFoundError:  # another process renamed it: nothing may be removed now
        raise
    except OSError:
        _discard(final)
        partial.rename(final)
    _flush(final.parent)


def _discard(folder: Path) -> None:
    """Remove a checkpoint, starting with the files that make it complete."""
    for name in (TRAINER_STATE_NAME, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _rotate(newest: Path, best: str | None, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but not the newest and the best."""
    if not limit or limit < 0:
        return
    kept = {newest, *([Path(best)] if best else [])}
    others = [folder for folder in _by_age(newest.parent) if folder not in kept]
    for folder in others[: max(len(others) + len(kept) - limit, 0)]:
        _discard(folder)
