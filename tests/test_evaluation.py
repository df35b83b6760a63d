"""Tasks, baselines and the evaluation command, on real records with an oracle and with a tiny random model."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from evaluation.baselines import (
    constant_auroc,
    fit_prior_boxes,
    linear_probe_auroc,
    score_constant_texts,
    score_prior_boxes,
)
from evaluation.metrics.detection_map.detection_map import detection_map
from evaluation.run import evaluate_model, format_table, load_data, main, write_json
from evaluation.tasks import choose_examples, explain_examples
from evaluation.tasks.base import centre_boxes, corners
from evaluation.tasks.detection import (
    Candidates,
    DetectionSettings,
    keep_after_nms,
    post_process,
    scale_boxes,
    tune_detection,
)
from evaluation.tasks.records import frame_boxes, iterate_targets, read_targets
from evaluation.tasks.report import deduplicate
from modeling_chex import ChexConfig, ChexModel, ChexOutput
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.prompt_sets import anatomy_prompts, class_prompts, find_class_set
from processing_chex.vocabulary import ANATOMY_NAMES, CHEXPERT_CLASSES, PHANTOM_CLASSES
from training.build_tokenizers import build_tokenizers
from training.data.phantom import phantom_features, phantom_record
from training.data.phantom_text import label_text


SIZE = 64
HEADLINES = ("anatomy_miou", "detection_map50", "grounding_miou", "region_auroc", "description_f1", "report_f1")


@pytest.fixture(scope="module")
def data():
    """Phantom splits, small but real."""
    splits = {"train": (0, 40), "validation": (1000, 8), "test": (2000, 24)}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(
                [phantom_record(3, start + index, SIZE) for index in range(count)], features=phantom_features()
            )
            for name, (start, count) in splits.items()
        }
    )


@pytest.fixture(scope="module")
def image_processor():
    return ChexImageProcessor(size={"height": SIZE, "width": SIZE})


class OracleProcessor:
    """Real images; a text becomes its number in a list."""

    def __init__(self, image_processor):
        self.image_processor = image_processor
        self.texts: list[str] = []

    def __call__(self, images=None, text=None, return_tensors=None):
        if images is not None:
            return self.image_processor(images, return_tensors="pt")
        self.texts += [entry for entry in text if entry not in self.texts]
        ids = torch.tensor([[self.texts.index(entry)] for entry in text])
        return EncodedText(input_ids=ids, attention_mask=torch.ones_like(ids))

    def decode_sentences(self, ids):
        return [[self.texts[int(entry[0])] if entry[0] >= 0 else "" for entry in row] for row in ids]


class EncodedText(dict):
    def to(self, device):
        return self


class Oracle:
    """Answers from the records themselves: exact boxes, features that say what is there, sentences to match.

    Prompt features are unit vectors, one per text, so that the mean of synonyms still tells which texts were meant.
    `shift` moves every box by that share of the image.
    """

    width = 600
    regions = 6

    def __init__(self, processor, records, shift=0.0, blind=False):
        self.processor, self.shift, self.blind = processor, shift, blind
        self.config = SimpleNamespace(generator_config=1, post_decoder_config=1, projection_dim=self.width)
        self.device, self.training = torch.device("cpu"), False
        self.records = {}
        for record in records:
            pixels = processor(images=[record["image"]])["pixel_values"][0]
            self.records[pixels.numpy().tobytes()] = record
        prompts = class_prompts("phantom")
        self.positive = [prompts.positive[name][0] for name in PHANTOM_CLASSES]
        self.negative = [prompts.negative[name][0] for name in PHANTOM_CLASSES]
        self.anatomy = {text: i for i, name in enumerate(ANATOMY_NAMES) for text in anatomy_prompts()[name]}

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def get_image_features(self, pixel_values):
        return [self.records[pixels.numpy().tobytes()] for pixels in pixel_values]

    def get_prompt_features(self, input_ids, attention_mask):
        return torch.nn.functional.one_hot(input_ids[:, 0], self.width).float()

    def _feature(self, present):
        """The unit vectors of what is present (positive prompts) and what is not (negative prompts)."""
        prompts = zip(PHANTOM_CLASSES, self.positive, self.negative, strict=True)
        texts = [positive if name in present else negative for name, positive, negative in prompts]
        return self.get_prompt_features(self.processor(text=texts)["input_ids"], None).sum(0)

    def _look_up(self, record, text):
        """Pixel boxes of a prompt, and the findings in its region."""
        if text in self.anatomy:
            index = self.anatomy[text]
            present = {n for n, v in zip(PHANTOM_CLASSES, record["anatomy_labels"][index], strict=True) if v == 1}
            return [record["anatomy_boxes"][index]] * self.regions, present
        found = [item for item in record["objects"] if text in (item["phrase"], PHANTOM_CLASSES[item["category"]])]
        return [item["bbox"] for item in found], {PHANTOM_CLASSES[item["category"]] for item in found}

    def __call__(self, image_features, prompt_features, query_mask=None, use_post_decoder=None, clip_boxes=False):
        count = len(image_features)
        if prompt_features.ndim == 2:
            prompt_features = prompt_features[None].expand(count, -1, -1)
        queries = prompt_features.shape[1]
        boxes = torch.zeros(count, queries, self.regions, 4)
        scores = torch.zeros(count, queries, self.regions)
        features = torch.zeros(count, queries, self.width)
        for image, record in enumerate(image_features):
            for query in range(queries):
                known = prompt_features[image, query].nonzero()
                if not len(known):
                    continue
                found, present = self._look_up(record, self.processor.texts[int(known[0])])
                for region, box in enumerate(found):
                    corner = torch.tensor(box, dtype=torch.float32) / SIZE
                    boxes[image, query, region] = centre_boxes(corner.numpy(), self.device)
                    boxes[image, query, region, :2] += self.shift
                    scores[image, query, region] = float(not self.blind)
                features[image, query] = self._feature(present)
        return ChexOutput(
            boxes=boxes[:, :, 0],
            region_boxes=boxes,
            region_scores=scores,
            query_scores=scores.amax(-1),
            query_features=features,
            region_features=features[:, :, None].expand(-1, -1, self.regions, -1),
            present=scores.amax(-1) > 0.5,
        )

    def encode_boxes(self, image_features, boxes, box_mask=None, use_post_decoder=None):
        features = torch.zeros(*boxes.shape[:2], self.width)
        for image, record in enumerate(image_features):
            exact = torch.tensor(record["anatomy_boxes"]) / SIZE
            for query in box_mask[image].nonzero()[:, 0].tolist():
                distance = (exact - torch.tensor(corners(boxes[image, query]), dtype=torch.float32)).abs().amax(-1)
                distance[~torch.tensor(record["anatomy_present"])] = 1.0
                assert distance.min() < 1e-4
                index = int(distance.argmin()) if distance[query] > 1e-4 else query
                labels = record["anatomy_labels"][index]
                features[image, query] = self._feature(
                    {name for name, value in zip(PHANTOM_CLASSES, labels, strict=True) if value == 1}
                )
        return features

    classify = staticmethod(ChexModel.classify)

    def generate(self, query_features, query_mask, **kwargs):
        """A sentence that names exactly the findings whose positive prompts are in the feature."""
        ids = []
        for feature in query_features[0]:
            texts = [self.processor.texts[index] for index in feature.nonzero()[:, 0].tolist()]
            said = ". ".join(text for text in texts if text in self.positive) or "The trachea is midline."
            ids.append(int(self.processor(text=[said])["input_ids"][0]))
        return torch.tensor(ids)[None, :, None]


def oracle_metrics(data, image_processor, **options):
    processor = OracleProcessor(image_processor)
    records = [record for split in ("validation", "test") for record in data[split]]
    return evaluate_model(
        Oracle(processor, records, **options), processor, data, batch_size=5, progress=False, baselines=False
    )


def test_oracle_is_perfect_on_every_task(data, image_processor):
    metrics = oracle_metrics(data, image_processor)
    for key in HEADLINES:
        assert metrics[key] == pytest.approx(1.0, abs=1e-5), key
    details = metrics["details"]
    assert details["images"] == 24
    assert details["finding_detection"]["map"] == pytest.approx(1.0)
    assert details["sentence_grounding"]["map"] == pytest.approx(1.0)
    assert details["finding_detection"]["settings"]["scales"] == (1.0,) * 8
    assert details["anatomy_localization"]["count"] == sum(sum(row["anatomy_present"]) for row in data["test"])
    assert details["region_description"]["f1_against_stored_labels"] == pytest.approx(1.0)


def test_shifted_boxes_lose_the_localisation_tasks_only(data, image_processor):
    metrics = oracle_metrics(data, image_processor, shift=0.06)
    assert 0.2 < metrics["anatomy_miou"] < 0.8
    assert metrics["detection_map50"] < 0.9
    assert metrics["grounding_miou"] < 0.9
    assert metrics["region_auroc"] == pytest.approx(1.0)
    assert metrics["description_f1"] == pytest.approx(1.0)


def test_low_scores_ground_nothing_but_still_localise(data, image_processor):
    metrics = oracle_metrics(data, image_processor, blind=True)
    assert metrics["grounding_miou"] == 0.0
    assert metrics["anatomy_miou"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["details"]["anatomy_localization"]["miou_if_reported"] == 0.0


# -- frames and targets -----------------------------------------------------------------------------------------------


def test_frame_boxes_crop_scale_and_drop():
    # An image of 200 x 100 pixels seen through the centre crop x 50 to 150.
    boxes = [[60, 10, 100, 60], [0, 0, 70, 100], [0, 0, 54, 100], [0, 0, 40, 40]]
    scaled, visible = frame_boxes(boxes, (50, 0, 150, 100))
    assert scaled[0] == pytest.approx([0.1, 0.1, 0.5, 0.6])
    assert scaled[1] == pytest.approx([0.0, 0.0, 0.2, 1.0])
    assert visible.tolist() == [True, True, False, False]


def test_targets_follow_the_geometry():
    (record,) = datasets.Dataset.from_list([phantom_record(3, 1, (96, 128))], features=phantom_features())
    record["objects"] = [
        {"bbox": [20.0, 10.0, 40.0, 30.0], "category": 4, "phrase": "One."},
        {"bbox": [0.0, 10.0, 12.0, 30.0], "category": 5, "phrase": "Cut off."},
        {"bbox": [60.0, 50.0, 64.0, 58.0], "category": 4, "phrase": "One."},
    ]
    sizes = {"height": SIZE, "width": SIZE}
    crop = ChexImageProcessor(size=sizes, geometry="center_crop").frame(96, 128)
    cropped = read_targets(record, crop)
    assert cropped.object_labels.tolist() == [4, 4]
    assert cropped.object_phrases == ["One.", "One."]
    assert cropped.object_boxes[0] == pytest.approx(np.array([4, 10, 24, 30]) / 96)
    assert list(cropped.grounded_phrases()) == ["One."]
    assert len(cropped.grounded_phrases()["One."]) == 2
    boxed = read_targets(record, ChexImageProcessor(size=sizes, geometry="letterbox").frame(96, 128))
    assert boxed.object_labels.tolist() == [4, 5, 4]
    assert boxed.object_boxes[0] == pytest.approx(np.array([20, 26, 40, 46]) / 128)


def test_class_set_is_found_by_its_names():
    assert find_class_set(PHANTOM_CLASSES) == "phantom"
    assert find_class_set(CHEXPERT_CLASSES) == "chexpert"
    with pytest.raises(ValueError, match="No prompt set has the finding classes"):
        find_class_set(["Flat feet"])


# -- post-processing --------------------------------------------------------------------------------------------------


def test_scaling_keeps_the_centre_and_clips():
    boxes = np.array([[0.2, 0.2, 0.4, 0.6], [0.0, 0.0, 0.4, 0.4]])
    scaled = scale_boxes(boxes, np.array([[2.0], [1.5]]))
    assert scaled[0] == pytest.approx([0.1, 0.0, 0.5, 0.8])
    assert scaled[1] == pytest.approx([0.0, 0.0, 0.5, 0.5])


def test_nms_keeps_the_best_of_each_cluster():
    # Box 1 overlaps 0 (IoU 0.6) and falls; box 2 only overlaps the fallen box, so it stays.
    boxes = np.array([[[0, 0, 8, 1], [2, 0, 10, 1], [7.5, 0, 15.5, 1]]]) / 16
    assert keep_after_nms(boxes, np.array([[0.9, 0.8, 0.7]]), 0.15).tolist() == [[True, False, True]]
    assert keep_after_nms(boxes, np.array([[0.1, 0.8, 0.7]]), 0.15).tolist() == [[False, True, False]]
    assert keep_after_nms(boxes, np.array([[0.9, 0.8, 0.7]]), 0.7).all()


def one_candidate_set(margins=((1.0, -1.0),)):
    boxes = np.array([[[[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.7, 0.9]]]])
    return Candidates(boxes=boxes, weights=np.array([[[0.4, 0.8]]]), margins=np.array([margins]))


def test_envelope_and_top1():
    (fused,) = post_process(one_candidate_set(), DetectionSettings(score="weights", merge="envelope"))
    assert fused["boxes"].tolist() == [[0.1, 0.1, 0.7, 0.9]]
    assert fused["scores"].tolist() == [0.8]
    (best,) = post_process(one_candidate_set(), DetectionSettings(score="prompts", temperature=1.0, merge="top1"))
    assert best["boxes"].tolist() == [[0.1, 0.1, 0.3, 0.3]]
    assert best["scores"] == pytest.approx([1 / (1 + np.exp(-1))])
    (both,) = post_process(one_candidate_set(), DetectionSettings(score="product", temperature=0.5))
    assert sorted(both["scores"]) == pytest.approx(sorted([0.4 / (1 + np.exp(-2)), 0.8 / (1 + np.exp(2))]))


def test_tuning_finds_score_and_scale_and_leaves_hopeless_classes_alone():
    rng = np.random.default_rng(0)
    images, classes, regions = 30, 3, 2
    targets = rng.uniform(0.1, 0.5, (images, 2))
    boxes = np.zeros((images, classes, regions, 4))
    boxes[..., :2] = targets[:, None, None]
    boxes[..., 2:] = targets[:, None, None] + 0.4
    boxes[:, :, 1] = [0.0, 0.0, 0.05, 0.05]
    # Class 0 boxes have half the side they should; region scores are noise, margins tell which region is right.
    boxes[:, 0, 0] += [0.1, 0.1, -0.1, -0.1]
    margins = np.stack([np.full((images, classes), 0.5), np.full((images, classes), -0.5)], axis=-1)
    candidates = Candidates(boxes, rng.random((images, classes, regions)) * 1e-3, margins)
    references = [
        {"boxes": np.array([[*corner, *(corner + 0.4)]] * 2), "labels": np.array([0, 1])} for corner in targets
    ]
    settings, log = tune_detection(candidates, references, classes)
    assert settings.score in ("prompts", "product")
    assert settings.scales[0] > 1.2
    assert settings.scales[1:] == (1.0, 1.0)
    assert log["scales"] >= log["merge"] >= log["score"]
    tuned = detection_map(post_process(candidates, settings), references, classes)["map50"]
    assert tuned == pytest.approx(log["scales"])
    assert tuned > detection_map(post_process(candidates, DetectionSettings()), references, classes)["map50"]


def test_deduplication_rules():
    def similar(size, pairs):
        matrix = np.full((size, size), 0.5)
        for (i, j), value in pairs.items():
            matrix[i, j] = matrix[j, i] = value
        return matrix

    # From 0.95 on the less preferred of a pair goes, whatever the length; on a tie the later one.
    assert deduplicate(similar(3, {(0, 2): 0.95}), [0.1, 0.5, 0.9]) == [1, 2]
    assert deduplicate(similar(3, {(0, 2): 0.95}), [0.5, 0.5, 0.5]) == [0, 1]
    assert deduplicate(similar(3, {(0, 2): 0.94}), [0.1, 0.5, 0.9]) == [0, 1, 2]
    # From 0.90 on only while there are more than 10 sentences.
    pairs = {(0, 1): 0.92, (2, 3): 0.91, (4, 5): 0.89}
    assert deduplicate(similar(12, pairs), list(range(12))) == [1, *range(3, 12)]
    assert deduplicate(similar(11, pairs), list(range(11))) == list(range(1, 11))
    # Unlike sentences stay, however many.
    assert len(deduplicate(similar(14, {}), [0.0] * 14)) == 14
    assert deduplicate(np.zeros((0, 0)), []) == []


# -- baselines --------------------------------------------------------------------------------------------------------


def test_prior_boxes_of_the_same_split(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    prior = fit_prior_boxes(train, 8)
    assert prior.anatomy.shape == (29, 4)
    scores = score_prior_boxes(prior, train, test)
    assert 0.4 < scores["anatomy_miou"] < 0.9
    assert 0.0 <= scores["detection_map50"] < 0.5
    assert 0.1 < scores["grounding_miou"] < 0.9
    # A set of identical images is described perfectly by its own average.
    twins = [test[0]] * 6
    own = score_prior_boxes(fit_prior_boxes(twins, 8), twins, twins)
    assert own["anatomy_miou"] == pytest.approx(1.0)
    assert own["grounding_miou"] == pytest.approx(1.0)


def test_constant_scores_have_auroc_one_half(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    assert constant_auroc(train, test) == pytest.approx(0.5)


def test_constant_texts(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    scores = score_constant_texts(train, test, label_text, PHANTOM_CLASSES)
    options = scores["details"]["report"]["all"]
    assert scores["report_f1"] == options[scores["details"]["report"]["kind"]]
    assert options["most frequent report"] < scores["report_f1"] == max(options.values())
    assert 0.1 < scores["report_f1"] < 0.7
    assert 0.0 < scores["description_f1"] < 0.6


def test_linear_probe_finds_what_is_linear_and_nothing_else(data, image_processor):
    train, test = (list(iterate_targets(data[name], image_processor)) for name in ("train", "test"))
    rng = np.random.default_rng(0)

    def flat(targets):
        return np.stack([(t.anatomy_labels > 0).reshape(-1) for t in targets]).astype(np.float32)

    informed, _ = linear_probe_auroc((flat(train), flat(test)), train, test)
    noise, _ = linear_probe_auroc((rng.random((len(train), 9)), rng.random((len(test), 9))), train, test)
    assert informed > 0.8
    assert 0.3 < noise < 0.7


# -- a tiny model, end to end -----------------------------------------------------------------------------------------


def tiny_model(data, image_processor, generator=True):
    texts = [text for row in data["train"].remove_columns("image") for text in row["sentences"]]
    tokenizer, generator_tokenizer = build_tokenizers(texts, 600, 400)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    encoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    part = {"num_attention_heads": 2, "intermediate_size": 64, "num_layers": 1}
    end = generator_tokenizer.eos_token_id
    config = ChexConfig(
        vision_config=encoder | {"image_size": SIZE, "patch_size": 16},
        text_config=encoder | ids | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        detector_config=part,
        post_decoder_config=part if generator else None,
        generator_config={
            **{"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48, "prefix_hidden_size": 32},
            **{"vocab_size": len(generator_tokenizer), "bos_token_id": end, "eos_token_id": end},
        }
        if generator
        else None,
        projection_dim=32,
    )
    torch.manual_seed(0)
    return ChexModel(config), ChexProcessor(image_processor, tokenizer, generator_tokenizer if generator else None)


@pytest.fixture(scope="module")
def tiny(data, image_processor):
    return tiny_model(data, image_processor)


def test_random_model_runs_through_and_repeats(data, tiny):
    model, processor = tiny
    model.train()
    first, second = (evaluate_model(model, processor, data, batch_size=size, progress=False) for size in (7, 24))
    assert model.training
    for metrics in (first, second):
        json.dumps(metrics, allow_nan=False)
        for key in HEADLINES:
            assert 0.0 <= metrics[key] <= 1.0
            assert 0.0 <= metrics["baselines"][key] <= 1.0
    # Images are independent of each other, so the batch size does not matter.
    assert [first[key] for key in HEADLINES] == pytest.approx([second[key] for key in HEADLINES], abs=1e-3)
    assert first["baselines"] == second["baselines"]
    assert first["details"]["finding_detection"]["tuning"]["validation_images"] == 8
    assert first["details"]["seconds"]["total"] > 0
    assert "baseline" in format_table(first).splitlines()[0]


def test_limit_tasks_and_draw_of_normal_regions(data, tiny):
    model, processor = tiny
    options = {"limit": 6, "tasks": ["region_description"], "baselines": False, "progress": False}
    everything = evaluate_model(model, processor, data, **options)
    drawn = [evaluate_model(model, processor, data, max_normal=1.0, seed=4, **options) for _ in range(2)]
    assert everything["anatomy_miou"] is None
    assert "baselines" not in everything
    counts = [m["details"]["region_description"]["count"] for m in (everything, drawn[0])]
    abnormal = everything["details"]["region_description"]["abnormal_regions"]
    assert counts[0] > counts[1] >= abnormal
    assert drawn[0]["details"]["region_description"] == drawn[1]["details"]["region_description"]


def test_model_without_generator_skips_the_text_tasks_visibly(data, image_processor):
    model, processor = tiny_model(data, image_processor, generator=False)
    metrics = evaluate_model(model, processor, data, limit=5, progress=False)
    assert metrics["description_f1"] is None
    assert metrics["report_f1"] is None
    assert metrics["region_auroc"] is not None
    assert set(metrics["details"]["skipped"]) == {"region_description", "report_generation"}
    assert "no sentence generator" in metrics["details"]["skipped"]["report_generation"]
    explanations, detections = explain_examples(model, processor, data["test"], [0], label_text)
    assert explanations == []
    assert len(detections) == 1


def test_wrong_arguments_are_explained(data, tiny):
    model, processor = tiny
    with pytest.raises(ValueError, match="no split 'holdout'.*train, validation, test"):
        evaluate_model(model, processor, data, split="holdout")
    with pytest.raises(ValueError, match="Unknown task flying.*anatomy_localization"):
        evaluate_model(model, processor, data, tasks=["flying"])
    with pytest.raises(ValueError, match="`limit` is 0"):
        evaluate_model(model, processor, data, limit=0)


def test_command_line(data, tiny, tmp_path, capsys):
    model, processor = tiny
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data.save_to_disk(tmp_path / "data")
    output = tmp_path / "results" / "metrics.json"
    arguments = ["--model", str(tmp_path / "model"), "--data-dir", str(tmp_path / "data"), "--limit", "4"]
    assert main([*arguments, "--output", str(output)]) == 0
    metrics = json.loads(output.read_text(encoding="utf-8"))
    assert set(metrics) == {*HEADLINES, "baselines", "details"}
    assert metrics["details"]["images"] == 4
    assert "anatomy localisation" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["metrics.json"]

    assert main(["--model", str(tmp_path / "none"), *arguments[2:], "--output", str(output)]) == 2
    assert "`--model`" in capsys.readouterr().err
    assert main([*arguments[:2], "--data-dir", str(tmp_path / "model"), "--output", str(output)]) == 2
    assert "holds no data set" in capsys.readouterr().err
    assert main([*arguments, "--split", "holdout", "--output", str(output)]) == 2
    assert "holdout" in capsys.readouterr().err


def test_builder_cache_is_opened(tmp_path):
    from training.data.phantom import PhantomChestXray

    counts = {"num_train": 3, "num_validation": 0, "num_test": 2}
    builder = PhantomChestXray(cache_dir=str(tmp_path / "cache"), image_size=SIZE, **counts)
    builder.download_and_prepare()
    opened = load_data(tmp_path / "cache")
    assert {name: len(split) for name, split in opened.items()} == {"train": 3, "test": 2}
    assert opened["test"][1]["sample_id"] == builder.as_dataset(split="test")[1]["sample_id"]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": 1}


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_examples_of_the_oracle_have_no_failures(data, image_processor):
    processor = OracleProcessor(image_processor)
    model = Oracle(processor, list(data["test"]))
    indices = choose_examples(data["test"], 3, seed=1)
    assert indices == choose_examples(data["test"], 3, seed=1)
    explanations, detections = explain_examples(model, processor, data["test"], indices, label_text)
    for index, explained, detected in zip(indices, explanations, detections, strict=True):
        record = data["test"][index]
        assert len({item["category"] for item in record["objects"]}) >= 2
        assert all(found["correct"] for found in detected["predictions"])
        assert all(target["found"] for target in detected["targets"])
        assert len(detected["targets"]) == len(record["objects"])
        for target, item in zip(explained["targets"], record["objects"], strict=True):
            assert target["box"] == pytest.approx(item["bbox"], abs=0.02)
            sentence = explained["sentences"][target["sentence"]]
            assert PHANTOM_CLASSES[item["category"]] in sentence["text"]
            assert sentence["abnormal"]
        for line in explained["reference"]:
            states = 1 in label_text(line["text"]).values()
            assert (line["sentence"] is not None) == states
