"""The resolution of images as a schedule: what the model and the rewards see at each step, resumed runs, faults."""

import pytest
import torch
from support import tiny
from support.tiny_families import case
from support.training import FixedGenerate, config

from vlmkernels.data.resolution import Resolution, ResolutionSchedule
from vlmkernels.rewards.builtin import build
from vlmkernels.train import GRPOTrainer

TOKEN = 28 * 28  # pixels of an image token
SCHEDULE = [{"step": 0, "max_pixels": TOKEN}, {"step": 2, "max_pixels": 4 * TOKEN}]


def rows(num: int, side: int = 56) -> list[dict]:
    return [
        {"prompt": f"<|vision_start|><|image_pad|><|vision_end|>{i}", "image": tiny.image(i, side, side)} for i in range(num)
    ]


class Run:
    """A run that keeps what its reward function got, in training and in evaluation."""

    def __init__(self, folder, data=None, resume=None, processor=None, **options):
        self.seen: list[tuple[int, tuple[int, int]]] = []
        self.overlaps: list[float] = []  # of a fixed box in the frame that the model sees with one in that of the dataset
        iou = build("iou", frame="resized")

        def reward(completions, resized_sizes, image_sizes, trainer_state, **kwargs):
            assert all(sizes == [(56, 56)] for sizes in image_sizes)
            texts = [[{"role": "assistant", "content": "[0, 0, 28, 28]"}]] * len(completions)
            answers = [[0, 0, 28, 28]] * len(completions)
            self.overlaps += iou(texts, answer=answers, image_sizes=image_sizes, resized_sizes=resized_sizes)[:1]
            self.seen += {(trainer_state.global_step, *sizes) for sizes in resized_sizes}
            return [float(len(completion)) for completion in completions]

        args = config(folder, **{"image_resolution_schedule": SCHEDULE, "max_steps": 4, **options})
        data = rows(8) if data is None else data
        processor = processor or tiny.processor()
        self.trainer = GRPOTrainer(tiny.vlm(), reward, args, data, data[:1], processing_class=processor)
        self.trainer.engine = FixedGenerate(self.trainer)
        self.trainer.train(resume_from_checkpoint=resume)
        self.logs = [entry for entry in self.trainer.state.log_history if "loss" in entry]


def test_the_model_and_the_rewards_see_the_size_of_the_step(tmp_path):
    run = Run(tmp_path)
    assert run.seen == [(0, (28, 28)), (1, (28, 28)), (2, (56, 56)), (3, (56, 56))]
    assert run.overlaps == pytest.approx([0.25, 0.25, 1, 1])
    assert [entry["image_pixels"] for entry in run.logs] == [TOKEN, TOKEN, 4 * TOKEN, 4 * TOKEN]
    grid = run.trainer._experience.rollout.prompts.inputs["image_grid_thw"]
    assert grid.tolist() == [[1, 4, 4]] * 2
    run.seen.clear()
    run.trainer.state.global_step = 0
    run.trainer.evaluate()
    assert run.seen == [(0, (56, 56))]  # evaluation has the last size at every step
    plain = Run(tmp_path, image_resolution_schedule=None)
    assert {size for _, size in plain.seen} == {(56, 56)}
    assert "image_pixels" not in plain.logs[0]


def test_a_batch_keeps_its_size_and_a_resumed_run_continues_it(tmp_path):
    """A generation batch lasts for two steps; the limits change, and the run is interrupted, in the middle of one."""
    schedule = '[{"step": 0, "max_pixels": 784}, {"step": 1, "max_pixels": 3136}, {"step": 3, "min_pixels": 3136}]'
    options = {"num_iterations": 2, "image_resolution_schedule": schedule, "max_steps": 5}
    whole = Run(tmp_path, save_strategy="steps", save_steps=1, **options)
    assert whole.seen == [(0, (28, 28)), (2, (56, 56)), (4, (56, 56))]
    assert (tmp_path / "checkpoint-1" / "experience_0.pt").exists()
    resumed = Run(tmp_path, resume=str(tmp_path / "checkpoint-1"), **options)
    assert resumed.seen == whole.seen[1:]
    assert [entry["loss"] for entry in resumed.logs][-4:] == [entry["loss"] for entry in whole.logs][1:]
    for mine, other in zip(resumed.trainer.model.parameters(), whole.trainer.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_longest_prompt_counts_at_set_up(tmp_path):
    """Before the first step, rather than at step 2."""
    limit = len("<vision><vision>0") - len("<vision><vision>") + 2 + 1  # text, the ends of the image, one image token
    with pytest.raises(ValueError, match=f"train_dataset.*max_prompt_length = {limit} tokens at the largest size .*, got 7"):
        Run(tmp_path, max_prompt_length=limit)
    data = rows(4) + [row | {"image": tiny.image(0, 28, 28)} for row in rows(4)]
    data = [row | {"answer": "a"} for row in data]
    args = config(tmp_path, image_resolution_schedule=SCHEDULE, max_prompt_length=limit, on_bad_sample="skip")
    run = GRPOTrainer(tiny.vlm(), "exact_match", args, data, processing_class=tiny.processor())
    assert list(run.datasets.unusable["train_dataset"]) == [0, 1, 2, 3]
    Run(tmp_path, max_prompt_length=7, max_steps=1)


def test_schedule():
    schedule = ResolutionSchedule.from_list([{"step": 0, "max_pixels": 10}, {"step": 5, "min_pixels": 2, "max_pixels": 20}])
    assert [schedule.at(step).max_pixels for step in (0, 4, 5, 100)] == [10, 10, 20, 20]
    assert schedule.last == Resolution(5, 2, 20)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("[{", "must be a JSON list"),
        ([], "must be a list of dicts"),
        ({"step": 0}, "must be a list of dicts"),
        ([{"step": 0, "pixels": 5}], r"\[0\] must have keys of step, min_pixels, max_pixels, got 'pixels'"),
        ([{"step": 0}], "must have a step, and min_pixels or max_pixels"),
        ([{"max_pixels": 5}], "must have a step, and min_pixels or max_pixels"),
        ([{"step": 1, "max_pixels": 5}], r"begin with 0 and increase, got \[1\]"),
        ([{"step": 0, "max_pixels": 5}, {"step": 0, "max_pixels": 6}], r"begin with 0 and increase, got \[0, 0\]"),
        ([{"step": 0, "max_pixels": 0}], r"\[0\].max_pixels must be >= 1, got 0"),
        ([{"step": 0, "max_pixels": 1.5}], r"\[0\].max_pixels must be an integer"),
        ([{"step": 0, "min_pixels": 7, "max_pixels": 5}], r"min_pixels must be at most max_pixels = 5, got 7"),
    ],
)
def test_invalid_schedules(tmp_path, schedule, message):
    with pytest.raises((ValueError, TypeError), match=message):
        config(tmp_path, image_resolution_schedule=schedule)


def test_what_cannot_follow_a_schedule_is_named(tmp_path):
    with pytest.raises(ValueError, match="image_resolution_schedule must be None with use_vllm"):
        config(tmp_path, image_resolution_schedule=SCHEDULE, use_vllm=True, vllm_mode="server")
    with pytest.raises(ValueError, match=r"min_pixels <= max_pixels at step 0.*, got 784 and 10"):
        ResolutionSchedule.from_list([{"step": 0, "max_pixels": 10}]).check(tiny.processor())
    for family in ("llava", "gemma3", "idefics3", "gemma4", "text"):  # their images have other limits, or none
        with pytest.raises(ValueError, match="with an image processor without min_pixels and max_pixels, got "):
            ResolutionSchedule.from_list(SCHEDULE).check(case(family).processor)
    for family in ("qwen3_vl", "glm4v", "ernie4_5_vl_moe", "hunyuan_vl"):
        ResolutionSchedule.from_list([{"step": 0, "max_pixels": 10000}]).check(case(family).processor)
