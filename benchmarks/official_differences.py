"""How much each difference from the official code changes, as the table of docs/official-differences.md.

Everything is computed on the recorded model of the tests (random weights) with its recorded inputs, or on seeded
random numbers where no model is needed. Run from the repository root: `python benchmarks/official_differences.py`.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.activations import ACT2FN

from evaluation.metrics.detection_map.detection_map import detection_map
from evaluation.metrics.finding_f1.finding_f1 import finding_f1
from evaluation.metrics.region_auroc.region_auroc import region_auroc
from modeling_chex import ChexModel
from modeling_chex.conversion import config_from_official, convert_official_state_dict
from modeling_chex.prompt_detector import soft_roi_weights
from training.configuration import AugmentationConfig, OptimizationConfig
from training.loop import learning_rate_factor
from training.objectives import match_regions, paired_iou, sentence_mse_loss, subsample_classes
from training.transforms import Augmentation


GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def load_models() -> tuple[ChexModel, ChexModel, dict[str, torch.Tensor]]:
    """The recorded weights in legacy and in grouped mode, and the recordings."""
    golden = load_file(GOLDEN / "golden.safetensors")
    info = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    official = {k.removeprefix("state_dict/"): v for k, v in golden.items() if k.startswith("state_dict/")}
    models = []
    for mode in ("legacy", "grouped"):
        config = config_from_official(info["config"], official, generator_heads=info["sizes"]["lm_head"])
        config.attention_mode = mode
        model = ChexModel(config)
        model.load_state_dict(convert_official_state_dict(official))
        models.append(model.eval())
    return *models, golden


def difference(first: torch.Tensor, second: torch.Tensor) -> str:
    """Largest and mean absolute difference."""
    gap = (first.float() - second.float()).abs()
    return f"max {gap.max():.3g}, mean {gap.mean():.3g}"


def compare_outputs(legacy: ChexModel, grouped: ChexModel, arguments: dict) -> str:
    outputs = [model(**arguments) for model in (legacy, grouped)]
    mask = outputs[0].query_mask
    parts = [
        f"{label} {difference(*(output[name][mask] for output in outputs))}"
        for label, name in (("boxes", "region_boxes"), ("scores", "region_scores"), ("features", "query_features"))
    ]
    ids = [legacy.generate(query_features=output.query_features, query_mask=mask, max_length=20) for output in outputs]
    changed = (ids[0] != ids[1])[mask].any(-1)
    return "; ".join([*parts, f"sentences changed {int(changed.sum())} of {len(changed)}"])


def model_rows(legacy: ChexModel, grouped: ChexModel, golden: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    pixels = golden["img/input"][:, None].expand(-1, 3, -1, -1)
    images = legacy.get_image_features(pixels)
    tokens, mask = golden["det/masked/query_tokens"], golden["det/masked/query_mask"]
    everything = torch.ones_like(mask)
    queries = {"image_features": images, "prompt_features": tokens}
    rows = [
        ("self-attention, all queries valid", compare_outputs(legacy, grouped, queries | {"query_mask": everything})),
        ("self-attention, padded queries", compare_outputs(legacy, grouped, queries | {"query_mask": mask})),
        ("self-attention, no query mask (post decoder only)", compare_outputs(legacy, grouped, queries)),
    ]
    for name, model in (("official", legacy), ("ours", grouped)):
        together = model(**queries, query_mask=everything).query_features[:, :1]
        alone = model(
            image_features=images, prompt_features=tokens[:, :1], query_mask=everything[:, :1]
        ).query_features
        rows.append((f"feature of one query, alone or with four others, {name}", difference(together, alone)))

    padded = [model(**queries, query_mask=mask) for model in (legacy, grouped)]
    for name, output in zip(("official", "ours"), padded, strict=True):
        score, feature = output.query_scores[~mask].mean(), output.query_features[~mask].abs().max()
        rows.append((f"padded queries, {name}", f"mean score {score:.3g}, largest feature {feature:.3g}"))

    kept = legacy(**queries, query_mask=everything).query_features
    generator = torch.Generator().manual_seed(0)
    for probability in (0.1, 0.3):
        keep = torch.rand((20, *kept.shape[:2], 3), generator=generator) >= probability
        dropped = [legacy(**queries, query_mask=everything, region_keep_mask=draw).query_features for draw in keep]
        gap = difference(torch.stack(dropped), kept.expand(20, *kept.shape))
        rows.append((f"region tokens dropped at inference, probability {probability}, 20 draws, features", gap))
    skipped = legacy(**queries, use_post_decoder=False).query_features
    draws = torch.rand((20, 2, 15), generator=generator) < legacy.config.detector_config.roi_skip_probability
    random_skip = [legacy(**queries, use_post_decoder=False, roi_skip=draw).query_features for draw in draws]
    gap = difference(torch.stack(random_skip), skipped.expand(20, *skipped.shape))
    rows.append(("skip connection drawn at inference (roi_skip=None), 20 draws, features", gap))

    single = {"boxes": golden["regions/boxes"][:, :1], "box_mask": torch.tensor([[True], [False]])}
    count = [int(model.encode_boxes(images, **single).isnan().sum()) for model in (legacy, grouped)]
    facts = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))["reference_facts"]
    recorded = facts["encode_regions_fully_padded_sample_has_nan"]
    rows.append(
        (
            "only box of an image is padding",
            f"official NaN (recorded: {recorded}); NaN values, legacy {count[0]}, ours {count[1]}",
        )
    )

    for side in (0.001, 0.01, 0.05, 0.2):
        boxes = torch.cat([torch.rand((2000, 2), generator=generator), torch.full((2000, 2), side)], dim=-1)
        maps = []
        for is_legacy in (True, False):
            row, column = soft_roi_weights(boxes, 7, 7, legacy=is_legacy)
            maps.append(row[..., :, None] * column[..., None, :])
        empty, ours_empty = (m.flatten(1).amax(1) < 0.5 for m in maps)
        effect = f"maps that are empty: official {empty.float().mean():.1%}, ours {ours_empty.float().mean():.1%}"
        if not empty.all():
            effect += f"; others {difference(maps[0][~empty], maps[1][~empty])}"
        rows.append((f"pooling, boxes with sides of {side}, 7 x 7 patches", effect))

    half = ChexModel(legacy.config).eval()
    half.load_state_dict(legacy.state_dict())
    outputs = [
        model(pixel_values=pixels.to(model.dtype), input_ids=golden["txt/token_ids"], use_post_decoder=False)
        for model in (half.bfloat16(), legacy)
    ]
    effect = "; ".join(
        f"{name} {difference(*(output[name] for output in outputs))}"
        for name in ("region_boxes", "region_scores", "region_features")
    )
    rows.append(("bfloat16 instead of float32, legacy mode", effect))

    ids, valid, features = golden["dec/target_ids"], golden["dec/target_attention_mask"], golden["dec/prefix_in"]
    losses = []
    for ignore_padding in (False, True):
        labels = legacy.sentence_generator.target_labels(ids, valid, ignore_padding)
        losses.append(legacy.sentence_generator(ids, valid, features=features, labels=labels).loss.item())
    rows.append(("generator loss, padding counted or not", f"official {losses[0]:.4f}, ours {losses[1]:.4f}"))
    network = legacy.sentence_generator.prefix_projection
    hidden = network.fc1(features)
    right, official = (network.fc2(ACT2FN[name](hidden)) for name in ("gelu", "relu"))
    change = (official - right).norm() / right.norm()
    rows.append(("keys and values of the prefix with ReLU instead of GELU", f"relative difference {change:.1%}"))
    return rows


def objective_rows() -> list[tuple[str, str]]:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand((2000, 3, 2), generator=generator)
    mask = torch.ones(2000, 2, dtype=torch.bool)
    official, ours = (match_regions(cost, mask, objective_mode=mode) for mode in ("official", "corrected"))
    changed = (official.matched != ours.matched).any(-1).float().mean()
    same = (official.assigned == ours.assigned).flatten(1).all(1).float().mean()
    rows = [
        (
            "matching of 3 regions with 2 targets",
            f"other regions count as matched {changed:.1%}, same assignment {same:.1%}",
        )
    ]

    features, targets = torch.randn((2, 8, 29, 64), generator=generator)
    described = torch.rand((8, 29), generator=generator) < 0.5
    present = torch.rand((8, 29), generator=generator) < 0.8
    losses = [sentence_mse_loss(targets, features, chosen).item() for chosen in (described, described & present)]
    rows.append(
        ("anatomy MSE, a fifth of the regions cropped away", f"official {losses[0]:.2f}, ours {losses[1]:.2f}")
    )
    schedule = OptimizationConfig(warmup_steps=1000, learning_rate=1e-4)
    ours = [learning_rate_factor(update, 10_000, schedule) for update in range(3)]
    official = [learning_rate_factor(update, 10_000, schedule, official=True) for update in range(3)]
    rows.append(("learning rate of the first updates, share of the peak", f"official {official}, ours {ours}"))

    augmentation = Augmentation(AugmentationConfig())
    transform = augmentation.geometry(augmentation.draws(torch.arange(1000)))
    lungs = torch.tensor([[0.28, 0.5, 0.36, 0.7], [0.72, 0.5, 0.36, 0.7]]).expand(1000, 2, 4)
    moved, left = transform.boxes(lungs, torch.ones(1000, 2, dtype=torch.bool))
    overlap = paired_iou(lungs, moved)[left].mean()
    rows.append(
        (
            "boxes of both lungs, before and after the published augmentation, 1000 images",
            f"mean IoU {overlap:.3f}, cut away {1 - left.float().mean():.1%}",
        )
    )
    drawn = [
        [subsample_classes(torch.ones(22, dtype=torch.bool), 10, generator) for _ in range(2)] for _ in range(1000)
    ]
    queries = [
        sum(len(both.nonzero()) for both in kind) / 1000 for kind in zip(*((a | b, a) for a, b in drawn), strict=True)
    ]
    rows.append(("queries of a step, 22 classes, k = 10", f"official {queries[0]:.1f} classes, ours {queries[1]:.1f}"))
    return rows


def evaluation_rows() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    scores, present = rng.random((40, 10, 6)), rng.random((40, 10)) < 0.9
    labels = rng.random((40, 10, 6)) < 0.7 * scores
    labels[:, :2] = True  # two regions in which every class is always there
    values = [region_auroc(scores, labels.astype(int), present, official=o)["weighted"] for o in (True, False)]
    rows = [("wAUROC, 2 of 10 regions without negatives", f"official {values[0]:.3f}, ours {values[1]:.3f}")]

    def boxes(count: int) -> np.ndarray:
        corner = rng.random((count, 2)) * 50
        return np.concatenate([corner, corner + 40], axis=1)

    references = [{"boxes": boxes(3), "labels": np.arange(3)} for _ in range(30)]
    predictions = [
        {"boxes": r["boxes"] + rng.normal(0, 4, (3, 4)), "labels": r["labels"], "scores": rng.random(3)}
        for r in references
    ]
    values = [detection_map(predictions, references, num_classes=4, official=o)["map"] for o in (True, False)]
    rows.append(("mAP, 1 of 4 classes without targets", f"official {values[0]:.3f}, ours {values[1]:.3f}"))

    texts = [{f"finding {c}": int(rng.random() < 0.15) for c in range(8)} for _ in range(200)]
    answers = [{name: int(rng.random() < (0.6 if value else 0.1)) for name, value in t.items()} for t in texts]
    values = [finding_f1(answers, texts, official=o)["example_f1"] for o in (True, False)]
    rows.append(("example F1, 200 texts", f"official {values[0]:.3f}, ours {values[1]:.3f}"))

    kept = rng.random((1000, 15)) < 0.7  # anatomies that a report describes; 14 findings are always kept before them
    wrong = [np.arange(14, 14 + row.sum()) != 14 + np.flatnonzero(row) for row in kept]
    share = np.concatenate(wrong).sum() / (kept.sum() + 14 * len(kept))
    rows.append(
        (
            "report, sentences beside the box of another prompt, 30 % of anatomies dropped",
            f"official {share:.1%}",
        )
    )
    return rows


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    print("| measured | effect |\n|---|---|")
    for name, effect in [*model_rows(*load_models()), *objective_rows(), *evaluation_rows()]:
        print(f"| {name} | {effect} |")


if __name__ == "__main__":
    main()
