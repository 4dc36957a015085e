"""Dynamic sampling and oversampling: which groups a batch has, what is logged, where it stops, and exact resume."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from support import tiny
from support.distributed import dynamic
from support.training import config, vowel_reward

from vlmkernels.models.image_features import encode_images
from vlmkernels.ops.group_advantages import group_advantages
from vlmkernels.rewards import Rewards, Scores
from vlmkernels.train.dynamic_sampling import has_spread
from vlmkernels.train.prepare import encode_prompts
from vlmkernels.train.sampler import PromptStream

torch.set_num_threads(1)
ONE = {"max_steps": 1, "num_iterations": 1, "save_strategy": "no", "shuffle_dataset": False}


def rows_of_batch(trainer):
    """The rows of the groups that the last batch was trained on."""
    samples, _, _ = trainer._last_scored
    return [sample.index for sample in samples.samples[:: trainer.args.num_generations]]


def train(folder, **options):
    """The trainer of one step, the rows of each round of sampling, and the log."""
    trainer, reward = dynamic.build(folder, **{**ONE, **options})
    trainer.train()
    return trainer, [rows for _, rows, _ in reward.calls], trainer.state.log_history[0]


def test_batches_are_filled_with_groups_whose_rewards_differ(tmp_path):
    """Three groups are missing after the first round, which kept one of four: the second has four rows, a whole batch."""
    trainer, reward = dynamic.build(tmp_path, **ONE)
    trainer.train()
    log = trainer.state.log_history[0]
    assert [rows for _, rows, _ in reward.calls] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows_of_batch(trainer) == [3, 4, 5, 6]
    assert trainer._experience.advantages.view(4, 4).ne(0).any(1).all()
    lengths = [len(ids) for _, _, completions in reward.calls for ids in completions]
    names = ("kept", "filled", "rounds", "prompts_sampled", "epochs", "tokens_per_kept")
    expected = [5 / 8, 0, 2, 8, 8 / 14, sum(lengths) / 16]
    assert [log[f"dynamic_sampling/{name}"] for name in names] == pytest.approx(expected)
    assert log["dynamic_sampling/seconds_per_kept"] > 0
    assert log["frac_reward_zero_std"] == 3 / 8  # of all sampled completions, like the metrics below
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 32)
    prompts = trainer._experience.rollout.prompts.inputs["attention_mask"].sum(1)
    assert prompts.unique().numel() == 1
    assert log["num_tokens"] == sum(lengths) + 32 * int(prompts[0])
    assert len(trainer._last_scored[0].completions) == 16


def test_a_full_first_round_changes_nothing(tmp_path):
    """Samples, losses and parameters are those of a run without the options, on prompts in the same order."""
    rows = [{**row, "level": 1.0} for row in dynamic.data()[:12]]
    options = {"rows": rows, "save_strategy": "no", "max_steps": 4}
    plain, first = dynamic.build(tmp_path, dynamic_sampling=False, **options)
    plain.train()
    chosen, second = dynamic.build(tmp_path, **options)
    chosen.train()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(plain.args.seed)).tolist()
    assert [rows for _, rows, _ in first.calls] == [order[start : start + 4] for start in (0, 4)]
    assert first.calls == second.calls
    for one, other in zip(plain.model.parameters(), chosen.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("factor", "rounds", "batch"),
    [(1.25, [[0, 1, 2, 3, 4]], [3, 4, 1, 2]), (2, [[*range(8)]], [3, 4, 5, 6]), (1.5, [[*range(6)]], [3, 4, 5, 2])],
)
def test_oversampling_has_one_round(tmp_path, factor, rounds, batch):
    """The first groups with different rewards, then the last of the others."""
    trainer, sampled, log = train(tmp_path, dynamic_sampling=False, oversampling=factor)
    assert sampled == rounds
    assert rows_of_batch(trainer) == batch
    assert log["dynamic_sampling/filled"] == sum(row in dynamic.EQUAL for row in batch) / 4


def test_oversampling_is_the_first_round_of_dynamic_sampling(tmp_path):
    _, rounds, _ = train(tmp_path, oversampling=1.25, per_device_train_batch_size=8)
    assert rounds == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]


def equal_but(*different):
    return [{**row, "level": float(index in different)} for index, row in enumerate(dynamic.data())]


def test_batches_that_cannot_be_filled_have_the_newest_other_groups(tmp_path, caplog):
    options = {"rows": equal_but(5), "max_resample_times": 2}
    trainer, rounds, log = train(tmp_path, **options)
    assert rounds == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert rows_of_batch(trainer) == [5, 9, 10, 11]
    assert trainer._experience.advantages.view(4, 4).ne(0).any(1).tolist() == [True, False, False, False]
    assert log["dynamic_sampling/filled"] == 3 / 4
    train(tmp_path, **options, max_steps=3)  # the prompts of the stream come round to row 5 again
    warnings = [record.message for record in caplog.records if "dynamic_sampling" in record.message]
    assert len(warnings) == 2  # once per run
    assert "3 groups of a batch have equal rewards and so no advantage, because too few of 12 prompts had" in warnings[0]


def test_no_group_with_different_rewards_stops_with_the_reason(tmp_path):
    def right(completions, **kwargs):
        return [1.0] * len(completions)

    def unscored(completions, **kwargs):
        return [None] * len(completions)

    expected = (
        r"got none among 12 prompts with 4 completions each in 3 rounds \(max_resample_times=2\)\. Rewards: right: 1 for 48 "
        r"completions; unscored: not scored for 48 completions\. Use easier prompts .* higher temperature than 0\.8$"
    )
    with pytest.raises(RuntimeError, match=expected):
        train(tmp_path, reward=[right, unscored], max_resample_times=2, temperature=0.8)
    with pytest.raises(RuntimeError, match="Rewards: calls: 0 for 176 completions"):
        train(tmp_path, rows=equal_but())


def test_resume_is_exact(tmp_path):
    whole = dynamic.run(tmp_path)
    for checkpoint, step in dynamic.RESUMED.items():
        resumed = whole["resumed"][checkpoint]
        assert resumed["calls"] == [[call for call in calls if call[0] >= step] for calls in whole["calls"]]
        assert resumed["same"] == [True]
    rows = [row for step in (0, 2, 4) for row in dynamic.rows_of(whole["calls"], step)]
    assert len(rows) > dynamic.NUM_ROWS
    assert {*Counter(rows[: dynamic.NUM_ROWS]).values()} == {1}


def test_a_run_without_the_option_continues_with_it(tmp_path):
    """After the rows of its batches; the last two of 14 rows fill no batch of the dataloader."""
    args = config(tmp_path, per_device_train_batch_size=8, num_iterations=2, gradient_accumulation_steps=2)
    for step, visited in {0: 0, 1: 4, 2: 4, 3: 8, 6: 14, 7: 18}.items():
        (tmp_path / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        stream = PromptStream(14, args)
        stream.restore(str(tmp_path))
        assert stream.position == visited


def test_every_epoch_visits_every_prompt_once(tmp_path):
    stream = PromptStream(14, config(tmp_path, shuffle_dataset=True))
    rows = [row for count in (5, 3, 9, 1, 10) for row in stream.take([count])]
    assert sorted(rows[:14]) == sorted(rows[14:]) == [*range(14)]
    assert rows[:14] != rows[14:]
    assert stream.epochs == 2


def test_groups_without_an_advantage_have_no_spread():
    nan, rewards = math.nan, Rewards([vowel_reward, dynamic.Calls()], [1.0, -1.0])
    values = torch.tensor([[1, 1], [0, 0], [1, 2], [1, 1], [nan, 1], [nan, nan], [nan, 1], [nan, 2]])
    scores = Scores(values, values.bool(), values.bool(), torch.zeros(2))
    found = has_spread(scores, rewards, 2)
    assert found.tolist() == [False, True, False, True]  # 1 - 1 = 0 - 0; only one completion is scored
    assert found.tolist() == (~group_advantages(values, 2, weights=rewards.weights).degenerate[::2]).tolist()
    # The sums of the rewards of turns are equal, but not those of the second turn.
    turns = torch.tensor([[1.0, 1.0], [2.0, 0.0], [1.0, nan], [1.0, nan]])
    none = torch.full((4, 2), nan)
    scores = Scores(none, none.bool(), none.bool(), torch.zeros(2), torch.ones(4, 2, dtype=torch.bool), turns)
    assert has_spread(scores, rewards, 2).tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"oversampling": 0.5}, "oversampling must be finite and >= 1, got 0.5"),
        ({"oversampling": math.inf}, "oversampling must be finite and >= 1, got inf"),
        ({"oversampling": "2"}, "oversampling must be a number, got '2'"),
        ({"max_resample_times": 0}, "max_resample_times must be >= 1, got 0"),
        ({"max_resample_times": 1.5}, "max_resample_times must be an integer, got 1.5"),
    ],
)
def test_values_out_of_range(tmp_path, options, rule):
    with pytest.raises((TypeError, ValueError), match=rule):
        config(tmp_path, **options)


def test_datasets_hold_the_prompts_of_a_round(tmp_path):
    with pytest.raises(
        ValueError, match=r"must hold at least the 16 prompts of the first round .* with oversampling = 4, got 14"
    ):
        dynamic.build(tmp_path, oversampling=4)
    assert config(tmp_path, oversampling=1.1, per_device_train_batch_size=20).prompts_per_round == 11


def test_skipped_rows(tmp_path):
    """The next usable row takes the place of one that cannot be encoded."""
    rows = dynamic.data()
    rows[4]["prompt"] = [{"role": "user", "content": "a " * 60}]
    trainer, _, log = train(tmp_path, rows=rows, max_prompt_length=40, on_bad_sample="skip")
    assert rows_of_batch(trainer) == [3, 5, 5, 6]
    assert log["frac_samples_replaced"] == 1 / 8


def test_image_features_of_a_frozen_tower(tmp_path):
    """Features of several rounds are those of the images of the batch."""
    model = tiny.vlm()
    model.model.visual.requires_grad_(False)
    rows = [{**row, "level": float(index > 1)} for index, row in enumerate(tiny.rows(8, "mixed"))]
    trainer, _ = dynamic.build(tmp_path, rows=rows, model=model, **ONE)
    trainer.train()
    prompts, indices = trainer._experience.rollout.prompts, rows_of_batch(trainer)
    assert indices == [2, 3, 4, 5]
    encode = partial(encode_prompts, processor=trainer.processing_class, prepared=trainer.prepared, args=trainer.args)
    _, expected = trainer.samples.encode(trainer.samples.__getitems__(indices), encode)
    if trainer.prepared.reuses_image_features:
        expected = encode_images(trainer.prepared.model, expected)
    assert torch.equal(prompts.image_keys, expected.image_keys)
    for name, value in expected.inputs.items():
        torch.testing.assert_close(prompts.inputs[name], value, msg=name)
