"""The soak test: hundreds of training steps with a fault every few steps, compared with a run that is never interrupted.

Both runs have images that cannot be read, NaN losses and a full disk at every fourth checkpoint, and skip them. The second run
is also ended every few steps, by SIGKILL (in a step, at a file of a checkpoint, or at a random time) or by a reward that hangs,
and resumes from its last checkpoint. In the end the logs of all steps must be equal, and the memory of the first run must not
have grown.

    PYTHONPATH=tests python -m support.faults.soak --steps 500
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from support import forks, tiny
from support.faults import runs
from vlmkernels.train.checkpoint import last_complete_checkpoint

ENDS = ("killed in a step", "killed in a save", "killed by the clock", "reward hangs")
ROWS, TIMEOUT_S = 12, 5.0


class Hangs:
    """A reward for short answers that does not return in time at one call, at step ``at``."""

    __name__ = "hangs"

    def __init__(self):
        self.at = None

    def __call__(self, completions, trainer_state, **kwargs):
        if self.at is not None and trainer_state.global_step >= self.at:
            self.at = None
            time.sleep(10 * TIMEOUT_S)
        return runs.brevity(completions)


def options(steps: int) -> dict:
    rows = tiny.rows(ROWS, "mixed")
    data = [runs.corrupt(row) if index in (4, 9) else row for index, row in enumerate(rows)]
    return {
        "data": data, "max_steps": steps, "save_steps": 5, "save_total_limit": 2, "lr_scheduler_type": "constant",
        "learning_rate": 1e-3, "on_bad_sample": "skip", "on_save_error": "skip", "on_nonfinite": "skip",
    }  # fmt: skip


def life(folder, steps: int, end: str | None = None, at: int | None = None) -> None:
    """A run from the last checkpoint to its end, or to one of ``ENDS`` at step ``at``; writes ``memory.jsonl``."""
    hangs = Hangs()
    trainer = runs.build(folder, rewards=["cer", {"name": hangs, "timeout": TIMEOUT_S}], **options(steps))
    runs.spoil_loss(trainer, range(30, steps, 50), always=True)
    if end == "killed in a step":
        runs.die_in_step(trainer, 0, at)
    if end == "reward hangs":
        hangs.at = at
    runs.limit_files(trainer, 300_000, steps=range(15, steps, 20))
    save, log = trainer._save_checkpoint, trainer.log

    def save_or_die(model, trial):
        if end == "killed in a save" and trainer.state.global_step >= at:
            runs.save_and_die(lambda: save(model, trial), folder, at % 30)
        else:
            save(model, trial)

    def log_memory(logs, *arguments):
        if "loss" in logs:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(f"{folder}/memory.jsonl", "a") as file:
                file.write(json.dumps([trainer.state.global_step, pages * os.sysconf("SC_PAGE_SIZE")]) + "\n")
        log(logs, *arguments)

    trainer._save_checkpoint, trainer.log = save_or_die, log_memory
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    Path(folder, "losses.json").write_text(json.dumps(runs.losses(trainer)))


def growth(folder, start: int = 100) -> float:
    """The slope of a run's memory over its steps from ``start`` on, in bytes per step."""
    points = [json.loads(line) for line in Path(folder, "memory.jsonl").read_text().splitlines()]
    step, size = torch.tensor(points, dtype=torch.float64)[start:].T
    step = step - step.mean()
    return float((step * size).sum() / step.square().sum())


def soak(context, folder, steps: int, ends=ENDS, reach: int = 40, seed: int = 0) -> dict:
    """Run both and return what happened and how much their logs differ. A life is at most ``reach`` steps long."""
    chance, ended, start = random.Random(seed), Counter(), time.monotonic()
    alone, broken = Path(folder, "alone"), Path(folder, "broken")
    assert forks.ended(forks.start(context, life, alone, steps), 3600) == [0], (alone / "output-0").read_text()[-3000:]
    while not (broken / "losses.json").exists():
        last = last_complete_checkpoint(broken)
        step = int(last.rpartition("-")[2]) if last else 0
        end, at = chance.choice(ends), step + chance.randrange(3, reach)
        processes = forks.start(context, life, broken, steps, end, at)
        if end == "killed by the clock":
            processes[0].join(chance.uniform(0.2, 2))
            if processes[0].is_alive():
                os.kill(processes[0].pid, signal.SIGKILL)
        (code,) = forks.ended(processes, 3600)
        output = (broken / "output-0").read_text()
        if code == 1 and "no result within" in output[-2000:]:
            end = "reward hangs"
        elif code == 0:
            end = "nothing more"
        else:
            assert code == -signal.SIGKILL, output[-3000:]
        ended[end] += 1
    one, other = (json.loads((path / "losses.json").read_text()) for path in (alone, broken))
    assert list(one) == list(other) == [str(step) for step in range(1, steps + 1)]
    apart = [abs(one[s][k] - other[s][k]) for s in one for k in one[s] if one[s][k] is not None and other[s][k] is not None]
    return {
        "steps": steps,
        "ended by": dict(ended),
        "saves that failed": (broken / "output-0").read_text().count("could not be written"),
        "steps skipped": sum(log["frac_steps_skipped"] for log in one.values()),
        "samples replaced": sum(log.get("frac_samples_replaced") or 0 for log in one.values()),
        "greatest difference of a logged number": max(apart),
        "logs equal": one == other,
        "seconds": round(time.monotonic() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(forks.server(), folder, args.steps, seed=args.seed)
        report["memory, bytes per step"] = round(growth(Path(folder, "alone")))
    print(json.dumps(report, indent=1))
    sys.exit(not report["logs equal"] or report["memory, bytes per step"] > 20_000)


if __name__ == "__main__":
    main()
