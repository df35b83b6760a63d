"""The training objectives: recordings of the official implementation, the paper's edge cases, and invariances."""

import itertools
import math
import threading

import pytest
import torch
from transformers import GPT2Tokenizer

from tests.conftest import GOLDEN_DIR
from training.objectives import (
    SINGLE_PROCESS,
    STAGE1_WEIGHTS,
    STAGE2_WEIGHTS,
    STAGE3_WEIGHTS,
    AnatomyOptions,
    Collectives,
    DetectionOptions,
    ObjectiveWeights,
    SentenceOptions,
    StepTotals,
    anatomy_classification_loss,
    anatomy_detection_loss,
    anatomy_objective,
    choose_for_generation,
    choose_synonyms,
    focal_loss,
    generation_loss,
    giou_cost,
    global_contrastive_loss,
    l1_cost,
    padded_length,
    pathology_classification_loss,
    pathology_detection_loss,
    pathology_objective,
    presence_loss,
    random_subset,
    sentence_contrastive_loss,
    sentence_detection_loss,
    sentence_mse_loss,
    sentence_objective,
    statement_loss,
    subsample_classes,
    subsample_classes_by_frequency,
    weighted_sum,
)


TOLERANCE = 1e-5
ANATOMY_WEIGHTS = ObjectiveWeights(
    anatomy_detection=0.1, anatomy_classification=0.01, anatomy_mse=0.04, anatomy_generation=1.0
)
ANATOMY_CASES = ("token_det_cls", "token_det_single", "token_cls_mse_gen", "bbox_cls_mse_gen")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE):
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance)


def wave(shape: tuple[int, ...], phase: float) -> torch.Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.1 * index**1.1 + phase).float().view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Recordings: single losses


@pytest.mark.parametrize(("name", "temperature"), [("0.2", 0.2), ("1", 1.0)])
def test_recorded_global_contrastive(golden, name, temperature):
    loss = global_contrastive_loss(golden["loss/z1"], golden["loss/z2"], temperature)
    assert_close(loss, golden[f"loss/global_contrastive_t{name}"])


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("s2r", "r2s"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_recorded_sentence_contrastive(golden, cross, s2r, r2s):
    loss = sentence_contrastive_loss(
        golden["loss/z_sent"], golden["loss/z_reg"], golden["loss/sent_mask"], 0.25, r2s, s2r, cross
    )
    assert_close(loss, golden[f"loss/sentence_contrastive_cross{cross:d}_s2r{s2r}_r2s{r2s}"])


def test_recorded_sentence_mse(golden):
    loss = sentence_mse_loss(golden["loss/z_sent"], golden["loss/z_reg"], golden["loss/sent_mask"])
    assert_close(loss, golden["loss/sentence_mse"])


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
def test_recorded_pathology_classification(golden, other, ignore):
    inputs = [golden[f"loss/patho/{name}"] for name in ("features", "pos", "neg", "targets")]
    expected = golden[f"loss/patho/other{other:d}_ignore{ignore:d}"]
    assert_close(pathology_classification_loss(*inputs, 0.2, other, ignore), expected)
    assert_close(pathology_classification_loss(*inputs[:3], inputs[3].bool(), 0.2, other, ignore), expected)


@pytest.mark.parametrize("contrast", ["posneg", "posneg_sub10", "only_pos", "all"])
def test_recorded_anatomy_classification(golden, contrast):
    observed = golden["loss/anat/has_targets"]
    # With fewer classes than are drawn, all those observed are used.
    subset = subsample_classes_by_frequency(torch.ones(4), observed.any(0).any(0), 10) if "sub" in contrast else None
    loss = anatomy_classification_loss(
        golden["loss/anat/features"],
        golden["loss/patho/pos"],
        golden["loss/patho/neg"],
        golden["loss/anat/targets"],
        observed,
        0.25,
        contrast.removesuffix("_sub10"),
        subset,
        golden["loss/anat/region_pos"],
        golden["loss/anat/region_neg"],
    )
    assert_close(loss, golden[f"loss/anat/{contrast}"])


def test_recorded_focal_loss(golden):
    probabilities, targets = golden["focal/probs"], golden["focal/targets"]
    assert_close(focal_loss(probabilities, targets), golden["focal/auto_weight"])
    assert_close(focal_loss(probabilities, targets, 0.25), golden["focal/alpha025"])
    assert_close(focal_loss(4 * probabilities - 2, targets, 0.25, from_logits=True), golden["focal/logits_alpha025"])


def test_published_examples():
    """Values worked out from the official modules on sine waves."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    sentences = wave((2, 3, 16), 6) * mask[..., None]
    regions = wave((2, 3, 16), 7)
    positive, negative = wave((4, 16), 10), wave((4, 16), 11)
    expected = {
        1.792724: sentence_contrastive_loss(sentences, regions, mask),
        7.158938: sentence_mse_loss(sentences, regions, mask),
        3.918462: global_contrastive_loss(wave((4, 16), 8), wave((4, 16), 9)),
    }
    pathology = pathology_classification_loss(
        wave((2, 4, 16), 12), positive, negative, torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    )
    expected |= {27.95081: pathology.sum(), 8.318877: pathology[0, 0], 1.308853: pathology[0, 1]}
    observed = torch.ones(2, 5, 4, dtype=torch.bool)
    observed[0, 1] = False
    labels = torch.arange(40).view(2, 5, 4) % 3 == 0
    anatomy = anatomy_classification_loss(wave((2, 5, 16), 13), positive, negative, labels, observed)
    expected |= {41.29956: anatomy.sum(), 5.902405: anatomy[0, 0], 2.704518: anatomy[0, 2]}
    assert anatomy[0, 1] == 0
    probabilities, targets = (2 * wave((2, 3, 3), 14)).sigmoid(), torch.arange(18).view(2, 3, 3) % 5 == 0
    expected[0.180736] = focal_loss(probabilities, targets).mean()
    for value, loss in expected.items():
        assert loss.item() == pytest.approx(value, rel=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Recordings: whole supervisors and gradients, through the model


@pytest.fixture(scope="module")
def gpt_tokenizer():
    folder = GOLDEN_DIR / "gpt_tokenizer"
    return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def encode_image(model, golden):
    return model.get_image_features(golden["img/input"][:, None].expand(-1, 3, -1, -1))


def recorded_generation_loss(model, tokenizer, features: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """The generator's loss as the official code computes it, padding included. features (K, D)."""
    special = model.config.generator_config.eos_token_id
    ids = [[special, *tokenizer(text)["input_ids"], special] for text in texts]
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    ids = torch.tensor([row + [special] * (longest - len(row)) for row in ids])
    return model.sentence_generator(input_ids=ids, attention_mask=mask, features=features, labels=ids).loss


def pathology_terms(model, golden, image_features, objective_mode="official") -> dict[str, torch.Tensor]:
    positive, negative = golden["prompts/pos_emb"], golden["prompts/neg_emb_neg"]
    output = model(image_features=image_features, prompt_features=positive, roi_skip=False)
    return pathology_objective(
        output.query_features,
        output.region_boxes,
        output.region_scores,
        output.region_features,
        positive,
        negative,
        golden["sup/patho/target_cls_boxes_padded"],
        golden["sup/patho/target_cls_boxes_mask"],
        golden["sup/patho/has_class_bboxes"],
        golden["sup/patho/target_cls_labels"],
        golden["sup/patho/has_class_labels"],
        objective_mode=objective_mode,
    )


def sentence_terms(model, golden, golden_info, tokenizer, image_features) -> dict[str, torch.Tensor]:
    sentences, mask = golden["sup/sent/sentence_features"], golden["sup/sent/sentence_mask"]
    output = model(image_features=image_features, prompt_features=sentences, query_mask=mask, roi_skip=False)
    terms = sentence_objective(output.query_features, sentences, mask, image_features.patch_features)
    images, queries = choose_for_generation(mask, 32)
    texts = [golden_info["supervisor_sentences"][i][j] for i, j in zip(images, queries, strict=True)]
    generation = recorded_generation_loss(model, tokenizer, output.query_features[images, queries], texts)
    return terms | {"sentence_generation": generation}


SENTENCE_WEIGHTS = ObjectiveWeights(
    global_contrastive=1.0, sentence_contrastive=0.005, sentence_mse=0.02, sentence_generation=0.5
)


@torch.no_grad()
def test_recorded_sentence_terms_from_recorded_features(golden):
    mask, region_features = golden["sup/sent/sentence_mask"], golden["sup/sent/region_features"]
    terms = sentence_objective(
        region_features, golden["sup/sent/sentence_features"], mask, golden["img/patch_features"]
    )
    assert_close(terms["global_contrastive"], golden["sup/sent/global_contr"])
    assert_close(terms["sentence_contrastive"], golden["sup/sent/sent_contr"])
    assert_close(terms["sentence_mse"], golden["sup/sent/sent_mse"])


@torch.no_grad()
def test_recorded_sentence_supervisor(golden_model, golden, golden_info, gpt_tokenizer):
    terms = sentence_terms(golden_model, golden, golden_info, gpt_tokenizer, encode_image(golden_model, golden))
    assert_close(terms["sentence_contrastive"], golden["sup/sent/sent_contr"])
    assert_close(terms["sentence_mse"], golden["sup/sent/sent_mse"])
    assert_close(terms["sentence_generation"], golden["sup/sent/sent_gen"])
    assert_close(weighted_sum(terms, SENTENCE_WEIGHTS), golden["sup/sent/total"])


@torch.no_grad()
def test_recorded_pathology_supervisor(golden_model, golden):
    terms = pathology_terms(golden_model, golden, encode_image(golden_model, golden))
    assert_close(terms["pathology_detection/box"], golden["sup/patho/box_loss"])
    assert_close(terms["pathology_detection/score"], golden["sup/patho/weights_loss"])
    assert_close(terms["pathology_detection"], golden["sup/patho/patho_detect"])
    assert_close(terms["pathology_classification"], golden["sup/patho/patho_cls"])
    assert_close(weighted_sum(terms, STAGE1_WEIGHTS), golden["sup/patho/total"])


@torch.no_grad()
def test_corrected_pathology_supervisor(golden_model, golden):
    """By default the closest region of a target is rewarded; everything else is as recorded."""
    terms = pathology_terms(golden_model, golden, encode_image(golden_model, golden), "corrected")
    assert_close(terms["pathology_detection/box"], golden["sup/patho/box_loss"])
    assert terms["pathology_detection/score"].item() == pytest.approx(0.106886, abs=1e-6)
    assert terms["pathology_detection"].item() == pytest.approx(3.196815, abs=1e-5)
    assert weighted_sum(terms, STAGE1_WEIGHTS).item() == pytest.approx(33.85916, abs=1e-4)


# Token ids of the recorded anatomy sentences in the recordings' small CLIP vocabulary, without start and end.
ANATOMY_SENTENCE_IDS = {
    "No pneumothorax.": [77, 334, 79, 557, 84, 617, 513, 523, 64, 343, 269],
    "Clear.": [66, 534, 625, 269],
    "Stable.": [522, 596, 579, 269],
    "Mild opacity.": [76, 543, 323, 676, 546, 696, 269],
    "Effusion.": [68, 69, 665, 564, 525, 269],
    "Unchanged.": [569, 540, 514, 70, 538, 269],
    "Normal.": [77, 523, 76, 566, 269],
    "Patchy consolidation in the left apex.": [79, 527, 540, 344, 616, 759, 554, 67, 656, 530, 518, 534, 69, 339]
    + [64, 661, 343, 269],
}


def anatomy_sentence_features(model, sentences: list[list[list[str]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean feature (N, A, D) of each region's sentences and which regions have any (N, A)."""
    text = model.config.text_config
    has_sentences = torch.tensor([[len(region) > 0 for region in image] for image in sentences])
    features = torch.zeros(*has_sentences.shape, model.config.projection_dim)
    for n, a in has_sentences.nonzero().tolist():
        rows = [[text.bos_token_id, *ANATOMY_SENTENCE_IDS[s], text.eos_token_id] for s in sentences[n][a]]
        ids = torch.tensor([row + [text.eos_token_id] * (77 - len(row)) for row in rows])
        features[n, a] = model.get_prompt_features(ids).mean(dim=0)
    return features, has_sentences


@pytest.mark.parametrize("case", ANATOMY_CASES)
@torch.no_grad()
def test_recorded_anatomy_supervisor(golden_model, golden, golden_info, gpt_tokenizer, case):
    image_features = encode_image(golden_model, golden)
    prompts, boxes = golden["sup/anat/anatomy_token_emb"], golden["sup/anat/target_anat_boxes"]
    present, has_boxes = golden["sup/anat/target_anat_present_masks"], golden["sup/anat/has_anatomy_bboxes"]
    singles = boxes.shape[1]
    with_multi = case == "token_det_cls"
    described = case.endswith("mse_gen")

    inputs = {}
    if case.startswith("token"):
        queries = prompts if with_multi else prompts[:singles]
        output = golden_model(image_features=image_features, prompt_features=queries, roi_skip=False)
        features = output.query_features[:, :singles]
        inputs["region_boxes"] = output.region_boxes[:, :singles]
        if with_multi:
            inputs["multi_region_boxes"] = output.region_boxes[:, singles:]
            inputs["multi_region_scores"] = output.region_scores[:, singles:]
            inputs["multi_target_boxes"] = golden["sup/anat/target_anat_multiboxes"]
            inputs["multi_target_mask"] = golden["sup/anat/target_anat_multiboxes_masks"]
    else:
        features = golden_model.encode_boxes(image_features, boxes)
    terms = {"anatomy_detection"} if "det" in case else set()
    terms |= {"anatomy_classification"} if "cls" in case else set()
    if described:
        terms.add("anatomy_mse")
        sentences = golden_info["anatomy_sentences"]
        inputs["sentence_features"], inputs["has_sentences"] = anatomy_sentence_features(golden_model, sentences)

    losses = anatomy_objective(
        features,
        present,
        target_boxes=boxes,
        has_boxes=has_boxes,
        positive=golden["prompts/pos_emb"],
        negative=golden["prompts/neg_emb_neg"],
        labels=golden["sup/anat/target_anat_cls_labels"],
        has_labels=golden["sup/anat/has_anatomy_class_labels"],
        terms=terms,
        objective_mode="official",
        **inputs,
    )
    if described:
        images, regions = choose_for_generation(inputs["has_sentences"] & present, 32)
        texts = [" ".join(sentences[n][a]) for n, a in zip(images, regions, strict=True)]
        generation = recorded_generation_loss(golden_model, gpt_tokenizer, features[images, regions], texts)
        losses["anatomy_generation"] = generation

    names = {
        "anatomy_detection": "anat_det",
        "anatomy_detection/single": "anat_single",
        "anatomy_detection/multi": "anat_multi",
        "anatomy_classification": "anat_cls",
        "anatomy_mse": "sent_mse",
        "anatomy_generation": "anat_gen",
    }
    recorded = {name.rsplit("/")[-1] for name in golden if name.startswith(f"sup/anat/{case}/")} - {"total"}
    assert recorded <= {names[name] for name in losses}
    for name, loss in losses.items():
        if names[name] in recorded:
            assert_close(loss, golden[f"sup/anat/{case}/{names[name]}"])
    assert_close(weighted_sum(losses, ANATOMY_WEIGHTS), golden[f"sup/anat/{case}/total"])


def test_recorded_gradients(golden_model, golden, golden_info, gpt_tokenizer):
    from modeling_chex.conversion import convert_official_state_dict

    parameters = dict(golden_model.named_parameters())
    golden_model.zero_grad()
    image_features = encode_image(golden_model, golden)
    pathology = pathology_terms(golden_model, golden, image_features)
    sentence = sentence_terms(golden_model, golden, golden_info, gpt_tokenizer, image_features)
    loss = weighted_sum(pathology, STAGE1_WEIGHTS) + weighted_sum(sentence, SENTENCE_WEIGHTS)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    golden_model.zero_grad()
    assert_close(loss, golden["grad/loss"])

    def of_official(key: str) -> list[torch.Tensor]:
        weight = golden[f"state_dict/{key}"]
        return [gradients[ours] for ours in convert_official_state_dict({key: weight})]

    norms = torch.stack(
        [sum(part.square().sum() for part in of_official(key)).sqrt() for key in golden_info["grad_names"]]
    )
    torch.testing.assert_close(norms, golden["grad/norms"], rtol=1e-4, atol=1e-6)
    for name, expected in golden.items():
        if name.startswith("grad/param/"):
            (gradient,) = of_official(name.removeprefix("grad/param/"))
            assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name


# ---------------------------------------------------------------------------------------------------------------------
# Definitions, in the plain form of the paper


def random_batch(seed: int = 0, images: int = 4, anatomies: int = 5, classes: int = 3, sentences: int = 3):
    """Outputs (requiring gradients) and targets of all three supervisors, partly annotated."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def some(*shape, p=0.7):
        return torch.rand(*shape, generator=g) < p

    def boxes(*shape):
        draws = torch.rand(*shape, 4, generator=g)
        return torch.cat([draws[..., :2], 0.1 + 0.5 * draws[..., 2:]], dim=-1)

    regions, width = 3, 8
    sentence = {
        "query_features": normal(images, sentences, width),
        "sentence_features": normal(images, sentences, width),
        "sentence_mask": some(images, sentences),
        "patch_features": normal(images, 4, 4, width),
    }
    pathology = {
        "query_features": normal(images, classes, width),
        "region_boxes": boxes(images, classes, regions),
        "region_scores": torch.rand(images, classes, regions, generator=g),
        "region_features": normal(images, classes, regions, width),
        "positive": normal(classes, width),
        "negative": normal(classes, width),
        "target_boxes": boxes(images, classes, 4),
        "target_mask": some(images, classes, 4, p=0.4),
        "has_boxes": some(images, classes),
        "labels": some(images, classes, p=0.4),
        "has_labels": some(images, classes),
    }
    anatomy = {
        "query_features": normal(images, anatomies, width),
        "present": some(images, anatomies),
        "region_boxes": boxes(images, anatomies, regions),
        "target_boxes": boxes(images, anatomies),
        "has_boxes": some(images, anatomies),
        "multi_region_boxes": boxes(images, 2, regions),
        "multi_region_scores": torch.rand(images, 2, regions, generator=g),
        "multi_target_boxes": boxes(images, 2, 2),
        "multi_target_mask": some(images, 2, 2),
        "positive": pathology["positive"],
        "negative": pathology["negative"],
        "labels": some(images, anatomies, classes, p=0.4),
        "has_labels": some(images, anatomies, classes),
        "sentence_features": normal(images, anatomies, width),
        "has_sentences": some(images, anatomies),
    }
    return sentence, pathology, anatomy


OBJECTIVES = (sentence_objective, pathology_objective, anatomy_objective)
OUTPUTS = (
    ("query_features", "patch_features"),
    ("query_features", "region_boxes", "region_scores"),
    ("query_features", "region_boxes", "multi_region_boxes"),
)
MASKS = ("sentence_mask", "target_mask", "has_boxes", "has_labels", "multi_target_mask", "present", "has_sentences")
WEIGHTS = ObjectiveWeights(
    global_contrastive=1.0,
    sentence_contrastive=1.0,
    sentence_mse=1.0,
    pathology_detection=1.0,
    pathology_classification=1.0,
    anatomy_detection=1.0,
    anatomy_classification=1.0,
    anatomy_mse=1.0,
)


def loss_and_gradients(objective, outputs, inputs, **kwargs):
    inputs = dict(inputs)
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in outputs}
    terms = objective(**(inputs | leaves), **kwargs)
    gradients = torch.autograd.grad(weighted_sum(terms, WEIGHTS), list(leaves.values()))
    return terms, dict(zip(leaves, gradients, strict=True))


def test_sentence_losses_average_images_equally():
    sentence, _, _ = random_batch()
    z, r, mask = (sentence[name] for name in ("sentence_features", "query_features", "sentence_mask"))
    mask[0], mask[1] = False, True
    valid_z = torch.nn.functional.normalize(z[mask], dim=-1)
    per_image = {"contrastive": [], "mse": []}
    for n in range(len(z)):
        losses = []
        for j in mask[n].nonzero().flatten():
            logits = valid_z @ torch.nn.functional.normalize(r[n, j], dim=-1) / 0.25
            own = (
                torch.nn.functional.normalize(z[n, j], dim=-1) @ torch.nn.functional.normalize(r[n, j], dim=-1) / 0.25
            )
            losses.append(logits.exp().sum().log() - own)
        if losses:
            per_image["contrastive"].append(torch.stack(losses).mean())
            per_image["mse"].append((z[n] - r[n])[mask[n]].square().sum(-1).mean())
    assert_close(sentence_contrastive_loss(z, r, mask), torch.stack(per_image["contrastive"]).mean())
    assert_close(sentence_mse_loss(z, r, mask), torch.stack(per_image["mse"]).mean())


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("lambdas", [(1.0, 0.0), (0.3, 0.7)])
def test_duplicate_sentences_are_no_negatives_if_identified(cross, lambdas):
    sentence, _, _ = random_batch()
    z, r = sentence["sentence_features"][:1], sentence["query_features"][:1]
    z[:, 1] = z[:, 0]
    mask = torch.ones(1, 3, dtype=torch.bool)

    def loss(ids, features=z, queries=r, valid=mask):
        return sentence_contrastive_loss(features, queries, valid, 0.25, *lambdas, cross, sentence_ids=ids)

    by_default = sentence_contrastive_loss(z, r, mask, 0.25, *lambdas, cross)
    assert_close(loss(torch.tensor([[4, 5, 6]])), by_default)
    assert loss(torch.tensor([[4, 4, 6]])) < by_default
    # two identical sentences alone have no negatives left
    assert loss(torch.tensor([[4, 4]]), z[:, :2], r[:, :2], mask[:, :2]) == 0


def test_global_contrastive_without_text_is_as_if_the_image_were_absent():
    u, t = torch.randn(4, 8), torch.randn(4, 8)
    mask = torch.tensor([True, False, True, True])
    t[1] = torch.nan
    assert_close(global_contrastive_loss(u, t, 0.2, mask), global_contrastive_loss(u[mask], t[mask], 0.2))


def test_pathology_detection_rewards_the_right_region():
    """Moving the best region to the target and its score up lowers both losses; absent classes want low scores."""
    target = torch.tensor([0.3, 0.4, 0.2, 0.2])
    boxes = torch.tensor([[0.3, 0.4, 0.21, 0.2], [0.7, 0.7, 0.3, 0.3], [0.5, 0.2, 0.4, 0.1]]).repeat(1, 2, 1, 1)
    scores = torch.full((1, 2, 3), 0.5, requires_grad=True)
    features, prompts = torch.zeros(1, 2, 3, 4), torch.zeros(2, 4)
    mask = torch.tensor([[[True], [False]]])
    loss, box_loss, score_loss, matching = pathology_detection_loss(
        boxes, scores, features, prompts, prompts, target.repeat(1, 2, 1, 1), mask, torch.ones(1, 2, dtype=torch.bool)
    )
    assert matching.matched.tolist() == [[[True, False, False], [False, False, False]]]
    # three regions share the target; the class without boxes counts as 0
    terms = 5 * l1_cost(boxes[0, 0], target) + 2 * giou_cost(boxes[0, 0], target)
    assert_close(box_loss, terms.mean() / 2)
    alpha = (5 + 1) / (6 + 2)
    focal = -0.25 * math.log(0.5) * torch.tensor([alpha + 2 * (1 - alpha), 3 * (1 - alpha)]) / 3
    assert_close(score_loss, focal.mean())
    assert_close(loss, box_loss.detach() + 3 * score_loss.detach())
    loss.backward()
    assert (scores.grad[0, 0] < 0).tolist() == [True, False, False] and (scores.grad[0, 1] > 0).all()


def test_class_and_score_terms_of_the_matching_cost():
    """Two regions at the same place: the one whose feature, or score, fits better gets the target's reward."""
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.2]).repeat(1, 1, 2, 1)
    target, mask = boxes[:, :, :1], torch.ones(1, 1, 1, dtype=torch.bool)
    annotated, positive = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[1.0, 0.0]])
    features = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]])
    scores = torch.tensor([[[0.6, 0.5]]])

    def rewarded(**options):
        arguments = (boxes, scores, features, positive, -positive, target, mask, annotated)
        return pathology_detection_loss(*arguments, DetectionOptions(**options)).matching.matched.tolist()

    assert rewarded() == [[[False, True]]]
    assert rewarded(cost_class=0.0) == [[[True, False]]]


def test_anatomy_detection_counts_regions_and_multi_anatomies():
    _, _, anatomy = random_batch(3)
    boxes, target, mask = anatomy["region_boxes"], anatomy["target_boxes"], anatomy["present"]
    terms = 5 * l1_cost(boxes, target[:, :, None]) + 2 * giou_cost(boxes, target[:, :, None])
    loss, single, multi = anatomy_detection_loss(boxes, target, mask)
    assert_close(loss, terms[mask].mean())
    assert_close(single, loss.detach())
    assert multi == 0

    multi_mask = torch.tensor([[True], [False]]).expand(4, 2, 2)  # only the first of two multi-region anatomies
    one_region = anatomy["multi_region_boxes"][:, :, :1].expand(-1, -1, 3, -1)
    same_target = anatomy["multi_target_boxes"][:, :, :1].expand(-1, -1, 2, -1)
    arguments = (boxes, target, mask, one_region, anatomy["multi_region_scores"], same_target, multi_mask)
    loss, single, multi = anatomy_detection_loss(*arguments)
    multi_terms = 5 * l1_cost(one_region[:, 0, 0], same_target[:, 0, 0])
    multi_terms = multi_terms + 2 * giou_cost(one_region[:, 0, 0], same_target[:, 0, 0])
    assert_close(multi, multi_terms.mean())
    assert_close(loss, (terms[mask].sum() + multi_terms.sum()) / (3 * mask.sum() + 4))


def test_mse_of_regions_outside_the_image():
    _, _, anatomy = random_batch()
    corrected = anatomy_objective(**anatomy, terms=["anatomy_mse"])["anatomy_mse"]
    official = anatomy_objective(**anatomy, terms=["anatomy_mse"], objective_mode="official")["anatomy_mse"]
    z, f = anatomy["sentence_features"], anatomy["query_features"]
    assert_close(official, sentence_mse_loss(z, f, anatomy["has_sentences"]))
    assert_close(corrected, sentence_mse_loss(z, f, anatomy["has_sentences"] & anatomy["present"]))
    assert corrected != official


def test_anatomy_subsets():
    _, _, anatomy = random_batch(1)
    kept = torch.tensor([True, False, True, True, False])
    terms = anatomy_objective(**anatomy, kept=kept)
    chosen = {
        name: value[:, kept] if name in ("query_features", "region_boxes") or "sentences" in name else value
        for name, value in anatomy.items()
    }
    for name in ("present", "target_boxes", "has_boxes", "labels", "has_labels", "sentence_features"):
        chosen[name] = anatomy[name][:, kept]
    alone = anatomy_objective(**chosen)
    for name in ("anatomy_detection", "anatomy_mse"):
        assert_close(terms[name], alone[name])
    # classification is not sub-sampled
    assert_close(terms["anatomy_classification"], anatomy_objective(**anatomy)["anatomy_classification"])


def test_absent_classes_outside_the_subset_take_no_part():
    _, _, anatomy = random_batch(2, classes=6)
    inputs = [anatomy[name] for name in ("query_features", "positive", "negative", "labels", "has_labels")]
    subset = torch.tensor([True, True, False, False, True, False])
    loss = anatomy_classification_loss(*inputs, class_subset=subset)
    present = inputs[3] & inputs[4]
    expected = anatomy_classification_loss(*inputs[:4], inputs[4] & (subset | present))
    assert_close(loss, expected)
    none = anatomy_classification_loss(*inputs, class_subset=torch.zeros(6, dtype=torch.bool))
    assert torch.isfinite(none).all() and (none[~present.any(-1)] == 0).all()


def test_anatomy_subset_drawn_in_the_objective_is_seeded():
    _, _, anatomy = random_batch(2, classes=6)
    options = AnatomyOptions(subsample_negatives=2)

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        terms = ["anatomy_classification"]
        return anatomy_objective(**anatomy, terms=terms, options=options, generator=generator)[terms[0]].item()

    values = [loss(seed) for seed in range(8)]
    assert values == [loss(seed) for seed in range(8)] and len(set(values)) > 1


# ---------------------------------------------------------------------------------------------------------------------
# The same terms once more, one image, query and class at a time in float64, straight from the equations


def mean(values: list) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))


def log_sum_exp(values: list[float]) -> float:
    return math.log(sum(math.exp(value) for value in values))


def box_cost(box: torch.Tensor, target: torch.Tensor) -> float:
    """5 * L1 + 2 * (1 - GIoU) of two boxes (4,)."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (
        (xc - w / 2, yc - h / 2, xc + w / 2, yc + h / 2) for xc, yc, w, h in (box.tolist(), target.tolist())
    )
    overlap = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return 5 * float((box - target).abs().sum()) + 2 * (1 - overlap / union + (hull - union) / hull)


def best_map(cost: list[list[float]]) -> tuple[list[tuple[int, int]], set[int]]:
    """Assigned (region, target) and the cheapest region of each target, by trying every map of regions to targets."""
    regions, targets = len(cost), len(cost[0])
    if regions > targets:
        fewest, most = regions // targets, -(-regions // targets)
        maps = itertools.product(range(targets), repeat=regions)
        maps = [m for m in maps if all(fewest <= m.count(target) <= most for target in range(targets))]
    else:
        maps = list(itertools.permutations(range(targets), regions))
    chosen = min(maps, key=lambda m: sum(cost[region][target] for region, target in enumerate(m)))
    pairs = list(enumerate(chosen))
    matched = {min((r for r, t in pairs if t == target), key=lambda r: cost[r][target]) for target in set(chosen)}
    return pairs, matched


def naive_sentence_terms(inputs: dict) -> dict[str, float]:
    r, z, mask, patches = (
        inputs[name] for name in ("query_features", "sentence_features", "sentence_mask", "patch_features")
    )
    valid = mask.nonzero().tolist()
    images = sorted({n for n, _ in valid})
    u = {n: patches[n].flatten(0, -2).mean(0) for n in images}
    t = {n: z[n][mask[n]].mean(0) for n in images}
    logits = {(n, m): cosine(u[n], t[m]) / 0.2 for n in images for m in images}
    contrastive, mse = {n: [] for n in images}, {n: [] for n in images}
    for n, j in valid:
        scores = [cosine(r[n, j], z[m, i]) / 0.25 for m, i in valid]
        contrastive[n].append(log_sum_exp(scores) - cosine(r[n, j], z[n, j]) / 0.25)
        mse[n].append(float((z[n, j] - r[n, j]).square().sum()))
    return {
        "global_contrastive": mean([log_sum_exp([logits[n, m] for m in images]) - logits[n, n] for n in images])
        + mean([log_sum_exp([logits[m, n] for m in images]) - logits[n, n] for n in images]),
        "sentence_contrastive": mean([mean(losses) for losses in contrastive.values()]),
        "sentence_mse": mean([mean(losses) for losses in mse.values()]),
    }


def naive_pathology_terms(inputs: dict) -> dict[str, float]:
    positive, negative, scores = inputs["positive"], inputs["negative"], inputs["region_scores"]
    images, classes, regions = scores.shape
    annotated = inputs["has_boxes"]
    box_losses, rewarded = {}, set()
    for n, c in annotated.nonzero().tolist():
        targets = inputs["target_boxes"][n, c][inputs["target_mask"][n, c]]
        box_losses[n, c] = 0.0
        if not len(targets):
            continue
        boxes = [[box_cost(box, target) for target in targets] for box in inputs["region_boxes"][n, c]]
        cost = []
        for s in range(regions):
            feature = inputs["region_features"][n, c, s]
            margin = float(feature @ positive[c] - feature @ negative[c])
            score = 1 * (1 - 1 / (1 + math.exp(-margin))) + 3 * (1 - float(scores[n, c, s]))
            cost.append([value + score for value in boxes[s]])
        pairs, matched = best_map(cost)
        box_losses[n, c] = mean([boxes[s][t] for s, t in pairs])
        rewarded |= {(n, c, s) for s in matched}
    seen = [n for n in range(images) if annotated[n].any()]
    total = len(seen) * classes * regions
    alpha = (total - len(rewarded) + 1) / (total + 2)

    def focal(place: tuple[int, int, int]) -> float:
        p = float(scores[place])
        if place in rewarded:
            return -alpha * (1 - p) ** 2 * math.log(p)
        return -(1 - alpha) * p**2 * math.log(1 - p)

    def over_images(losses: dict[tuple[int, int], float]) -> float:
        return mean([mean([v for (m, _), v in losses.items() if m == n]) for n in sorted({n for n, _ in losses})])

    score_losses = {(n, c): mean([focal((n, c, s)) for s in range(regions)]) for n, c in box_losses}
    classification = {}
    for n, c in inputs["has_labels"].nonzero().tolist():
        feature = inputs["query_features"][n, c]
        logits = [cosine(feature, prompt) / 0.2 for prompt in (*positive, *negative)]
        target = c if inputs["labels"][n, c] else classes + c
        classification[n, c] = log_sum_exp(logits) - logits[target]
    return {
        "pathology_detection/box": over_images(box_losses),
        "pathology_detection/score": over_images(score_losses),
        "pathology_detection": over_images(box_losses) + 3 * over_images(score_losses),
        "pathology_classification": over_images(classification),
    }


def naive_anatomy_terms(inputs: dict) -> dict[str, float]:
    present = inputs["present"]
    single = [
        box_cost(box, inputs["target_boxes"][n, a])
        for n, a in (present & inputs["has_boxes"]).nonzero().tolist()
        for box in inputs["region_boxes"][n, a]
    ]
    multi = []
    for n, a in inputs["multi_target_mask"].any(-1).nonzero().tolist():
        targets = inputs["multi_target_boxes"][n, a][inputs["multi_target_mask"][n, a]]
        boxes = [[box_cost(box, target) for target in targets] for box in inputs["multi_region_boxes"][n, a]]
        scores = inputs["multi_region_scores"][n, a].tolist()
        pairs, _ = best_map([[v + 3 * (1 - score) for v in row] for row, score in zip(boxes, scores, strict=True)])
        multi.append(mean([boxes[s][t] for s, t in pairs]))
    classification = []
    observed = inputs["has_labels"] & present[..., None]
    for n, a in observed.any(-1).nonzero().tolist():
        feature = inputs["query_features"][n, a]
        true, false = [], []
        for c in observed[n, a].nonzero().flatten().tolist():
            pair = [cosine(feature, inputs[name][c]) / 0.25 for name in ("positive", "negative")]
            true.append(pair[0 if inputs["labels"][n, a, c] else 1])
            false.append(pair[1 if inputs["labels"][n, a, c] else 0])
        classification.append(log_sum_exp(true + false) - mean(true))
    mse = {}
    for n, a in (inputs["has_sentences"] & present).nonzero().tolist():
        error = inputs["sentence_features"][n, a] - inputs["query_features"][n, a]
        mse.setdefault(n, []).append(float(error.square().sum()))
    return {
        "anatomy_detection": (sum(single) + sum(multi)) / max(len(single) + len(multi), 1),
        "anatomy_detection/single": mean(single),
        "anatomy_detection/multi": mean(multi),
        "anatomy_classification": mean(classification),
        "anatomy_mse": mean([mean(losses) for losses in mse.values()]),
    }


NAIVE = (naive_sentence_terms, naive_pathology_terms, naive_anatomy_terms)


@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
@pytest.mark.parametrize(
    "case",
    [
        "some",
        "one image",
        "one of each",
        "everything",
        "nothing",
        "one image without",
        "no box",
        "duplicates",
        "bfloat16",
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_terms_equal_the_equations(which, case, seed):
    sizes = {
        "one image": {"images": 1},
        "one of each": dict.fromkeys(("images", "anatomies", "classes", "sentences"), 1),
    }
    inputs = random_batch(100 + seed, **sizes.get(case, {}))[which]
    masks = [name for name in MASKS if name in inputs]
    if case == "bfloat16":
        inputs = {name: v.bfloat16() if v.is_floating_point() else v for name, v in inputs.items()}
    if case in ("one of each", "everything"):
        inputs |= {name: torch.ones_like(inputs[name]) for name in masks}  # four targets for three regions
    elif case == "nothing":
        inputs |= {name: torch.zeros_like(inputs[name]) for name in masks}
    elif case == "one image without":
        for name in masks:
            inputs[name][1] = False
    elif case == "no box" and which:
        inputs |= {
            name: torch.zeros_like(inputs[name]) for name in ("target_mask", "multi_target_mask") if name in masks
        }
    elif case == "duplicates" and which == 0:
        inputs["sentence_features"][:, 1] = inputs["sentence_features"][:1, 0]
    exact = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    expected = NAIVE[which](exact)
    for arguments, tolerance in ((inputs, 2e-5), (exact, 1e-11)):
        terms = OBJECTIVES[which](**arguments)
        assert terms.keys() == expected.keys()
        for name, value in expected.items():
            assert terms[name].item() == pytest.approx(value, rel=tolerance, abs=tolerance), name
    if case == "nothing":
        assert not any(expected.values())
    if case == "everything":
        assert all(expected.values())


@pytest.mark.parametrize("boxes", [0, 1, 2, 5, 9])
def test_any_number_of_boxes_of_a_class(boxes):
    """Fewer than regions, as many, more; with one slot for each or with padding between them."""
    inputs = random_batch(7)[1]
    g = torch.Generator().manual_seed(boxes)
    draws = torch.rand(4, 3, boxes, 4, generator=g, dtype=torch.float64)
    inputs = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    inputs["target_boxes"] = torch.cat([draws[..., :2], 0.1 + 0.5 * draws[..., 2:]], dim=-1)
    inputs["target_mask"] = torch.ones(4, 3, boxes, dtype=torch.bool)
    expected = naive_pathology_terms(inputs)
    for name, term in pathology_objective(**inputs).items():
        assert term.item() == pytest.approx(expected[name], rel=1e-11), name
    spread = torch.zeros(4, 3, 2 * boxes + 1, 4, dtype=torch.float64)
    mask = torch.zeros(4, 3, 2 * boxes + 1, dtype=torch.bool)
    spread[:, :, 1::2], mask[:, :, 1::2] = inputs["target_boxes"], True
    for name, term in pathology_objective(**inputs | {"target_boxes": spread, "target_mask": mask}).items():
        assert term.item() == pytest.approx(expected[name], rel=1e-11), name


# ---------------------------------------------------------------------------------------------------------------------
# Options that the published stages leave at their defaults, and terms that are not the paper's, in the same plain form


def softmax_loss(logits: list[float], target: float) -> float:
    return log_sum_exp(logits) - target


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("identical", [False, True])
@pytest.mark.parametrize("lambdas", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("images", [1, 4])
def test_sentence_contrastive_options_equal_the_equations(cross, identical, lambdas, images):
    sentence = random_batch(20, images=images)[0]
    z, r, mask = (sentence[name].clone() for name in ("sentence_features", "query_features", "sentence_mask"))
    z, r = z.double(), r.double()
    if images > 1:
        mask[1] = False  # an image without sentences
        mask[0], mask[2] = True, True
    ids = torch.arange(mask.numel()).view(mask.shape)
    ids[:, 1], z[:, 1] = ids[0, 0], z[0, 0]  # a sentence that occurs often
    losses = {}
    for n, j in mask.nonzero().tolist():
        others = [
            (m, i)
            for m, i in mask.nonzero().tolist()
            if (cross or m == n) and (identical or (m, i) == (n, j) or ids[m, i] != ids[n, j])
        ]
        own = cosine(r[n, j], z[n, j]) / 0.3
        to_sentence = softmax_loss([cosine(r[n, j], z[place]) / 0.3 for place in others], own)
        to_region = softmax_loss([cosine(r[place], z[n, j]) / 0.3 for place in others], own)
        losses.setdefault(n, []).append(lambdas[0] * to_sentence + lambdas[1] * to_region)
    loss = sentence_contrastive_loss(z, r, mask, 0.3, *lambdas, cross, None if identical else ids)
    assert loss.item() == pytest.approx(mean([mean(own) for own in losses.values()]), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_pathology_classification_options_equal_the_equations(others, ignore, classes):
    inputs = random_batch(21, classes=classes)[1]
    features, positive, negative = (inputs[name].double() for name in ("query_features", "positive", "negative"))
    losses = pathology_classification_loss(features, positive, negative, inputs["labels"], 0.3, others, ignore)
    for (n, c), label in zip(itertools.product(range(4), range(classes)), inputs["labels"].flatten(), strict=True):
        p, q = ([cosine(features[n, c], prompt) / 0.3 for prompt in prompts] for prompts in (positive, negative))
        candidates = [p[c], q[c]] if ignore and not label else p + (q if others else [q[c]])
        assert losses[n, c].item() == pytest.approx(softmax_loss(candidates, p[c] if label else q[c]), rel=1e-11)


@pytest.mark.parametrize("contrast", ["posneg", "only_pos", "all"])
@pytest.mark.parametrize("subset", [None, (True, False, True), (False, False, False)])
@pytest.mark.parametrize("seed", range(3))
def test_anatomy_classification_options_equal_the_equations(contrast, subset, seed):
    inputs = random_batch(30 + seed, images=3, anatomies=4)[2]
    g = torch.Generator().manual_seed(seed)
    features, positive, negative = (inputs[name].double() for name in ("query_features", "positive", "negative"))
    of_region = torch.randn(2, 4, 3, 8, generator=g, dtype=torch.float64)  # positive and negative ones
    labels, observed = inputs["labels"], inputs["has_labels"] & inputs["present"][..., None]
    observed[0, 0] = False
    chosen = None if subset is None else torch.tensor(subset)
    losses = anatomy_classification_loss(
        features, positive, negative, labels, observed, 0.3, contrast, chosen, *of_region
    )
    for n, a in itertools.product(range(3), range(4)):
        describing, misleading = [], []
        for c in observed[n, a].nonzero().flatten().tolist():
            pairs = [(positive[c], negative[c])]
            if contrast == "all":
                pairs.append((of_region[0, a, c], of_region[1, a, c]))
                for b in range(4):
                    if b != a and observed[n, b, c]:
                        misleading += [cosine(features[n, a], of_region[sign, b, c]) / 0.3 for sign in (0, 1)]
            for pair in pairs:
                p, q = (cosine(features[n, a], prompt) / 0.3 for prompt in pair)
                if labels[n, a, c]:
                    describing.append(p)
                    misleading.append(q)
                elif subset is None or subset[c]:
                    misleading.append(p)
                    describing += [q] if contrast != "only_pos" else []
        expected = log_sum_exp(describing + misleading) - mean(describing) if describing + misleading else 0.0
        assert losses[n, a].item() == pytest.approx(expected, rel=1e-11, abs=1e-14), (n, a)


def take_cheapest(cost: list[list[float]], replicas: int) -> list[tuple[int, int]]:
    """Pairs (region, target): the cheapest one of the replicated matrix, again and again."""
    values = [value for row in cost for value in row]
    offset = max(values) - min(values) + 1
    left = {
        (region, target, replica): value + replica * offset
        for region, row in enumerate(cost)
        for target, value in enumerate(row)
        for replica in range(replicas)
    }
    pairs = []
    while left:
        region, target, replica = min(left, key=left.get)
        pairs.append((region, target))
        left = {key: v for key, v in left.items() if key[0] != region and key[1:] != (target, replica)}
    return pairs


@pytest.mark.parametrize("mode", ["balanced", "ignore"])
@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("seed", range(2))
def test_detection_options_equal_the_equations(mode, greedy, alpha, seed):
    """With other coefficients than the published ones, and regions that have no target."""
    inputs = random_batch(40 + seed)[1]
    inputs = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    options = DetectionOptions(3.0, 4.0, 2.0, 1.5, 6.0, 0.5, 0.7, alpha, 1.5, mode, greedy)
    scores, annotated = inputs["region_scores"], inputs["has_boxes"]
    box_losses, rewarded = {}, set()
    for n, c in annotated.nonzero().tolist():
        targets = inputs["target_boxes"][n, c][inputs["target_mask"][n, c]]
        box_losses[n, c] = 0.0
        if not len(targets):
            continue
        cost, loss = [], []
        for s, box in enumerate(inputs["region_boxes"][n, c]):
            l1 = [float((box - target).abs().sum()) for target in targets]
            giou = [(box_cost(box, target) - 5 * own) / 2 for target, own in zip(targets, l1, strict=True)]
            feature = inputs["region_features"][n, c, s]
            margin = float(feature @ inputs["positive"][c] - feature @ inputs["negative"][c])
            other = 2 * (1 - 1 / (1 + math.exp(-margin))) + 1.5 * (1 - float(scores[n, c, s]))
            cost.append([3 * a + 4 * b + other for a, b in zip(l1, giou, strict=True)])
            loss.append([6 * a + 0.5 * b for a, b in zip(l1, giou, strict=True)])
        if greedy:
            pairs = take_cheapest(cost, -(-3 // len(targets)) if mode == "balanced" else 1)
        elif mode == "balanced":
            pairs, _ = best_map(cost)
        else:
            size = min(3, len(targets))
            choices = (
                list(zip(regions, columns, strict=True))
                for regions in itertools.combinations(range(3), size)
                for columns in itertools.permutations(range(len(targets)), size)
            )
            pairs = min(choices, key=lambda chosen, cost=cost: sum(cost[s][t] for s, t in chosen))
        box_losses[n, c] = mean([loss[s][t] for s, t in pairs])
        for target in {t for _, t in pairs}:
            rewarded.add((n, c, min((s for s, t in pairs if t == target), key=lambda s, t=target: cost[s][t])))
    seen = sorted({n for n, _ in box_losses})
    total = len(seen) * 3 * 3
    weight = alpha if alpha is not None else (total - len(rewarded) + 1) / (total + 2)
    score_losses = {}
    for n, c in box_losses:
        focal = []
        for s in range(3):
            p = float(scores[n, c, s])
            hit = (n, c, s) in rewarded
            focal.append(
                -(weight if hit else 1 - weight) * (1 - p if hit else p) ** 1.5 * math.log(p if hit else 1 - p)
            )
        score_losses[n, c] = mean(focal)
    boxes, score = (
        mean([mean([v for (m, _), v in losses.items() if m == n]) for n in seen])
        for losses in (box_losses, score_losses)
    )
    arguments = [inputs[name] for name in ("region_boxes", "region_scores", "region_features", "positive", "negative")]
    arguments += [inputs[name] for name in ("target_boxes", "target_mask", "has_boxes")]
    found = pathology_detection_loss(*arguments, options)
    assert found.box_loss.item() == pytest.approx(boxes, rel=1e-11)
    assert found.score_loss.item() == pytest.approx(score, rel=1e-11)
    assert found.loss.item() == pytest.approx(boxes + 0.7 * score, rel=1e-11)


def naive_other_terms(inputs: dict) -> dict[str, float]:
    """Losses that the paper does not have."""
    pairs = {True: [], False: []}
    for n, a, c in (inputs["has_labels"] & inputs["present"][..., None]).nonzero().tolist():
        feature, label = inputs["query_features"][n, a], bool(inputs["labels"][n, a, c])
        d = (cosine(feature, inputs["positive"][c]) - cosine(feature, inputs["negative"][c])) / 0.1
        pairs[label].append(math.log1p(math.exp(-d if label else d)))
    presence = [
        -math.log(p if inputs["present"][n, a] else 1 - p)
        for n, a in inputs["has_boxes"].nonzero().tolist()
        for p in inputs["region_scores"][n, a].tolist()
    ]
    boxes, truth = {}, []
    for n, s in inputs["has_boxes"].nonzero().tolist():
        targets = inputs["targets"][n, s][inputs["target_mask"][n, s]]
        truth += [-math.log(p if len(targets) else 1 - p) for p in inputs["region_scores"][n, s].tolist()]
        value = 0.0
        if len(targets):
            costs = [[box_cost(box, target) for target in targets] for box in inputs["region_boxes"][n, s]]
            scored = [
                [v + 3 * (1 - float(p)) for v in row]
                for row, p in zip(costs, inputs["region_scores"][n, s], strict=True)
            ]
            value = mean([costs[r][t] for r, t in best_map(scored)[0]])
        boxes.setdefault(n, []).append(value)
    return {
        "statement": (mean(pairs[True]) + mean(pairs[False])) / 2,
        "presence": mean(presence),
        "phrases": mean([mean(losses) for losses in boxes.values()]) + mean(truth),
    }


def other_terms(inputs: dict, collectives: Collectives = SINGLE_PROCESS) -> dict[str, torch.Tensor]:
    labels = [inputs[name] for name in ("query_features", "positive", "negative", "labels")]
    observed = inputs["has_labels"] & inputs["present"][..., None]
    regions = [inputs[name] for name in ("region_boxes", "region_scores", "targets", "target_mask", "has_boxes")]
    return {
        "statement": statement_loss(*labels, observed, 0.1, collectives.of("statement")),
        "presence": presence_loss(
            inputs["region_scores"], inputs["present"], inputs["has_boxes"], collectives.of("presence")
        ),
        "phrases": sentence_detection_loss(*regions, collectives=collectives.of("phrases")),
    }


def other_inputs(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
    inputs = random_batch(seed, **sizes)[2]
    g = torch.Generator().manual_seed(seed)
    places = inputs["present"].shape
    draws = torch.rand(*places, 2, 4, generator=g)
    inputs |= {
        "region_scores": 0.1 + 0.8 * torch.rand(*places, 3, generator=g),
        "targets": torch.cat([draws[..., :2], 0.1 + 0.5 * draws[..., 2:]], dim=-1),
        "target_mask": torch.rand(*places, 2, generator=g) < 0.5,
    }
    return {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}


@pytest.mark.parametrize("case", ["some", "one image", "nothing", "all present", "all absent"])
@pytest.mark.parametrize("seed", range(2))
def test_terms_outside_the_paper_equal_their_equations(case, seed):
    inputs = other_inputs(60 + seed, images=1 if case == "one image" else 4)
    if case == "nothing":
        inputs |= {name: torch.zeros_like(inputs[name]) for name in ("has_labels", "has_boxes")}
    elif case.startswith("all"):
        inputs["labels"] = torch.full_like(inputs["labels"], case == "all present")
        inputs["target_mask"] = torch.full_like(inputs["target_mask"], case == "all present")
    expected = naive_other_terms(inputs)
    for name, loss in other_terms(inputs).items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-11, abs=1e-14), name
    if case == "nothing":
        assert not any(expected.values())


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("case", ["some", "one text of one token", "nothing"])
def test_generation_loss_equals_the_equation(mode, case):
    g = torch.Generator().manual_seed(5)
    lengths = {"some": [4, 7, 0, 2], "one text of one token": [1], "nothing": [0, 0]}[case]
    logits = torch.randn(len(lengths), 7, 9, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 9, (len(lengths), 7), generator=g)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    losses = []
    for row, length in enumerate(lengths):
        counted = 0 if not length else 7 if mode == "official" else length
        for t in range(counted - 1):
            scores = logits[row, t].tolist()
            losses.append(softmax_loss(scores, scores[ids[row, t + 1]]))
    assert generation_loss(logits, ids, mask, mode).item() == pytest.approx(mean(losses), rel=1e-11, abs=1e-14)


def test_official_mode_differs_only_where_it_is_said_to():
    """The rewarded regions, and sentences of anatomies outside of the image."""
    _, pathology, anatomy = random_batch(4)
    corrected, official = (pathology_objective(**pathology, objective_mode=mode) for mode in ("corrected", "official"))
    changed = {name for name in corrected if not torch.equal(corrected[name], official[name])}
    assert changed == {"pathology_detection", "pathology_detection/score"}
    corrected, official = (anatomy_objective(**anatomy, objective_mode=mode) for mode in ("corrected", "official"))
    changed = {name for name in corrected if not torch.equal(corrected[name], official[name])}
    assert changed == {"anatomy_mse"}
    anatomy["present"][:] = True
    same = anatomy_objective(**anatomy, objective_mode="official")["anatomy_mse"]
    assert torch.equal(anatomy_objective(**anatomy)["anatomy_mse"], same)


# ---------------------------------------------------------------------------------------------------------------------
# Masks, empty supervision, precision, shapes


@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
@pytest.mark.parametrize("objective_mode", ["corrected", "official"])
@pytest.mark.parametrize("seed", range(3))
def test_masked_targets_have_no_influence(which, objective_mode, seed):
    inputs = random_batch(seed)[which]
    objective, outputs = OBJECTIVES[which], OUTPUTS[which]
    kwargs = {"objective_mode": objective_mode} if which else {}
    spoiled = dict(inputs)
    if which == 0:
        spoil = [("sentence_features", inputs["sentence_mask"])]
    elif which == 1:
        valid = inputs["target_mask"] & inputs["has_boxes"][..., None]
        spoil = [("target_boxes", valid)]
        spoiled["labels"] = inputs["labels"] ^ ~inputs["has_labels"]
        spoiled["target_mask"] = inputs["target_mask"] | ~inputs["has_boxes"][..., None]
    else:
        described = inputs["has_sentences"]
        described = described & inputs["present"] if objective_mode == "corrected" else described
        spoil = [
            ("target_boxes", inputs["present"] & inputs["has_boxes"]),
            ("multi_target_boxes", inputs["multi_target_mask"]),
            ("sentence_features", described),
        ]
        spoiled["labels"] = inputs["labels"] ^ ~(inputs["has_labels"] & inputs["present"][..., None])
    for name, valid in spoil:
        spoiled[name] = inputs[name].masked_fill(~valid[..., None], torch.nan)
    terms, gradients = loss_and_gradients(objective, outputs, inputs, **kwargs)
    same_terms, same_gradients = loss_and_gradients(objective, outputs, spoiled, **kwargs)
    for before, after in ((terms, same_terms), (gradients, same_gradients)):
        for name, value in before.items():
            assert torch.isfinite(value).all() and torch.equal(value, after[name]), name
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
@pytest.mark.parametrize("how", ["masked", "absent"])
def test_empty_supervision_is_zero_and_connected(which, how):
    inputs = random_batch()[which]
    if how == "masked":
        inputs = {name: torch.zeros_like(value) if name in MASKS else value for name, value in inputs.items()}
    elif which == 0:
        inputs = {name: value[:, :0] if name != "patch_features" else value for name, value in inputs.items()}
    else:
        for name in ("target_boxes", "target_mask", "has_boxes", "labels", "has_labels", "sentence_features"):
            inputs.pop(name, None)
        inputs.pop("has_sentences", None)
        if which == 2:
            inputs["multi_target_mask"] = torch.zeros_like(inputs["multi_target_mask"])
    terms, gradients = loss_and_gradients(OBJECTIVES[which], OUTPUTS[which], inputs)
    assert all(term == 0 for term in terms.values())
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("sizes", [{"images": 0}, {"anatomies": 0, "classes": 0, "sentences": 0}, {"images": 1}])
@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
def test_any_number_of_images_and_queries(which, sizes):
    inputs = random_batch(**sizes)[which]
    if sizes.get("anatomies") == 0 and which == 2:
        for name in ("multi_region_boxes", "multi_region_scores", "multi_target_boxes", "multi_target_mask"):
            inputs[name] = inputs[name][:, :0]
    terms, gradients = loss_and_gradients(OBJECTIVES[which], OUTPUTS[which], inputs)
    assert all(torch.isfinite(term) and term.dim() == 0 for term in terms.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    if 0 in sizes.values():
        assert all(term == 0 for term in terms.values())


@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
def test_bfloat16_is_computed_in_float32(which):
    inputs = random_batch()[which]
    rounded = {name: v.bfloat16() if v.is_floating_point() else v for name, v in inputs.items()}
    reference = OBJECTIVES[which](**{n: v.float() if v.dtype == torch.bfloat16 else v for n, v in rounded.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, gradients = loss_and_gradients(OBJECTIVES[which], OUTPUTS[which], rounded)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert_close(term, reference[name].detach(), 1e-6)
    assert all(g.dtype == torch.bfloat16 and torch.isfinite(g).all() for g in gradients.values())


@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
def test_gradients_are_those_of_the_value(which):
    """Analytic gradients against finite differences, in float64."""
    inputs = random_batch(5, images=2)[which]
    inputs = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    outputs = OUTPUTS[which]

    def total(*leaves):
        terms = OBJECTIVES[which](**(inputs | dict(zip(outputs, leaves, strict=True))))
        return weighted_sum(terms, WEIGHTS)

    leaves = [inputs[name].clone().requires_grad_() for name in outputs]
    assert torch.autograd.gradcheck(total, leaves, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
def test_padding_has_no_influence(which):
    """More padded sentences or targets, and images without annotation, change nothing."""
    inputs = random_batch(7)[which]
    terms = OBJECTIVES[which](**inputs)

    def pad(name, value):
        value = torch.cat([value, torch.zeros_like(value[:1]) if name in MASKS else value[:1]])
        along = {0: ("query_features", "sentence_features", "sentence_mask"), 1: (), 2: ()}[which]
        if name in along:
            value = torch.cat([value, torch.zeros_like(value[:, :1])], dim=1)
        if name in ("target_mask", "multi_target_mask") or (name == "target_boxes" and which == 1):
            value = torch.cat([value, torch.zeros_like(value[:, :, :1])], dim=2)
        if name == "multi_target_boxes":
            value = torch.cat([value, torch.zeros_like(value[:, :, :1])], dim=2)
        return value

    shared = ("positive", "negative")
    padded = OBJECTIVES[which](**{n: v if n in shared else pad(n, v) for n, v in inputs.items()})
    for name, term in terms.items():
        assert_close(padded[name], term, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


class Processes:
    """Collectives among threads that play the processes of a distributed run."""

    def __init__(self, count: int):
        self.slots, self.barrier = [None] * count, threading.Barrier(count, timeout=30)

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.slots[rank] = tensor
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone

    def collectives(self, rank: int) -> Collectives:
        return Collectives(
            sum=lambda tensor: sum(self.exchange(rank, tensor)),
            gather_all=lambda tensors: [torch.cat(self.exchange(rank, tensor)) for tensor in tensors],
        )


FUNCTIONS = (*OBJECTIVES, other_terms)


def uneven_batch(which: int) -> dict[str, torch.Tensor]:
    """Four images, of which the last two have few annotations."""
    inputs = other_inputs(11) if which == 3 else random_batch(11)[which]
    for name in ("sentence_mask", "has_labels", "has_boxes", "has_sentences"):
        if name in inputs:
            inputs[name][2:] &= torch.rand(inputs[name][2:].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    return inputs


@pytest.mark.parametrize("which", range(4), ids=["sentence", "pathology", "anatomy", "other"])
def test_processes_agree_with_one_process(which):
    """Mean over two unevenly annotated processes = one process with the whole batch."""
    inputs, options = uneven_batch(which), {}
    if which == 2:
        options = {"options": AnatomyOptions(subsample_negatives=2)}
    shared = ("positive", "negative")
    group, results = Processes(2), [None, None]

    def run(rank: int):
        own = slice(0, 2) if rank == 0 else slice(2, 4)
        local = {name: value if name in shared else value[own] for name, value in inputs.items()}
        generator = {"generator": torch.Generator().manual_seed(3)} if which == 2 else {}
        local = {"inputs": local} if which == 3 else local
        results[rank] = FUNCTIONS[which](**local, **options, **generator, collectives=group.collectives(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    generator = {"generator": torch.Generator().manual_seed(3)} if which == 2 else {}
    inputs = {"inputs": inputs} if which == 3 else inputs
    for name, expected in FUNCTIONS[which](**inputs, **options, **generator).items():
        assert_close((results[0][name] + results[1][name]) / 2, expected, 1e-6)


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("second", [[3, 2], [0]], ids=["uneven", "no text"])
def test_texts_of_processes_agree_with_one_process(mode, second):
    """Officially the padding of both counts, up to the longest text of either."""
    lengths = ([6, 4, 1], second)
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(3 + len(second), 6, 9, generator=g)
    ids = torch.randint(0, 9, (3 + len(second), 6), generator=g)
    mask = torch.arange(6) < torch.tensor([*lengths[0], *second])[:, None]
    group, results = Processes(2), [None, None]

    def run(rank: int):
        own, collectives = slice(0, 3) if rank == 0 else slice(3, None), group.collectives(rank)
        longest = padded_length(torch.tensor([length for length in lengths[rank] if length]), collectives)
        loss = generation_loss(logits[own], ids[own], mask[own], mode, collectives)
        results[rank] = longest, loss

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [longest for longest, _ in results] == [6, 6]
    assert_close((results[0][1] + results[1][1]) / 2, generation_loss(logits, ids, mask, mode), 1e-6)


@pytest.mark.parametrize("objective_mode", ["corrected", "official"])
@pytest.mark.parametrize("which", range(4), ids=["sentence", "pathology", "anatomy", "other"])
def test_parts_of_a_step_agree_with_the_whole_step(which, objective_mode):
    """
    Parts of one and of three images are counted while their outputs are all zero, as no model has computed them yet;
    then their losses add up to those of all images together.
    """
    inputs, shared, totals = uneven_batch(which), ("positive", "negative"), StepTotals()
    arguments = {"objective_mode": objective_mode} if which in (1, 2) else {}
    outputs = ("query_features", "patch_features", "region_boxes", "region_scores", "region_features")
    outputs += ("multi_region_boxes", "multi_region_scores")

    def part(images: slice, counting: bool) -> dict[str, torch.Tensor]:
        local = {name: value if name in shared else value[images] for name, value in inputs.items()}
        if counting:
            local |= {name: torch.zeros_like(local[name]) for name in outputs if name in local}
        local = {"inputs": local} if which == 3 else local
        return FUNCTIONS[which](**local, **arguments, collectives=Collectives(totals=totals))

    parts = (slice(0, 1), slice(1, 4))
    for images in parts:
        part(images, counting=True)
    totals.finish(SINGLE_PROCESS)
    results = [part(images, counting=False) for images in parts]
    whole = FUNCTIONS[which](**({"inputs": inputs} if which == 3 else inputs), **arguments)
    for name, expected in whole.items():
        if "contrastive" in name:  # whose negatives are those of a part: the mean over images of what they give alone
            mask = inputs["sentence_mask"]
            weights = [mask[images].any(1).sum() for images in parts]
            alone = [
                sentence_objective(**{key: value[images] for key, value in inputs.items()})[name] for images in parts
            ]
            expected = sum(w * loss for w, loss in zip(weights, alone, strict=True)) / sum(weights)
        assert_close(results[0][name] + results[1][name], expected, 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_subsample_classes():
    generator = torch.Generator().manual_seed(0)
    available = torch.tensor([True, False] * 20)
    assert torch.equal(subsample_classes(available, None), available)
    assert torch.equal(subsample_classes(available, 20, generator), available)
    draws = torch.stack([subsample_classes(available, 5, generator) for _ in range(2000)])
    assert not (draws & ~available).any() and draws.any(dim=1).all()
    frequencies = draws.float().mean(0)[available]
    assert torch.allclose(frequencies, torch.full((20,), 0.25), atol=0.05)
    assert draws.sum(1).float().std() > 1  # independent draws: the number varies
    exact = torch.stack([subsample_classes(available, 5, generator, exact=True) for _ in range(200)])
    assert (exact.sum(1) == 5).all() and not (exact & ~available).any()
    assert not subsample_classes(torch.zeros(4, dtype=torch.bool), 2, generator).any()
    assert subsample_classes(torch.zeros(0, dtype=torch.bool), 2, generator).shape == (0,)


def test_subsample_classes_keeps_the_first_if_none_was_drawn():
    available = torch.tensor([False] + [True] * 1000)
    generator = torch.Generator().manual_seed(0)
    draws = [subsample_classes(available, 1, generator).nonzero().flatten().tolist() for _ in range(60)]
    assert [] not in draws
    assert draws.count([1]) > 5  # none is drawn in about 37 % of the cases


def test_subsample_classes_by_frequency():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([8, 1, 0, 0, 4])
    observed = torch.tensor([True, True, True, False, True])
    assert torch.equal(subsample_classes_by_frequency(counts, observed, None), observed)
    assert torch.equal(subsample_classes_by_frequency(counts, observed, 5), observed)
    draws = torch.stack([subsample_classes_by_frequency(counts, observed, 1, generator) for _ in range(4000)])
    frequencies = draws.float().mean(0)
    assert torch.allclose(frequencies, counts / 13, atol=0.03)
    three = torch.stack([subsample_classes_by_frequency(counts, observed, 3, generator) for _ in range(50)])
    assert torch.equal(three, torch.tensor([True, True, False, False, True]).expand(50, -1))


def test_random_subset_and_generation_choice():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 20, generator=generator) < 0.5
    assert torch.equal(random_subset(mask, None), mask) and torch.equal(random_subset(mask, 200, generator), mask)
    subsets = torch.stack([random_subset(mask, 10, generator) for _ in range(1000)])
    assert (subsets.flatten(1).sum(1) == 10).all() and not (subsets & ~mask).any()
    frequencies = subsets.float().mean(0)[mask]
    assert torch.allclose(frequencies, torch.full_like(frequencies, 10 / mask.sum()), atol=0.07)
    images, queries = choose_for_generation(mask, 32, generator)
    assert len(images) == 32 and mask[images, queries].all()
    assert len(set(zip(images.tolist(), queries.tolist(), strict=True))) == 32
    assert [index.numel() for index in choose_for_generation(torch.zeros(0, 3, dtype=torch.bool))] == [0, 0]


def test_choose_synonyms():
    counts = torch.tensor([1, 2, 5])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([choose_synonyms(counts, generator) for _ in range(2000)])
    assert (draws >= 0).all() and (draws < counts).all()
    for c, count in enumerate(counts.tolist()):
        frequencies = torch.bincount(draws[:, c], minlength=count) / 2000
        assert torch.allclose(frequencies, torch.full((count,), 1 / count), atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Weights, terms, errors


def test_published_weights():
    assert STAGE1_WEIGHTS.active() == {
        "global_contrastive",
        "sentence_contrastive",
        "pathology_detection",
        "pathology_classification",
        "anatomy_detection",
        "anatomy_classification",
    }
    assert STAGE2_WEIGHTS.active() == {
        "sentence_contrastive",
        "sentence_mse",
        "anatomy_classification",
        "anatomy_mse",
    }
    assert STAGE3_WEIGHTS.active() == {"sentence_mse", "sentence_generation", "anatomy_mse", "anatomy_generation"}


def test_weighted_sum():
    terms = {
        "sentence_mse": torch.tensor(2.0),
        "anatomy_mse": torch.tensor(3.0),
        "anatomy_mse/part": torch.tensor(9.0),
    }
    assert weighted_sum(terms, STAGE2_WEIGHTS) == pytest.approx(0.02 * 2 + 0.04 * 3)
    off = ObjectiveWeights(sentence_mse=1.0)
    assert weighted_sum(terms | {"anatomy_mse": torch.tensor(torch.nan)}, off) == 2
    with pytest.raises(ValueError, match="sentence_mses"):
        weighted_sum({"sentence_mses": torch.tensor(0.0)}, off)
    with pytest.raises(ValueError, match="Nothing to optimise"):
        weighted_sum({"anatomy_mse": torch.tensor(0.0)}, off)


@pytest.mark.parametrize("which", range(3), ids=["sentence", "pathology", "anatomy"])
def test_only_requested_terms_are_computed(which):
    inputs = random_batch()[which]
    every = OBJECTIVES[which](**inputs)
    for name in every:
        if "/" not in name:
            alone = OBJECTIVES[which](**inputs, terms=STAGE3_WEIGHTS.active() | {name})
            assert name in alone
            assert_close(alone[name], every[name])
    assert OBJECTIVES[which](**inputs, terms=()) == {}


def test_missing_inputs_are_named():
    sentence, _, anatomy = random_batch()
    del sentence["patch_features"]
    with pytest.raises(ValueError, match="patch_features"):
        sentence_objective(**sentence)
    with pytest.raises(ValueError, match="region_boxes"):
        anatomy_objective(anatomy["query_features"], anatomy["present"], terms=["anatomy_detection"])
    with pytest.raises(ValueError, match="positive and negative"):
        anatomy_objective(anatomy["query_features"], anatomy["present"], terms=["anatomy_classification"])
    arguments = [anatomy[name] for name in ("query_features", "positive", "negative", "labels", "has_labels")]
    with pytest.raises(ValueError, match="region_positive"):
        anatomy_classification_loss(*arguments, contrast="all")
    with pytest.raises(ValueError, match="'posnegs'"):
        anatomy_classification_loss(*arguments, contrast="posnegs")


def test_sentence_options_reach_the_losses():
    sentence, _, _ = random_batch()
    options = SentenceOptions(0.5, 0.3, 0.6, 0.4, False)
    terms = sentence_objective(**sentence, options=options)
    z, r, mask = sentence["sentence_features"], sentence["query_features"], sentence["sentence_mask"]
    assert_close(terms["sentence_contrastive"], sentence_contrastive_loss(z, r, mask, 0.3, 0.6, 0.4, False))
    u = sentence["patch_features"].flatten(1, 2).mean(1)
    t = torch.stack([z[n][mask[n]].mean(0) if mask[n].any() else torch.zeros(8) for n in range(4)])
    assert_close(terms["global_contrastive"], global_contrastive_loss(u, t, 0.5, mask.any(1)))


def test_phrases_are_scored_by_their_truth():
    """All regions of a true phrase should score 1, those of a false one 0; boxes are learnt from true phrases only."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand((2, 2, 3, 4), generator=generator) * 0.3 + 0.3
    targets = torch.rand((2, 2, 2, 4), generator=generator) * 0.3 + 0.3
    mask = torch.tensor([[[True, False], [False, False]], [[True, True], [False, False]]])
    annotated = torch.tensor([[True, True], [True, False]])

    def loss(scores, region_boxes=boxes):
        return sentence_detection_loss(region_boxes, scores, targets, mask, annotated)

    truth = mask.any(-1)[..., None].expand(2, 2, 3).float()
    best = loss(truth)
    assert loss(1 - truth) > best + 5
    assert loss(torch.full_like(truth, 0.5)) - best == pytest.approx(math.log(2), abs=1e-5)
    moved = boxes.clone()
    moved[:, 1] += 0.1  # boxes of false and of left-out phrases do not count
    assert loss(truth, moved) == best
    moved[0, 0] += 0.1
    assert loss(truth, moved) != best
    left_out = truth.clone()
    left_out[1, 1] = 1.0
    assert loss(left_out) == best
