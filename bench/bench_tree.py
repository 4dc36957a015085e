"""Models over packs of trees, compared with a copy of its path for every rollout.

A provider runs the forward and backward passes of a sum of log-probabilities: "vlmkernels" over one pack, in which each segment
and image occurs once, the other with the unmodified model of transformers over the paths from the roots to the leaves. Both
compute log-probabilities by ``linear_logps``, and a token counts once for every path that has it.

    python bench/bench_tree.py --sweep     # cost against depth and branching: writes bench/results/tree-cost-<device>.json
    python bench/tree_plot.py              # plots it
"""

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import harness
import pytest
import torch
from bench_tree_attention import Copies, differentiate, leaves
from step_models import make_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from vlmkernels.models.attention import use_tree_attention
from vlmkernels.models.families import family_of
from vlmkernels.models.head import completion_logps, output_head
from vlmkernels.models.inputs import ModelInputs
from vlmkernels.models.packs import ScoringBatch, pack_trees
from vlmkernels.ops.tree_attention import TreeLayout, tree_attention

SIZES = {"width": 256, "layers": 6, "depth": 4, "vocab": 32000}
COMPLETION, SEGMENT = 64, 32  # tokens of a completion or action, and of a segment of ``forks``
DTYPE, TOLERANCE = torch.float32, 1e-3
if harness.GPU:
    SIZES |= {"width": 2048, "layers": 12, "depth": 8}
    COMPLETION, SEGMENT = 256, 256
    DTYPE, TOLERANCE = torch.bfloat16, 5e-2
SIDE, IMAGE_TOKENS = 448, 256  # of an image
FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_5": "Qwen3.5-VL", "gemma3": "Gemma 3"}
DEPTHS, BRANCHINGS = (1, 2, 3, 4, 6, 8, 12), (2, 4, 8)  # of the sweep


def model_of(family: str = "qwen2_5_vl") -> PreTrainedModel:
    return make_model(**SIZES, family=family).to(DTYPE)


@dataclass(frozen=True)
class Tree:
    """Segments of a tree, of which some begin with an image and some are scored.

    Args:
        lengths, parents: see ``TreeLayout``; the length of an image is included.
        images: the segments that begin with an image.
        scored: the segments whose tokens are scored, except the first token of a root.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    images: frozenset[int] = frozenset()
    scored: frozenset[int] = frozenset()

    @property
    def layout(self) -> TreeLayout:
        return TreeLayout(self.lengths, self.parents)

    def loss_mask(self) -> torch.Tensor:
        """(S, L) bool."""
        mask = torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)
        mask &= torch.tensor([segment in self.scored for segment in range(len(self.lengths))]).unsqueeze(1)
        mask[[parent < 0 for parent in self.parents], 0] = False
        return mask


def group(prompt: int, completions: Sequence[int]) -> Tree:
    """A prompt with an image, and its completions."""
    members = range(1, 1 + len(completions))
    return Tree((prompt, *completions), (-1, *[0] * len(members)), frozenset({0}), frozenset(members))


def rollouts(turns: int, forks: Sequence[tuple[int, int]], observation: int, action: int) -> Tree:
    """Rollouts of alternating observations, which begin with an image, and actions, which are scored.

    Args:
        turns: the number of turns of each rollout.
        forks: for each rollout after the first, an earlier rollout and the turn at whose action it leaves that rollout.
        observation, action: the number of tokens of each.
    """
    children: dict[tuple, list[tuple]] = {}
    ends: list[tuple] = []  # the last node of each rollout; a node is the indices of the choices on its path
    for other, fork in [(-1, 0), *forks]:
        path = ends[other][: 2 * fork - 1] if other >= 0 else ()
        while len(path) < 2 * turns:
            siblings = children.setdefault(path, [])
            path = (*path, len(siblings))
            siblings.append(path)
        ends.append(path)
    nodes = sorted(path for siblings in children.values() for path in siblings)  # depth first
    place = {path: segment for segment, path in enumerate(nodes)}
    observations = frozenset(place[path] for path in nodes if len(path) % 2)
    lengths = tuple(observation if segment in observations else action for segment in range(len(nodes)))
    parents = tuple(place.get(path[:-1], -1) for path in nodes)
    return Tree(lengths, parents, observations, frozenset(range(len(nodes))) - observations)


def halved(turns: Sequence[int]) -> list[tuple[int, int]]:
    """The argument ``forks`` of ``rollouts`` if all rollouts fork in two at the given turns."""
    return [(rollout, turn) for level, turn in enumerate(turns) for rollout in range(2**level)]


def forks(depth: int, branching: int, length: int) -> Tree:
    """A fork at every level: each level has ``branching`` segments, and one of them continues."""
    parents, trunk = [-1], 0
    for level in range(1, depth):
        leaves = branching - 1 if level < depth - 1 else branching
        parents += [trunk] * leaves
        if level < depth - 1:
            parents.append(trunk)
            trunk = len(parents) - 1
    return Tree((length,) * len(parents), tuple(parents), scored=frozenset(range(len(parents))))


def segments_of(tree: Tree, model: PreTrainedModel) -> ModelInputs:
    """Model inputs with random text and images for the segments of a tree."""
    rng, family = torch.Generator().manual_seed(0), family_of(model.config)
    gemma = family.name == "gemma3"
    first, width = torch.arange(max(tree.lengths)), len(tree.lengths)
    ids = torch.randint(64, model.config.text_config.vocab_size, (width, len(first)), generator=rng)  # no special tokens
    shown = torch.tensor([segment in tree.images for segment in range(width)]).unsqueeze(1)
    on_image = shown & (first >= 1) & (first <= IMAGE_TOKENS)
    start = model.config.boi_token_index if gemma else model.config.vision_start_token_id
    ids[shown[:, 0], 0] = start
    ids[shown[:, 0], IMAGE_TOKENS + 1 : IMAGE_TOKENS + 2] = start + 1
    ids[on_image] = family.image_token_id
    mask = (first < torch.tensor(tree.lengths).unsqueeze(1)).long()
    types = "token_type_ids" if gemma else "mm_token_type_ids"
    inputs = {"input_ids": ids, "attention_mask": mask, types: on_image.long()}
    number = len(tree.images)
    if number and gemma:
        inputs["pixel_values"] = torch.randn(number, 3, SIDE, SIDE, generator=rng).to(DTYPE)
    elif number:
        side = SIDE // 14
        inputs["pixel_values"] = torch.randn(number * side * side, 3 * 2 * 14 * 14, generator=rng).to(DTYPE)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * number)
    return ModelInputs.from_processor(inputs, family, shown[:, 0].long()).to(harness.DEVICE)


def leaves_by_length(layout: TreeLayout) -> list[list[int]]:
    """The leaves, in a list for the paths of each length."""
    chosen: dict[int, list[int]] = {}
    for leaf in leaves(layout):
        chosen.setdefault(layout.offsets[leaf] + layout.lengths[leaf], []).append(leaf)
    return [chosen[length] for length in sorted(chosen)]


def copies_of(tree: Tree, segments: ModelInputs, batches: Sequence[Sequence[int]]) -> list[ScoringBatch]:
    """Copies of the paths to leaves. Those of a batch must have the same length."""
    layout, loss, result = tree.layout, tree.loss_mask(), []
    for chosen in batches:
        paths = torch.tensor([segment for leaf in chosen for segment in layout.path(leaf)])
        inputs = dict(segments.select(paths).inputs)
        valid = inputs["attention_mask"].bool()
        for name in inputs:
            if segments.family.axis(name) == "token":
                inputs[name] = inputs[name][valid].view(len(chosen), -1)
        targets = loss[paths].to(valid.device)[valid].nonzero()[:, 0]
        result.append(ScoringBatch(inputs, targets - 1, inputs["input_ids"].flatten()[targets]))
    return result


class Passes:
    """The passes over a tree with one model, by both providers. Each returns the loss and the gradients of all parameters."""

    def __init__(self, model: PreTrainedModel, tree: Tree):
        self.tree, self.segments = tree, segments_of(tree, model)
        self.model, self.packing = model, use_tree_attention(copy.deepcopy(model))
        self.batches = copies_of(tree, self.segments, leaves_by_length(tree.layout))
        self.loss_mask = tree.loss_mask().to(harness.DEVICE)
        paths = torch.tensor(tree.layout.num_paths).unsqueeze(1).expand(self.loss_mask.shape)
        self.weights = paths[self.loss_mask.cpu()].float().to(harness.DEVICE)

    def run(self, model: PreTrainedModel, batches: Sequence[ScoringBatch], weights: torch.Tensor | None = None):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            logps = completion_logps(model, batch, head=output_head(model), arguments={}, temperature=1.0)
            loss = -(logps if weights is None else logps * weights).sum()
            loss.backward()
            total += loss.detach()
        return total, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    def pack(self):
        """The pack is built in every pass, as in training."""
        batch = pack_trees(self.packing, self.segments, self.tree.parents, self.loss_mask)
        return self.run(self.packing, [batch], self.weights)

    def copies(self):
        return self.run(self.model, self.batches)

    def exact(self):
        """The result in fp64, one path after another."""
        batches = copies_of(self.tree, self.segments, [[leaf] for leaf in leaves(self.tree.layout)])
        for batch in batches:
            batch.inputs.update({name: x.double() for name, x in batch.inputs.items() if x.is_floating_point()})
        return self.run(copy.deepcopy(self.model).double(), batches)


def gradient_error(actual, expected) -> tuple[float, float]:
    """Relative errors of the loss, and of the gradient of the parameter where it is largest.

    Gradients are compared by their L2 norms, very small ones relative to 1e-3 times the root mean square of all norms.
    """
    (loss, gradients), (exact, wanted) = actual, expected
    assert gradients.keys() == wanted.keys(), f"gradients of {gradients.keys() ^ wanted.keys()} by one provider only"
    whole = sum(x.double().square().sum() for x in wanted.values()).sqrt() / len(wanted) ** 0.5
    errors = {
        name: ((gradients[name].double() - x).norm() / torch.maximum(x.norm(), 1e-3 * whole)).item()
        for name, x in wanted.items()
    }
    return abs((loss.double() - exact) / exact).item(), max(errors.values())


def compare_models(benchmark, title: str, model: PreTrainedModel, tree: Tree, limit_s: float = 60.0) -> None:
    passes = Passes(model, tree)
    exact = passes.exact()

    def check(name, result):
        loss, gradient = gradient_error(result, exact)
        assert max(loss, gradient) < TOLERANCE, f"{name} is wrong: relative errors {loss:.0e} and {gradient:.0e}"
        return f"loss {loss:.0e}, gradient {gradient:.0e}"

    providers = {"vlmkernels": passes.pack, "transformers, copies": passes.copies}
    harness.compare(benchmark, harness.Case(title, providers, check, limit_s=limit_s))


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_group(benchmark, family):
    """A prompt of 269 tokens with an image, and 8 completions."""
    title = f"tree {FAMILIES[family]}, P 269 with an image, 8 x {COMPLETION}"
    compare_models(benchmark, title, model_of(family), group(IMAGE_TOKENS + 13, [COMPLETION] * 8))


def test_rollouts(benchmark):
    """8 rollouts of 6 turns, of an image with 14 tokens of text and an action each. All fork in two at three turns."""
    forked = (2, 4, 6)
    title = f"tree Qwen2.5-VL, 8 rollouts of 6 turns with an image each, forks at turns {', '.join(map(str, forked))}"
    compare_models(benchmark, title, model_of(), rollouts(6, halved(forked), IMAGE_TOKENS + 14, COMPLETION), limit_s=30)


def attention_passes(tree: Tree) -> dict:
    """Forward and backward passes of attention with 4 heads of 64: over the pack, and over copies of the paths."""
    layout, rng, seen = tree.layout, torch.Generator().manual_seed(0), set()
    *inputs, weight = (torch.randn(layout.num_tokens, 4, 64, generator=rng).to(harness.DEVICE, DTYPE) for _ in range(4))
    inputs = [x.requires_grad_() for x in inputs]
    batches = []
    for chosen in leaves_by_length(layout):
        copies = Copies(layout, chosen, seen)
        of_copies = [copies.make(x).contiguous().requires_grad_() for x in inputs]
        batches.append((of_copies, copies.make(weight, copies.once).contiguous()))
    causal = functools.partial(scaled_dot_product_attention, is_causal=True)
    ours = functools.partial(tree_attention, layout=layout)
    return {
        "vlmkernels": lambda: differentiate(ours, inputs, weight, True),
        "copies": lambda: [differentiate(causal, *batch, True) for batch in batches],
    }


def model_passes(tree: Tree) -> dict:
    passes = Passes(model_of("qwen3_5"), tree)
    return {"vlmkernels": passes.pack, "copies": passes.copies}


def sweep() -> None:
    """Measure trees of ``forks`` with different depths and branchings. The file is written after each of them."""
    path = harness.RESULTS / f"tree-cost-{harness.slug(harness.device_name())}.json"
    content = {"device": harness.device_name(), **harness.provenance(), "threads": torch.get_num_threads()}
    content |= {"sizes": SIZES, "segment": SEGMENT, "rows": (rows := [])}
    for what, make in (("attention", attention_passes), ("model", model_passes)):
        for branching in BRANCHINGS:
            for depth in DEPTHS:
                tree = forks(depth, branching, SEGMENT)
                copied = sum(tree.layout.offsets[leaf] + SEGMENT for leaf in leaves(tree.layout))
                times, _, failed = harness.interleave(make(tree), limit_s=2.0)
                if failed:
                    raise RuntimeError(f"{what}, depth {depth}, branching {branching}: {failed}")
                ms = {name: round(1e3 * statistics.median(of), 3) for name, of in times.items()}
                row = {"what": what, "branching": branching, "depth": depth, "tokens": tree.layout.num_tokens}
                rows.append({**row, "copied_tokens": copied, "ms": ms["vlmkernels"], "copies_ms": ms["copies"]})
                print(rows[-1], flush=True)
                path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true", required=True)
    parser.parse_args()
    sweep()
