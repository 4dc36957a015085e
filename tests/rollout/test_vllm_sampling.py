"""What vLLM is sent and returns besides tokens: videos, log-probabilities of truncated sampling, sampling masks, experts."""

import base64
import re

import pytest
import torch
from support import tiny, tiny_families
from support.fake_vllm import experts_of
from support.vllm_engines import FakeRun

from vlmkernels.models.head import completion_logps, logit_arguments, output_head
from vlmkernels.rollout.base import RolloutError
from vlmkernels.rollout.vllm import engine as vllm_engine
from vlmkernels.rollout.vllm import experts as vllm_experts
from vlmkernels.rollout.vllm.config import logprobs_modes

torch.set_num_threads(1)
MODES = ["server", "colocate"]


@pytest.fixture
def make(tmp_path, monkeypatch):
    runs = []

    def make(mode, setup=lambda fake: None, **options):
        runs.append(FakeRun(mode, tmp_path / "weights", monkeypatch, setup=setup, **options))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


# Videos


def rows_with_videos():
    """An image; a video of 3 frames; two images around two videos of 2 and 4 frames."""
    rows = tiny.rows(3, "videos")
    rows[2]["images"].append(tiny.image(60, width=56))
    rows[2]["videos"].append([tiny.image(50 + k) for k in range(2)])
    kinds = ["image", "video", "text", "video", "image"]
    rows[2]["prompt"] = [
        {"role": "user", "content": [{"type": k, "text": "what?"} if k == "text" else {"type": k} for k in kinds]}
    ]
    return rows


def with_videos(num_frames=-1, fps=2):
    def setup(fake):
        fake.config["multimodal_config"] = {"media_io_kwargs": {"video": {"num_frames": num_frames, "fps": fps}}}
        fake.config["max_model_len"] = 1024

    return setup


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fps", [2, 0.5])
def test_videos(make, mode, fps):
    """All frames arrive unchanged, with their frame rate: vLLM's log-probabilities are the trainer's."""
    run = make(mode, setup=with_videos(fps=fps))
    rollout = run.sample([{**row, "fps": fps} for row in rows_with_videos()])
    head = output_head(run.model)
    options = {"head": head, "arguments": logit_arguments(run.model, head), "temperature": 1.0}
    with torch.no_grad():
        expected = completion_logps(run.model, rollout.padded(torch.arange(6)), **options)
    torch.testing.assert_close(rollout.logps[rollout.completion_mask], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (with_videos(num_frames=2), 'frames": -1, "fps": 2}}\' for the 3 frames of sample 1, got num_frames 2 and fps 2'),
        (with_videos(fps=1), '"fps": 2}}\' for the 3 frames of sample 1, got num_frames -1 and fps 1'),
    ],
)
def test_a_server_that_would_change_videos(make, setup, message):
    run = make("server", setup=setup)
    with pytest.raises(ValueError, match=f"it must be started with --media-io-kwargs .*{re.escape(message)}"):
        run.sample(rows_with_videos())
    assert len(run.sample(rows_with_videos()[:1]).group) == 2


# Log-probabilities


def expected_logps(run, rollout, temperature, top_k=None):
    """Return log-probabilities of the sampled tokens, in fp64: of the whole vocabulary, and with which they were sampled."""
    batch = rollout.padded(torch.arange(len(rollout.group)))
    with torch.no_grad():
        logits = run.model(**batch.inputs).logits.flatten(0, 1)[batch.rows].double() / temperature
    allowed = logits.clone()
    allowed[:, run.engine.banned] = -torch.inf
    if top_k is not None:
        allowed[allowed < allowed.topk(top_k).values[:, -1:]] = -torch.inf
    return [x.log_softmax(-1).gather(1, batch.targets.unsqueeze(1))[:, 0].float() for x in (logits, allowed)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_truncated_sampling(make, mode, temperature):
    """Those with which tokens were sampled are exact at any temperature; those of the whole vocabulary are not known."""
    setup = lambda fake: fake.config.update(logprobs_mode="processed_logprobs")  # noqa: E731
    run = make(mode, setup=setup, vllm={"policy": "truncated"}, temperature=temperature, top_k=5)
    rollout = run.sample(tiny.rows(2, "several"), num_generations=8)
    _, expected = expected_logps(run, rollout, temperature, top_k=5)
    assert rollout.logps is None
    assert rollout.log_kept_mass is None
    torch.testing.assert_close(rollout.sampling_logps[rollout.completion_mask], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_raw_log_probabilities_of_truncated_sampling(make, mode):
    """Without a correction, or with one of the policy "full", those of the whole vocabulary are returned at temperature 1."""
    run = make(mode, vllm={"policy": "full"}, top_k=5)
    rollout = run.sample(tiny.rows(2, "several"))
    expected, _ = expected_logps(run, rollout, 1.0)
    assert rollout.log_kept_mass is None
    assert rollout.sampling_logps is None
    torch.testing.assert_close(rollout.logps[rollout.completion_mask], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("temperature", "restrictions", "modes"),
    [
        (1.0, {}, {None: "raw processed", "full": "raw processed", "truncated": "processed"}),
        (0.7, {}, {None: "processed", "full": "processed", "truncated": "processed"}),
        (1.0, {"top_k": 5}, {None: "raw processed", "full": "raw", "truncated": "processed"}),
        (0.7, {"top_p": 0.9}, {None: "processed", "full": "", "truncated": "processed"}),
        (0.7, {"repetition_penalty": 1.1}, {None: "processed", "full": "", "truncated": "processed"}),
    ],
)
def test_modes(temperature, restrictions, modes):
    sampling = vllm_engine.Sampling(4, temperature=temperature, **restrictions)
    for policy, names in modes.items():
        assert logprobs_modes(sampling, policy) == [f"{name}_logprobs" for name in names.split()]


# Sampling masks


def returns_mask(fake):
    fake.config |= {"logprobs_mode": "processed_logprobs", "return_sampling_mask": True}


def test_a_server_that_returns_sampling_masks(make):
    """It refuses requests at temperature 0 and without top_k, so greedy ones have top_k 1, also those of fingerprints."""
    run = make("server", setup=returns_mask, top_k=5, temperature=0.7)
    rollout = run.sample(tiny.rows(2, "several"), num_generations=4)
    _, expected = expected_logps(run, rollout, 0.7, top_k=5)
    torch.testing.assert_close(rollout.sampling_logps[rollout.completion_mask], expected, atol=1e-5, rtol=0)
    greedy = run.sample(tiny.rows(2, "several"), temperature=0.0)
    assert greedy.sampling_logps is None
    best = [len({*ids}) for ids in greedy.completion_ids[:, 0].view(2, 2).tolist()]
    assert best == [1, 1]
    for body in run.fake.bodies:
        assert body["sampling_params"]["temperature"] > 0
    with pytest.raises(ValueError, match=r"without --return-sampling-mask, or top_k must be > 0, got 0"):
        make("server", setup=returns_mask)


def test_a_mask_without_the_sampled_token(make):
    run = make("server", setup=returns_mask, top_k=5)

    def change(answer, number):
        for choice in answer["choices"]:
            choice["sampling_mask"] = [
                [token for token in mask if token not in choice["token_ids"]] for mask in choice["sampling_mask"]
            ]
        return answer

    run.fake.change["/inference/v1/generate"] = change
    with pytest.raises(RolloutError, match="must return a sampling mask with every sampled token, got"):
        run.sample(tiny.rows(2, "several"))


# Experts


@pytest.fixture
def layers(monkeypatch):
    """The second and the fourth of four layers of vLLM have experts."""
    monkeypatch.setattr(vllm_engine, "moe_layers", lambda model: [1, 3])


@pytest.mark.parametrize("mode", MODES)
def test_experts(make, layers, mode):
    """Experts of MoE layers in the layout of prompts and completions; -1 for padding and for the last token."""
    run = make(mode, setup=lambda fake: setattr(fake, "num_experts", (4, 2)), vllm={"routed_experts": True})
    rollout = run.sample(tiny.rows(3, "several"))
    assert run.engine.returns_experts
    assert mode == "server" or run.module.options["enable_return_routed_experts"]
    prompts, completions = rollout.routed_experts
    assert prompts.dtype == completions.dtype == torch.int16
    inputs = rollout.prompts.inputs
    for k, prompt in enumerate(rollout.group.tolist()):
        kept = inputs["attention_mask"][prompt].bool()
        tokens = inputs["input_ids"][prompt][kept].tolist() + rollout.token_ids()[k]
        experts = torch.from_numpy(experts_of(tokens, (4, 2))[:, [1, 3]]).short()
        assert torch.equal(prompts[prompt][kept], experts[: int(kept.sum())])
        assert (prompts[prompt][~kept] == -1).all()
        width = len(tokens) - int(kept.sum())
        assert torch.equal(completions[k, : width - 1], experts[int(kept.sum()) : -1])
        assert (completions[k, width - 1 :] == -1).all()


def test_a_server_without_experts(make, layers):
    with pytest.raises(ValueError, match=r"be started with --enable-return-routed-experts for router_replay, got no experts"):
        make("server", vllm={"routed_experts": True})


@pytest.mark.parametrize("content", ["", base64.b64encode(b"experts").decode()])
def test_experts_that_cannot_be_read(make, layers, content):
    run = make("server", setup=lambda fake: setattr(fake, "num_experts", (4, 2)), vllm={"routed_experts": True})

    def change(answer, number):
        for choice in answer["choices"]:
            choice["routed_experts"] = content
        return answer

    run.fake.change["/inference/v1/generate"] = change
    with pytest.raises(RolloutError, match=r"vLLM's reply must be that of /inference/v1/generate"):
        run.sample(tiny.rows(1))


@pytest.mark.parametrize("shape", [None, (2, 2)])
def test_missing_experts(make, layers, shape):
    run = make("server", setup=lambda fake: setattr(fake, "num_experts", (4, 2)), vllm={"routed_experts": True})
    run.fake.num_experts = shape
    with pytest.raises(
        RolloutError, match=r"sample 0.*: vLLM must return the experts of \d+ tokens and of at least 4 layers, got"
    ):
        run.sample(tiny.rows(1))


def test_layers_with_experts():
    with pytest.raises(ValueError, match="router_replay must be False with a model without experts, got True with Qwen2_5"):
        vllm_experts.moe_layers(tiny.vlm())
    model = tiny_families.case("qwen3_vl_moe").model
    expected = [k for k, layer in enumerate(model.get_decoder().layers) if hasattr(layer.mlp, "experts")]
    assert vllm_experts.moe_layers(model) == expected
    assert expected


def test_layers_with_two_routers():
    """Each of the two routers of Ernie runs on some of the tokens, and vLLM does not say on which."""
    with pytest.raises(ValueError, match="a model with separate routers for images and text, got True with Ernie4_5_VLMoe"):
        vllm_experts.moe_layers(tiny_families.case("ernie4_5_vl_moe").model)
