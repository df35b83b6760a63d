"""Box costs and the matching of regions to targets: recordings, and equality with scipy's Hungarian solver."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import generalized_box_iou

from training.objectives import giou_cost, l1_cost, match_regions, matching, pairwise


MODES = {"ignore": "ignore", "balanced_match": "balanced"}  # recorded name -> ours


def replicated_costs(cost: np.ndarray, mode: str) -> np.ndarray:
    """(R, R_t) valid costs -> (R, replicas * R_t), as the paper extends them."""
    replicas = -(-cost.shape[0] // cost.shape[1]) if mode == "balanced" else 1
    offset = cost.max() - cost.min() + 1
    return np.concatenate([cost + replica * offset for replica in range(replicas)], axis=1)


@st.composite
def problems(draw, max_regions: int = 5, max_targets: int = 8, ties: bool | None = None):
    """Batches of float64 costs (B, R, T) and target masks (B, T), with or without ties and valid targets."""
    regions, targets = draw(st.integers(1, max_regions)), draw(st.integers(1, max_targets))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 6)), regions, targets)
    ties = draw(st.booleans()) if ties is None else ties
    cost = rng.integers(-3, 4, shape).astype(float) if ties else rng.normal(size=shape) * draw(st.sampled_from([1, 9]))
    mask = rng.random((shape[0], targets)) < rng.choice([0.2, 0.6, 1.0])
    return torch.as_tensor(cost), torch.as_tensor(mask)


def test_recorded_box_costs(golden):
    l1, giou = pairwise(golden["box/pred"], golden["box/target"])
    torch.testing.assert_close(l1, golden["box/l1_cost"], rtol=0, atol=1e-6)
    torch.testing.assert_close(giou, golden["box/giou_cost"], rtol=0, atol=1e-6)
    pair = golden["box/pred"], golden["box/target_pair"]
    torch.testing.assert_close(l1_cost(*pair), golden["box/l1_pair"], rtol=0, atol=1e-6)
    torch.testing.assert_close(giou_cost(*pair), golden["box/giou_pair"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", ["ignore", "balanced_match", "wide"])
def test_recorded_matching(golden, name, greedy):
    suffix = "_wide" if name == "wide" else ""
    cost, mask = golden[f"match/cost{suffix}"], golden[f"match/mask{suffix}"]
    assigned, matches = (
        golden[f"match/{name}_greedy{greedy:d}/assign"],
        golden[f"match/{name}_greedy{greedy:d}/matches"],
    )
    corrected = match_regions(cost, mask, MODES.get(name, "balanced"), greedy)
    official = match_regions(cost, mask, MODES.get(name, "balanced"), greedy, objective_mode="official")
    assert torch.equal(corrected.assigned, assigned)
    assert torch.equal(official.assigned, assigned)
    assert torch.equal(official.matched, matches)
    if greedy or name == "ignore":  # where the recorded choice is the cheapest region of each target
        assert torch.equal(corrected.matched, matches)
    else:  # the optimum rewards the same number of regions, but not an arbitrary one
        assert torch.equal(corrected.matched.sum(-1), matches.sum(-1))
        assert not torch.equal(corrected.matched, matches)


@pytest.mark.parametrize("mode", ["balanced", "ignore"])
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_assignment_is_optimal(mode, problem):
    """Same total cost as scipy, and the loads that the definition asks for, whatever the ties."""
    cost, mask = problem
    assigned, matched = match_regions(cost, mask, mode)
    assert not (assigned & ~mask[:, None, :]).any()
    for b in range(len(cost)):
        regions, valid = cost.shape[1], int(mask[b].sum())
        if valid == 0:
            assert not assigned[b].any() and not matched[b].any()
            continue
        own_cost, own = cost[b][:, mask[b]].numpy(), assigned[b][:, mask[b]].numpy()
        rows, columns = linear_sum_assignment(replicated_costs(own_cost, mode))
        assert own_cost[own].sum() == pytest.approx(own_cost[rows, columns % valid].sum(), abs=1e-9)
        assert own.sum(axis=1).max() <= 1
        assert own.sum() == (regions if mode == "balanced" else min(regions, valid))
        most = -(-regions // valid) if mode == "balanced" else 1
        assert own.sum(axis=0).max() <= most and own.sum(axis=0).min() >= min(regions // valid, most)


@pytest.mark.parametrize("mode", ["balanced", "ignore"])
@settings(max_examples=100, deadline=None)
@given(problem=problems(ties=False))
def test_assignment_equals_scipy_without_ties(mode, problem):
    cost, mask = problem
    assigned, _ = match_regions(cost, mask, mode)
    official, _ = match_regions(cost, mask, mode, objective_mode="official")
    assert torch.equal(assigned, official)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), mode=st.sampled_from(["balanced", "ignore"]), greedy=st.booleans())
def test_matched_is_the_cheapest_region_of_each_target(problem, mode, greedy):
    cost, mask = problem
    assigned, matched = match_regions(cost, mask, mode, greedy)
    cheapest = cost.masked_fill(~assigned, torch.inf).amin(dim=1)  # (B, T)
    of_matched = cost.masked_fill(~(assigned & matched[:, :, None]), torch.inf).amin(dim=1)
    assert torch.equal(of_matched, cheapest)
    assert torch.equal(matched.sum(-1), assigned.any(dim=1).sum(-1))  # exactly one for each used target


@settings(max_examples=60, deadline=None)
@given(problem=problems(ties=False), mode=st.sampled_from(["balanced", "ignore"]))
def test_greedy_takes_the_smallest_entry_again_and_again(problem, mode):
    cost, mask = problem
    assigned, _ = match_regions(cost, mask, mode, greedy=True)
    expected = torch.zeros_like(assigned)
    for b in range(len(cost)):
        columns = mask[b].nonzero().flatten().numpy()
        if len(columns) == 0:
            continue
        left = replicated_costs(cost[b][:, mask[b]].numpy(), mode)
        for _ in range(min(left.shape)):
            row, column = np.unravel_index(left.argmin(), left.shape)
            expected[b, row, columns[column % len(columns)]] = True
            left[row, :], left[:, column] = np.inf, np.inf
    assert torch.equal(assigned, expected)


@settings(max_examples=60, deadline=None)
@given(problem=problems(ties=False), mode=st.sampled_from(["balanced", "ignore"]), greedy=st.booleans())
def test_masked_targets_and_order_do_not_matter(problem, mode, greedy):
    cost, mask = problem
    reference = match_regions(cost, mask, mode, greedy)
    spoiled = cost.masked_fill(~mask[:, None, :], torch.nan)
    order = torch.randperm(cost.shape[-1], generator=torch.Generator().manual_seed(0))
    shuffled = match_regions(spoiled[..., order], mask[..., order], mode, greedy)
    assert torch.equal(shuffled.assigned, reference.assigned[..., order])
    assert torch.equal(shuffled.matched, reference.matched)


@settings(max_examples=30, deadline=None)
@given(problem=problems(ties=False), mode=st.sampled_from(["balanced", "ignore"]))
def test_solver_and_chunks_do_not_matter(problem, mode):
    cost, mask = problem
    reference = match_regions(cost, mask, mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_MAX_ENUMERATED_COSTS", 1)
        chunked = match_regions(cost, mask, mode)
        patch.setattr(matching, "MAX_ENUMERATED_TABLE", 0)
        solved = match_regions(cost, mask, mode)
    for other in (chunked, solved):
        assert torch.equal(other.assigned, reference.assigned) and torch.equal(other.matched, reference.matched)


def test_many_targets_use_the_solver():
    cost = torch.rand(2, 3, 60, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 60, dtype=torch.bool)
    assigned, matched = match_regions(cost, mask)
    assert matched.all()
    for b in range(2):
        rows, columns = linear_sum_assignment(cost[b].numpy())
        assert assigned[b].nonzero().tolist() == [list(pair) for pair in zip(rows, columns, strict=True)]


def test_single_target_rewards_the_closest_region():
    """All regions are assigned to it; the official flags depend on how the solver breaks ties."""
    cost = torch.rand(200, 3, 1, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(200, 1, dtype=torch.bool)
    assigned, matched = match_regions(cost, mask)
    assert assigned.all()
    assert torch.equal(matched.int().argmax(-1), cost[..., 0].argmin(-1)) and (matched.sum(-1) == 1).all()
    official = match_regions(cost, mask, objective_mode="official").matched
    assert (official.sum(-1) == 1).all() and not torch.equal(official, matched)


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3, 4), (2, 5, 3, 0), (4, 3, 1)])
def test_empty_problems(shape):
    assigned, matched = match_regions(torch.zeros(shape), torch.zeros((*shape[:-2], shape[-1]), dtype=torch.bool))
    assert assigned.shape == shape and matched.shape == shape[:-1]
    assert not assigned.any() and not matched.any()


def test_non_finite_costs_are_avoided():
    cost = torch.tensor([[[torch.nan, 1.0], [2.0, torch.inf], [0.0, 0.5]]])
    assigned, _ = match_regions(cost, torch.ones(1, 2, dtype=torch.bool))
    assert torch.isfinite(cost[assigned]).all() and assigned.sum() == 3


def test_half_precision_costs():
    cost = torch.tensor([[[1.0, 2.0], [3.0, 0.5], [0.25, 4.0]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    expected = match_regions(cost, mask)
    for greedy in (False, True):
        assert torch.equal(match_regions(cost.bfloat16(), mask, greedy=greedy).assigned, expected.assigned)
    assert match_regions(cost.bfloat16(), mask, objective_mode="official").assigned.equal(expected.assigned)


def test_matching_errors():
    cost, mask = torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="matching mode 'hungarian'"):
        match_regions(cost, mask, mode="hungarian")
    with pytest.raises(ValueError, match="objective mode 'legacy'"):
        match_regions(cost, mask, objective_mode="legacy")
    with pytest.raises(ValueError, match="shapes do not fit"):
        match_regions(cost, mask[:, :3])


def boxes(count: int, seed: int) -> torch.Tensor:
    draws = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([draws[:, :2], 0.05 + 0.6 * draws[:, 2:]], dim=1)


def test_giou_equals_transformers():
    left, right = boxes(20, 0), boxes(30, 1)
    expected = generalized_box_iou(center_to_corners_format(left), center_to_corners_format(right))
    torch.testing.assert_close(pairwise(left, right)[1], 1 - expected)


def test_giou_properties():
    left, right = boxes(50, 2), boxes(50, 3)
    cost = giou_cost(left, right)
    assert (cost >= 0).all() and (cost <= 2).all()
    torch.testing.assert_close(cost, giou_cost(right, left))
    torch.testing.assert_close(giou_cost(left, left), torch.zeros(50, dtype=torch.float64))
    apart = left + torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)
    assert (giou_cost(left, apart) > 1).all()


def test_giou_of_empty_boxes_is_finite():
    empty = torch.zeros(1, 4, requires_grad=True)
    cost = giou_cost(empty, torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.1]]))
    cost.sum().backward()
    assert torch.isfinite(cost).all() and torch.isfinite(empty.grad).all()


def test_box_costs_compute_in_float32():
    left, right = boxes(4, 4).bfloat16(), boxes(4, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = giou_cost(left, right)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost, giou_cost(left.float(), right.float()), rtol=0, atol=0)


def test_published_example():
    """A case worked out from the official modules: boxes from sine waves, 5 * L1 + 2 * (1 - GIoU)."""

    def wave(shape: tuple[int, ...], phase: float) -> torch.Tensor:
        index = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        return torch.sin(0.1 * index**1.1 + phase).float().view(shape)

    predicted, target = 0.1 + 0.5 * wave((1, 2, 3, 4), 15).sigmoid(), 0.1 + 0.5 * wave((1, 2, 2, 4), 16).sigmoid()
    l1, giou = pairwise(predicted, target)
    assert giou.sum().item() == pytest.approx(4.89564, abs=1e-5)
    assert l1.sum().item() == pytest.approx(2.19621, abs=1e-5)
    assigned, _ = match_regions(5 * l1 + 2 * giou, torch.ones(1, 2, 2, dtype=torch.bool))
    assert assigned.int().tolist() == [[[[0, 1], [1, 0], [1, 0]], [[0, 1], [1, 0], [0, 1]]]]
