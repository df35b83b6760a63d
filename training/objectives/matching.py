"""Matching of the R predicted regions of a query to its R_t target boxes (ChEX: Hungarian matching, extended).

All boxes are (xc, yc, w, h), relative to the network's square input. Everything is batched over leading axes "...".
"""

import functools
import itertools
from typing import Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers.image_transforms import center_to_corners_format

from .reduction import full_precision


MatchingMode = Literal["balanced", "ignore"]
ObjectiveMode = Literal["corrected", "official"]

# Table size R_t^R (maps) x R_t beyond which scipy's solver is used: R_t > 22 for 3 regions, R_t > 8 for 5.
MAX_ENUMERATED_TABLE = 2**18
_MAX_ENUMERATED_COSTS = 2**24  # entries per chunk of the batch: 128 MB in float64


class Matching(NamedTuple):
    """Result of `match_regions`.

    Attributes:
        assigned: (..., R, T) bool, which region is regressed to which target.
        matched: (..., R) bool, which regions should have a high score: one per (used) target.
    """

    assigned: Tensor
    matched: Tensor


@full_precision
def l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Sum of the absolute differences of the four centre-format coordinates.

    Args:
        boxes: (..., 4).
        targets: (..., 4), broadcastable to `boxes`.

    Returns:
        (...), the broadcast shape without the last axis. Pairwise costs: `boxes[..., :, None, :]`,
        `targets[..., None, :, :]`.
    """
    return (boxes - targets).abs().sum(dim=-1)


@full_precision
def giou_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """1 - GIoU with GIoU = IoU - (hull - union) / hull (Rezatofighi et al. 2019); hull and union at least 1e-7.

    transformers' `generalized_box_iou` is pairwise, without batch axes and guard against empty boxes: not usable here.

    Args:
        boxes: (..., 4).
        targets: (..., 4), broadcastable to `boxes`.

    Returns:
        (...), the broadcast shape without the last axis; values in [0, 2].
    """
    boxes, targets = torch.broadcast_tensors(center_to_corners_format(boxes), center_to_corners_format(targets))
    overlap, union = _overlap_and_union(boxes, targets)
    hull = _area(torch.minimum(boxes[..., :2], targets[..., :2]), torch.maximum(boxes[..., 2:], targets[..., 2:]))
    hull = hull.clamp(min=1e-7)
    return 1 - overlap / union + (hull - union) / hull


@full_precision
def paired_iou(boxes: Tensor, targets: Tensor) -> Tensor:
    """IoU of each box with its own target, a metric of validation. (..., 4), (..., 4) broadcastable -> (...)."""
    overlap, union = _overlap_and_union(center_to_corners_format(boxes), center_to_corners_format(targets))
    return overlap / union


def pairwise(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and GIoU cost of every region with every target. (..., R, 4), (..., T, 4) -> 2 x (..., R, T)."""
    boxes, targets = boxes[..., :, None, :], targets[..., None, :, :]
    return l1_cost(boxes, targets), giou_cost(boxes, targets)


@torch.no_grad()
@full_precision
def match_regions(
    cost: Tensor,
    target_mask: Tensor,
    mode: MatchingMode = "balanced",
    greedy: bool = False,
    objective_mode: ObjectiveMode = "corrected",
) -> Matching:
    """Minimum-cost assignment of regions to the valid targets of their query, without gradient.

    "balanced": every region gets a target. With R > R_t regions every target is used floor(R / R_t) or
    ceil(R / R_t) times; otherwise the targets are distinct and surplus targets are left over. This equals the
    Hungarian assignment to ceil(R / R_t) replicas of the targets, of which replica k costs k * (max - min + 1) more.
    "ignore": one-to-one, left-over regions stay unassigned.

    Exact and on the device of `cost`: all R_t^R maps of regions to targets are compared, R being small. Only where
    that would be too many does scipy solve query by query.

    Args:
        cost: (..., R, T), any float type; entries of masked targets do not matter. Non-finite costs count as huge.
        target_mask: (..., T) bool, valid targets; there may be none.
        mode: "balanced" (the paper) or "ignore".
        greedy: repeatedly take the cheapest entry of the (replicated) matrix instead of the best assignment.
        objective_mode: what `matched` means where several regions share a target. "corrected": the cheapest of them
            (over the targets). "official": those that the solver put on the first replica; since such regions can
            swap replicas at equal total cost, this choice is arbitrary. It is reproduced with scipy, in float32.

    Returns:
        `Matching`. Queries without a valid target have nothing assigned and nothing matched.

    Raises:
        ValueError: for an unknown mode or shapes that do not fit.
    """
    if mode not in ("balanced", "ignore"):
        raise ValueError(f"Unknown matching mode {mode!r}: choose 'balanced' or 'ignore'.")
    if objective_mode not in ("corrected", "official"):
        raise ValueError(f"Unknown objective mode {objective_mode!r}: choose 'corrected' or 'official'.")
    if (*cost.shape[:-2], cost.shape[-1]) != target_mask.shape:
        raise ValueError(
            f"The shapes do not fit: cost {tuple(cost.shape)} must be (..., R, T), "
            f"target_mask {tuple(target_mask.shape)} (..., T)."
        )

    *batch, regions, targets = cost.shape
    if cost.numel() == 0:
        assigned = torch.zeros_like(cost, dtype=torch.bool)
        return Matching(assigned, assigned.any(dim=-1))
    limit = 1e30  # finite in float32 also when several are added or replicated
    cost = torch.nan_to_num(cost.detach(), nan=limit, posinf=limit, neginf=-limit).clamp(-limit, limit)
    cost = cost.masked_fill(~target_mask[..., None, :], 0).reshape(-1, regions, targets)
    mask = target_mask.reshape(-1, targets)

    if greedy:
        assigned = _match_greedily(cost, mask, mode)
    elif objective_mode == "official":
        assigned, matched = _match_with_scipy(cost, mask, mode, torch.float32)
        return Matching(assigned.view(*batch, regions, targets), matched.view(*batch, regions))
    elif (targets + (mode == "ignore")) ** (regions + 1) <= MAX_ENUMERATED_TABLE:
        assigned = _match_by_enumeration(cost, mask, mode)
    else:
        assigned, _ = _match_with_scipy(cost, mask, mode, torch.float64)

    # Among the regions assigned to a target, the cheapest; the first one of exact ties.
    cheapest = cost.masked_fill(~assigned, torch.inf).argmin(dim=1, keepdim=True)  # (B, 1, T)
    matched = torch.zeros_like(assigned).scatter_(1, cheapest, assigned.any(dim=1, keepdim=True)).any(dim=-1)
    return Matching(assigned.view(*batch, regions, targets), matched.view(*batch, regions))


def _overlap_and_union(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Areas that two boxes, as corners (..., 4), share and cover; the latter at least 1e-7."""
    overlap = _area(torch.maximum(boxes[..., :2], targets[..., :2]), torch.minimum(boxes[..., 2:], targets[..., 2:]))
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(targets[..., :2], targets[..., 2:]) - overlap
    return overlap, union.clamp(min=1e-7)


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    return (bottom_right - top_left).clamp(min=0).prod(dim=-1)


@functools.cache
def _allowed_maps(regions: int, columns: int, mode: MatchingMode) -> tuple[Tensor, Tensor]:
    """All maps of regions to columns, and which of them are allowed when the first n columns are valid targets.

    For "ignore" the last column stands for "unassigned".

    Returns:
        maps: (M, R) column of each region, M = columns ** R, last region fastest.
        allowed: (n_max + 1, M) bool.
    """
    maps = torch.tensor(list(itertools.product(range(columns), repeat=regions))).view(-1, regions)
    loads = (maps[:, :, None] == torch.arange(columns)).sum(dim=1)  # (M, columns): regions per column
    targets = columns - (mode == "ignore")
    allowed = torch.zeros(targets + 1, len(maps), dtype=torch.bool)
    for valid in range(1, targets + 1):
        if mode == "balanced":
            fewest, most, used = regions // valid, -(-regions // valid), regions
        else:
            fewest, most, used = int(regions >= valid), 1, min(regions, valid)
        load = loads[:, :valid]
        allowed[valid] = (load >= fewest).all(dim=1) & (load <= most).all(dim=1) & (load.sum(dim=1) == used)
        if mode == "ignore":
            allowed[valid] &= loads[:, targets] == regions - used
    return maps, allowed


def _match_by_enumeration(cost: Tensor, mask: Tensor, mode: MatchingMode) -> Tensor:
    """(B, R, T), (B, T) -> assigned (B, R, T)."""
    batch, regions, targets = cost.shape
    columns = targets + (mode == "ignore")
    maps, allowed = (table.to(cost.device) for table in _allowed_maps(regions, columns, mode))

    # Bring the valid targets to the front: which maps are allowed then depends on their number only.
    order = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)  # (B, T)
    ordered = cost.gather(2, order[:, None, :].expand_as(cost)).to(_widest_float(cost))
    if mode == "ignore":
        ordered = torch.cat([ordered, ordered.new_zeros(batch, regions, 1)], dim=-1)

    chosen = []
    for start in range(0, batch, max(_MAX_ENUMERATED_COSTS // len(maps), 1)):
        rows = slice(start, start + max(_MAX_ENUMERATED_COSTS // len(maps), 1))
        # total[b, i, j, k] = cost_0[i] + cost_1[j] + cost_2[k], flattened over all maps (i, j, k)
        total = ordered[rows, 0]
        for region in range(1, regions):
            total = (total[:, :, None] + ordered[rows, region][:, None, :]).flatten(1)
        total = total.masked_fill(~allowed[mask[rows].sum(dim=-1)], torch.inf)
        chosen.append(maps[total.argmin(dim=-1)])
    chosen = torch.cat(chosen)  # (B, R) position among the ordered targets

    assigned = chosen[:, :, None] == torch.arange(targets, device=cost.device)
    position = order.argsort(dim=-1)[:, None, :].expand_as(cost)
    return assigned.gather(2, position) & mask[:, None, :]


def _match_greedily(cost: Tensor, mask: Tensor, mode: MatchingMode) -> Tensor:
    """(B, R, T), (B, T) -> assigned (B, R, T)."""
    _, regions, targets = cost.shape
    valid = mask.sum(dim=-1)[:, None, None]
    capacity = -(-regions // valid.clamp(min=1)) if mode == "balanced" else torch.ones_like(valid)
    assigned = torch.zeros_like(cost, dtype=torch.bool)
    for _ in range(regions):
        # The offset between replicas exceeds the range of the costs: the least used targets come first.
        used = assigned.sum(dim=1, keepdim=True)  # (B, 1, T)
        least_used = torch.where(mask[:, None, :], used, regions).amin(dim=-1, keepdim=True)
        free = mask[:, None, :] & (used == least_used) & (used < capacity) & ~assigned.any(dim=-1, keepdim=True)
        best = cost.masked_fill(~free, torch.inf).flatten(1).argmin(dim=-1, keepdim=True)
        taken = torch.zeros_like(assigned).flatten(1).scatter_(1, best, True).view_as(assigned)
        assigned = assigned | (taken & free)
    return assigned


def _match_with_scipy(cost: Tensor, mask: Tensor, mode: MatchingMode, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, R, T), (B, T) -> assigned (B, R, T) and the regions on the first replica (B, R); one query at a time."""
    device = cost.device
    regions = cost.shape[1]
    assigned = torch.zeros(cost.shape, dtype=torch.bool)
    first_replica = torch.zeros(cost.shape[:2], dtype=torch.bool)
    cost, mask = cost.to("cpu").to(dtype), mask.to("cpu")
    for query in mask.any(dim=-1).nonzero().flatten().tolist():
        columns = mask[query].nonzero().flatten()
        own_cost = cost[query][:, columns]
        replicas = -(-regions // len(columns)) if mode == "balanced" else 1
        offset = own_cost.max() - own_cost.min() + 1
        replicated = torch.cat([own_cost + replica * offset for replica in range(replicas)], dim=1)
        rows, positions = map(torch.as_tensor, linear_sum_assignment(replicated.numpy()))
        assigned[query, rows, columns[positions % len(columns)]] = True
        first_replica[query, rows] = positions < len(columns)
    return assigned.to(device), first_replica.to(device)


def _widest_float(tensor: Tensor) -> torch.dtype:
    # Apple's GPU has no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64
