"""The agreement of rollout and training that the trainer measures at set-up."""

import pytest
import torch
from support import tiny
from support.training import config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmkernels.train import GRPOTrainer, agreement
from vlmkernels.train.agreement import measure_agreement

torch.set_num_threads(1)


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def trainer_of(tmp_path, tokenizer=None, data=None, **options):
    model = tiny.text_model()
    args = config(tmp_path, **options)
    rows = tiny.rows(8, "none") if data is None else data
    return GRPOTrainer(model, length, args, rows, processing_class=tokenizer or tiny.tokenizer())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}, {"share_prefix": True, "max_num_seqs": 1}], ids=str)
def test_the_difference_is_that_of_the_logps(tmp_path, capsys, monkeypatch, options):
    """Both passes agree; if training is off by 0.25 for one token, the mean and the maximum say so."""
    trainer = trainer_of(tmp_path, **options)
    arguments = trainer.model, trainer.processing_class, trainer.engine, trainer.prepared, trainer.args, trainer.accelerator
    state, sampling = torch.get_rng_state(), trainer.engine.sampling
    found = measure_agreement(*arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.engine.sampling is sampling
    assert (found.tokens, found.dtype) == (8, "float32")
    assert found.max < 1e-5
    assert f"{found}\n" in capsys.readouterr().out
    original = agreement.completion_logps

    def shifted(*args, **kwargs):
        logps = original(*args, **kwargs)
        return logps.index_add(0, torch.tensor([3]), torch.tensor([0.25]))

    monkeypatch.setattr(agreement, "completion_logps", shifted)
    found = measure_agreement(*arguments)
    assert found.max == pytest.approx(0.25, abs=1e-5)
    assert found.mean == pytest.approx(0.25 / 8, abs=1e-5)


def digits():
    """A tokenizer of the digits alone."""
    bpe = Tokenizer(models.BPE(vocab={str(k): k for k in range(10)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>", padding_side="left")


def test_a_tokenizer_without_english(tmp_path, capsys):
    """Training goes on, and the line says why nothing was measured."""
    trainer = trainer_of(tmp_path, digits(), [{"prompt": "12"}, {"prompt": "345"}] * 4)
    assert "Agreement of rollout and training: not measured. The tokenizer encodes " in capsys.readouterr().out
    trainer.train()
    assert trainer.state.global_step == 1
    assert "agreement of rollout and training" not in (tmp_path / "run.json").read_text()
