"""Doubles for tests of the evaluation: phantom splits, an oracle that knows the answers, a tiny random model."""

from types import SimpleNamespace

import datasets
import torch

from evaluation.tasks.base import centre_boxes, corners
from modeling_chex import ChexConfig, ChexModel, ChexOutput
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.prompt_sets import anatomy_prompts, class_prompts
from processing_chex.vocabulary import ANATOMY_NAMES, PHANTOM_CLASSES
from training.build_tokenizers import build_tokenizers
from training.data.phantom import phantom_features, phantom_record


SIZE = 64


def phantom_splits(train=40, validation=8, test=24, seed=3):
    """Phantom splits, small but real."""
    counts = {"train": (0, train), "validation": (1000, validation), "test": (2000, test)}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(
                [phantom_record(seed, start + index, SIZE) for index in range(count)], features=phantom_features()
            )
            for name, (start, count) in counts.items()
            if count
        }
    )


def small_image_processor():
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
        if boxes.shape[1] != len(ANATOMY_NAMES):
            return self._encode_objects(image_features, boxes, box_mask, features)
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

    def _encode_objects(self, image_features, boxes, box_mask, features):
        for image, record in enumerate(image_features):
            exact = torch.tensor([item["bbox"] for item in record["objects"]]).reshape(-1, 4) / SIZE
            for query in box_mask[image].nonzero()[:, 0].tolist():
                distance = (exact - torch.tensor(corners(boxes[image, query]), dtype=torch.float32)).abs().amax(-1)
                assert distance.min() < 1e-4
                found = record["objects"][int(distance.argmin())]
                features[image, query] = self._feature({PHANTOM_CLASSES[found["category"]]})
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
