"""Checkpoints: written aside, then renamed, so that a folder ``checkpoint-N`` is whole at every moment.

A checkpoint is written into ``.checkpoint-N.partial``, flushed to the disk, and renamed. Its last file, ``vlmkernels.json``,
lists all others with their sizes: where it is there, so are they. A run that is killed, or whose disk is full, leaves the
checkpoints that it had. What ``transformers`` writes into a checkpoint, and how it reads it, is unchanged.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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

from vlmkernels.ops.checks import require
from vlmkernels.train.faults import first_of_all
from vlmkernels.version import __version__

logger = logging.get_logger(__name__)

MANIFEST = "vlmkernels.json"
FORMAT = 1  # of a checkpoint's files; a reader refuses a greater one
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)  # open and rename; torch.save; safetensors


# Reading


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether training can go on from this folder: every file that its manifest lists is there, whole. One without a manifest,
    written by ``transformers.Trainer``, needs a trainer state, which comes last, and random states."""
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
    """By their steps."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return {int(step): folder for folder in found if (step := folder.name.rpartition("-")[2]).isdecimal()}


def _partials(output_dir: str | os.PathLike) -> list[Path]:
    return list(Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial"))


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint in ``output_dir`` that was written last, perhaps of a lower step than an earlier run's.

    One that was whole when the run was killed, but not renamed yet, is renamed now.
    """
    for partial in _partials(output_dir):
        if (partial / MANIFEST).exists() and is_complete(partial):
            try:
                _publish(partial)
            except FileNotFoundError:  # another process was faster
                continue
    return _last_complete(output_dir)


def _last_complete(output_dir: str | os.PathLike) -> str | None:
    complete = [folder for folder in _by_age(output_dir) if is_complete(folder)]
    return str(complete[-1]) if complete else None


def _by_age(output_dir: str | os.PathLike) -> list[Path]:
    """Checkpoints in the order in which they were written; those that do not tell when come first, by their steps."""

    def written(folder: Path) -> float:
        try:
            return float(json.loads((folder / MANIFEST).read_text()).get("time", 0))
        except (OSError, ValueError):
            return 0.0

    return [folder for _, folder in sorted(_checkpoints(output_dir).items(), key=lambda item: (written(item[1]), item[0]))]


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


def check_checkpoint(checkpoint: str | os.PathLike, model: PreTrainedModel, processes: int) -> None:
    """Raise where this version, this model or this number of processes cannot go on from a checkpoint."""
    folder, name = Path(checkpoint), f"resume_from_checkpoint {checkpoint}"
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).exists() else {"format": FORMAT}
    written = f"{manifest['format']}, written by vlmkernels {manifest.get('vlmkernels')}"
    require(manifest["format"] <= FORMAT, name, f"have a format that vlmkernels {__version__} knows, at most {FORMAT}", written)
    saved, own = manifest.get("model_type", model.config.model_type), model.config.model_type
    require(saved == own, name, f"be of the model that is trained, a {own}", f"a {saved}")
    adapters, has = is_peft_model(model), (folder / "adapter_config.json").exists()
    kinds = {True: "adapters of a model", False: "a whole model"}
    require(adapters == has, name, f"hold what is trained, {kinds[adapters]}", kinds[has])
    if adapters and not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # cut by ZeRO-3
        from peft import get_peft_model_state_dict, load_peft_weights

        _check_parameters(name, get_peft_model_state_dict(model), load_peft_weights(str(folder), device="cpu"))
    batches = len(list(folder.glob("experience_*.pt")))
    rule = f"be from between two generation batches to go on with {processes} processes"
    require(batches in (0, processes), name, rule, f"one within the generation batch of {batches}")


def _check_parameters(name: str, own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> None:
    own, saved = ({key: tuple(value.shape) for key, value in state.items()} for state in (own, saved))
    for key in sorted(own.keys() | saved.keys()):
        sizes = f"a {key} of the size {own.get(key)}", saved.get(key)
        require(own.get(key) == saved.get(key), name, f"be of the model that is trained, with {sizes[0]}", sizes[1])


def load_weights(model: PreTrainedModel, checkpoint: str | os.PathLike) -> None:
    """Give the model, sharded or not, the checkpoint's weights, all of them.

    ``Trainer`` reads the file without the renaming that ``save_pretrained`` did and passes over what does not fit: a
    Qwen2.5-VL would go on with its initial weights and a warning.
    """
    kind = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # which fully_shard derives from it
    saved = kind.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    _check_parameters(f"checkpoint {checkpoint}", model.state_dict(), saved)
    set_model_state_dict(model, saved, options=StateDictOptions(full_state_dict=True, strict=True))


def experience_path(checkpoint: str | os.PathLike, process: int) -> Path:
    return Path(checkpoint) / f"experience_{process}.pt"


def save_experience(experience, checkpoint: str, process: int) -> None:
    torch.save(experience.state_dict(), experience_path(checkpoint, process))


def load_experience(checkpoint: str, process: int) -> dict | None:
    """The generation batch that was in use when the checkpoint was written; None where it was used up."""
    path = experience_path(checkpoint, process)
    return torch.load(path, weights_only=True) if path.exists() else None


# Writing


def save_checkpoint(trainer: Trainer, output_dir: str, skip: bool) -> None:
    """Write the checkpoint of this step, with all processes.

    Where any of them fails to write, what was written is removed, and all of them raise ``OSError``, or with ``skip`` warn and
    go on. Every collective operation is run whatever failed before it.
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
        error = first_of_all(trainer.accelerator, _attempt(stage, at_once=trainer.is_deepspeed_enabled))
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
        logger.warning("%s. Training goes on (on_save_error='skip')", text)
        return
    if trainer.args.push_to_hub:
        trainer._push_from_checkpoint(str(final))
    if writes:
        _rotate(final, state.best_model_checkpoint, trainer.args.save_total_limit)


def _attempt(parts: Iterable[Callable[[], None]], at_once: bool) -> str | None:
    """Do all of them, whatever fails; what went wrong first. at_once: raise it, since DeepSpeed's part is several, with
    collective operations between them."""
    first = None
    for part in parts:
        try:
            part()
        except CANNOT_WRITE as error:
            if at_once:
                raise
            first = first or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return first


def _prepare(partial: Path) -> None:
    """What a killed run left goes first: it may fill the disk."""
    for folder in _partials(partial.parent):
        _discard(folder)
    partial.mkdir(parents=True)


def _parts(trainer: Trainer, folder: str) -> Iterator[Callable[[], None]]:
    """What ``Trainer._save_checkpoint`` writes, in parts of which none has a collective operation after it began to write."""
    if trainer.hp_search_backend is None:
        yield trainer.store_flos
    yield lambda: trainer.save_model(folder, _internal_call=True)
    if trainer.args.save_only_model:
        return
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
    """The trainer's state and the manifest, when all else is on the disk."""
    callbacks = [c for c in [*trainer.callback_handler.callbacks, trainer.control] if isinstance(c, ExportableState)]
    for callback in callbacks:
        states = trainer.state.stateful_callbacks
        name, state = type(callback).__name__, callback.state()
        if isinstance(states[name], list):
            states[name].append(state)
        else:
            states[name] = state
    trainer.state.save_to_json(str(partial / TRAINER_STATE_NAME))
    files = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
    model = trainer.accelerator.unwrap_model(trainer.model)
    manifest = {"format": FORMAT, "vlmkernels": __version__, "model_type": model.config.model_type}
    manifest |= {"time": time.time(), "files": files}  # seconds since 1970
    _flush(partial / TRAINER_STATE_NAME)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(partial / MANIFEST, partial)


def _flush(*paths: Path) -> None:
    """Have the operating system write files and folders to the disk: some tell only now that it is full."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path) -> None:
    """Give a whole checkpoint its name; one of that name, of an earlier run, goes first."""
    final = partial.with_name(partial.name[1:].removesuffix(".partial"))
    try:
        partial.rename(final)
    except FileNotFoundError:  # another process gave it its name: nothing may be removed now
        raise
    except OSError:
        _discard(final)
        partial.rename(final)
    _flush(final.parent)


def _discard(folder: Path) -> None:
    """Remove a folder, first what makes it count."""
    for name in (TRAINER_STATE_NAME, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _rotate(newest: Path, best: str | None, limit: int | None) -> None:
    """Keep at most ``limit`` checkpoints, the newest and the best among them."""
    if not limit or limit < 0:
        return
    kept = {newest, *([Path(best)] if best else [])}
    others = [folder for folder in _by_age(newest.parent) if folder not in kept]
    for folder in others[: max(len(others) + len(kept) - limit, 0)]:
        _discard(folder)
