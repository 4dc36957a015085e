"""``GRPOConfig.router_replay``: the trainer uses the experts of the rollout, also after a resume."""

import pytest
import torch
import transformers
from support import tiny
from support.groups import amplified
from support.tiny_families import EXPERTS
from support.training import FixedGenerate, Gradients, config, length_reward, train

from vlmkernels.models.router_replay import RoutedExperts
from vlmkernels.train import GRPOTrainer
from vlmkernels.train.agreement import measure_agreement
from vlmkernels.train.experience import Experience

torch.set_num_threads(1)


def trainer_of(tmp_path, **options):
    torch.manual_seed(0)
    vocab = {"vocab_size": len(tiny.tokenizer()), "head_dim": 8}
    model = amplified(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**tiny.TEXT, **EXPERTS, **vocab)))
    args = config(tmp_path, max_completion_length=8, **options)
    return GRPOTrainer(model, [length_reward], args, tiny.rows(8, "none"), processing_class=tiny.tokenizer())


def test_training(tmp_path):
    """Routers change between the rollout and the second pass over its batch, and use the same experts all the same."""
    options = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 2, "beta": 0.1, "max_tokens_per_microbatch": 60}
    trainer = trainer_of(tmp_path, router_replay=True, gradient_checkpointing=True, **options)
    passes = []

    def note(module, args, output):
        layer = module.expert_replay
        passes.append(
            (
                layer.given is not None,
                None
                if layer.given is None
                else torch.equal(output[2][layer.given[:, 0] >= 0].short(), layer.given[layer.given[:, 0] >= 0]),
            )
        )

    trainer.model.model.layers[0].mlp.gate.register_forward_hook(note)
    logs = train(trainer, Gradients())
    assert logs[0]["sampling/sampling_logp_difference/max"] < 1e-4
    replayed = [same for given, same in passes if given]
    assert len(replayed) >= 8  # forward and recomputation of two passes over two micro-batches
    assert all(replayed)
    assert any(not given for given, _ in passes)  # of the rollout
    reference = []
    trainer.ref_model.model.layers[0].mlp.gate.register_forward_hook(lambda m, a, o: reference.append(m.expert_replay.given))
    trainer.objective.add_fixed_logps(trainer.model_wrapped, trainer.policy, trainer._experience)
    assert reference
    assert all(given is None for given in reference)

    random_state = torch.random.get_rng_state()
    found = measure_agreement(
        trainer.model, trainer.tokenizer, trainer.engine, trainer.prepared, trainer.args, trainer.accelerator
    )
    assert 2 <= found.tokens <= 8
    assert found.mean <= found.max < 1e-4
    assert f"at most {found.max:.1e} ({found.tokens} tokens, float32)" in str(found)
    assert torch.equal(torch.random.get_rng_state(), random_state)

    state = trainer._experience.state_dict()
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    restored = Experience.from_state_dict(state, trainer.prepared.family, torch.device("cpu"))
    assert isinstance(restored.rollout.routed_experts, RoutedExperts)
    for one, other in zip(restored.rollout.routed_experts, trainer._experience.rollout.routed_experts, strict=True):
        assert torch.equal(one, other)
    restored.uses = 2
    kept = {"has_rewards": True, "has_teacher": False}
    restored.check_arguments(trainer.args, "here", **kept)
    with pytest.raises(
        ValueError, match="saved mid-batch: router_replay must be True, as when its batch was sampled, got False"
    ):
        restored.check_arguments(config(tmp_path, **options), "here", **kept)


def test_an_engine_without_experts(tmp_path):
    trainer = trainer_of(tmp_path, router_replay=True)
    trainer.engine = FixedGenerate(trainer)
    with pytest.raises(
        ValueError, match="router_replay must be False with an engine that returns no experts, such as FixedGenerate, got True"
    ):
        trainer.train()


def test_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"router_replay must be False with model\.generate, which records no experts \(share_pr"
    ):
        trainer_of(tmp_path, router_replay=True, share_prefix=False)
    args = config(tmp_path, router_replay=True)
    with pytest.raises(NotImplementedError, match="model must support router replay: Qwen2ForCausalLM must have MoE layers"):
        GRPOTrainer(tiny.text_model(), [length_reward], args, tiny.rows(8, "none"), processing_class=tiny.tokenizer())
