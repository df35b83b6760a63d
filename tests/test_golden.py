"""Every forward output recorded from the official implementation, reproduced by `ChexModel` in legacy mode."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Tokenizer

from modeling_chex import ChexModel
from modeling_chex.conversion import config_from_official, convert_official_state_dict
from modeling_chex.prompt_detector import clip_boxes, soft_roi_pool, soft_roi_weights
from tests.conftest import GOLDEN_DIR


TOLERANCE = 1e-5
POOLED_TOLERANCE = 1e-4  # region and query features after pooling, and language-model logits

OUTPUT_NAMES = {  # ours -> recorded
    "query_features": "box_features",
    "boxes": "boxes",
    "query_scores": "boxes_weights",
    "present": "boxes_present",
    "query_mask": "box_mask",
    "region_features": "multiboxes_features",
    "region_boxes": "multiboxes",
    "region_scores": "multiboxes_weights",
    "region_present": "multiboxes_present",
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = TOLERANCE):
    if expected.dtype == torch.bool or not expected.is_floating_point():
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=atol, atol=atol)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def image_features(golden_model, golden):
    with torch.no_grad():
        return golden_model.get_image_features(golden["img/input"][:, None].expand(-1, 3, -1, -1))


def test_image_encoder(golden_model, golden, image_features):
    assert_close(image_features.patch_features, golden["img/patch_features"])
    assert_close(image_features.pooler_output, golden["img/global_features"])
    expected = golden["img/pos_embeddings"]
    assert_close(image_features.position_embeddings.expand_as(expected), expected)
    three_channels = golden_model.get_image_features(golden["img/input_3ch"])
    assert_close(three_channels.patch_features, golden["img/patch_features_3ch"])


def test_prompt_encoder(golden_model, golden):
    assert_close(golden_model.get_prompt_features(golden["txt/token_ids"]), golden["txt/features"])
    assert_close(golden_model.get_prompt_features(golden["txt/long_token_ids"]), golden["txt/long_features"])


def test_prompt_encoder_ignores_what_follows_the_end_token(golden_model, golden):
    ids = golden["txt/token_ids"]
    end = golden_model.config.text_config.eos_token_id
    longest = int((ids == end).int().argmax(-1).max()) + 1
    trimmed = ids[:, :longest].clone()
    trimmed[trimmed == 0] = end  # the padding of Hugging Face's CLIP tokenizer
    assert_close(golden_model.get_prompt_features(trimmed), golden["txt/features"])


@pytest.mark.parametrize(
    ("name", "tokens", "mask", "skip", "post"),
    [(f"skip{skip}_post{post}", None, None, skip, post) for skip in (0, 1) for post in (0, 1)]
    + [(f"masked_skip{skip}_post{post}", "masked", "masked", skip, post) for skip in (0, 1) for post in (0, 1)]
    + [("allmask_skip1_post1", "masked", "all", 1, 1), ("nomask3d_skip1_post1", "masked", None, 1, 1)],
)
def test_detection(golden_model, golden, image_features, name, tokens, mask, skip, post):
    prompts = golden["txt/features"] if tokens is None else golden["det/masked/query_tokens"]
    query_mask = {None: None, "masked": golden["det/masked/query_mask"], "all": torch.ones(2, 5, dtype=torch.bool)}
    output = golden_model(
        image_features=image_features,
        prompt_features=prompts,
        query_mask=query_mask[mask],
        roi_skip=bool(skip),
        use_post_decoder=bool(post),
    )
    for ours, recorded in OUTPUT_NAMES.items():
        tolerance = POOLED_TOLERANCE if ours.endswith("features") else TOLERANCE
        assert_close(output[ours], golden[f"det/{name}/{recorded}"], tolerance)


def test_detection_from_pixels_and_token_ids_equals_precomputed_features(golden_model, golden, image_features):
    pixel_values = golden["img/input"][:, None].expand(-1, 3, -1, -1)
    output = golden_model(pixel_values=pixel_values, input_ids=golden["txt/token_ids"])
    for ours, recorded in OUTPUT_NAMES.items():
        assert_close(output[ours], golden[f"det/skip1_post1/{recorded}"], POOLED_TOLERANCE)


def test_decoder_tokens_and_projected_patches(golden_model, golden, image_features):
    detector = golden_model.detector
    arguments = (image_features.patch_features, image_features.position_embeddings)
    prompts = golden["txt/features"][None].expand(2, -1, -1)
    assert_close(detector.decode(*arguments, prompts), golden["det/query_features"])
    masked = detector.decode(*arguments, golden["det/masked/query_tokens"], golden["det/masked/query_mask"])
    assert_close(masked, golden["det/masked/query_features"])
    assert_close(detector.patch_projection(arguments[0]), golden["det/projected_patches"])


def test_clipped_boxes_one_dimensional_mask_and_random_skip(golden_model, golden, image_features):
    arguments = {
        "image_features": image_features,
        "prompt_features": golden["txt/features"],
        "use_post_decoder": False,
    }
    clipped = golden_model(**arguments, clip_boxes=True)
    assert_close(clipped.boxes, golden["det/clip/boxes"])
    assert_close(clipped.region_boxes, golden["det/clip/multiboxes"])

    masked = golden_model(**arguments | {"use_post_decoder": True}, query_mask=golden["det/mask1d/query_mask"])
    assert_close(masked.query_features, golden["det/mask1d/box_features"], POOLED_TOLERANCE)
    assert_close(masked.region_boxes, golden["det/mask1d/multiboxes"])

    skip = golden["det/skipnone/uniform"] < golden_model.config.detector_config.roi_skip_probability
    random_skip = golden_model(**arguments, roi_skip=skip)
    assert_close(random_skip.query_features, golden["det/skipnone/box_features"], POOLED_TOLERANCE)
    assert_close(random_skip.region_features, golden["det/skipnone/multiboxes_features"], POOLED_TOLERANCE)


def test_post_decoder(golden_model, golden, image_features):
    queries, regions = golden["post/in_box_features"][:, :, None], golden["post/in_multiboxes_features"]
    tokens, mask = torch.cat([queries, regions], dim=2), golden["post/in_mask"]
    keep = golden["post/drop/uniform"] > 0.3
    for name, arguments in {
        "nomask": (tokens, None, None),
        "mask": (tokens, mask, None),
        "drop": (tokens, None, keep),
    }.items():
        features, query_mask, keep_mask = arguments
        output = golden_model._refine(features, image_features, query_mask, keep_mask)
        assert_close(output[:, :, 0], golden[f"post/{name}/box_features"])
        assert_close(output[:, :, 1:], golden[f"post/{name}/multiboxes_features"])
    single = golden_model._refine(queries, image_features, None)
    assert_close(single[:, :, 0], golden["post/single_nomask/box_features"])
    single = golden_model._refine(queries, image_features, mask)
    assert_close(single[:, :, 0], golden["post/single_mask/box_features"])


@pytest.mark.parametrize("post", [0, 1])
def test_encode_boxes(golden_model, golden, image_features, post):
    boxes, mask = golden["regions/boxes"], golden["regions/mask"]
    features = golden_model.encode_boxes(image_features, boxes, use_post_decoder=bool(post))
    assert_close(features, golden[f"regions/nomask_post{post}"], POOLED_TOLERANCE)
    features = golden_model.encode_boxes(image_features, boxes, mask, use_post_decoder=bool(post))
    assert_close(features, golden[f"regions/mask_post{post}"], POOLED_TOLERANCE)
    if post == 0:  # a list of four and two boxes, padded
        listed = torch.tensor([[True] * 4, [True, True, False, False]])
        features = golden_model.encode_boxes(image_features, boxes, listed, use_post_decoder=False)
        assert_close(features, golden["regions/list_post0"], POOLED_TOLERANCE)
        features = golden_model.encode_boxes(image_features, [boxes[0], boxes[1, :2]], use_post_decoder=False)
        assert_close(features, golden["regions/list_post0"], POOLED_TOLERANCE)


def test_box_queries_equal_encoded_boxes(golden_model, golden, image_features):
    boxes, mask = golden["regions/boxes"], golden["regions/mask"]
    output = golden_model(
        image_features=image_features, prompt_features=golden["txt/features"], query_boxes=boxes, box_mask=mask
    )
    assert output.boxes.shape == (2, 9, 4)
    assert_close(output.query_features[:, :5], golden["det/skip1_post1/box_features"], POOLED_TOLERANCE)
    assert_close(output.query_features[:, 5:], golden["regions/mask_post1"], POOLED_TOLERANCE)
    assert_close(output.boxes[:, 5:], boxes * mask[..., None])


@pytest.mark.parametrize("beta", [1.0, 2.0, 2.5, 4.0, 8.0])
def test_soft_roi_pooling(golden, beta):
    boxes = golden["roi/boxes"]
    rows, columns = soft_roi_weights(boxes, 5, 7, beta, legacy=True)
    assert_close(rows[..., :, None] * columns[..., None, :], golden[f"roi/beta{beta}/maps"])
    assert_close(soft_roi_pool(golden["roi/x"], boxes, beta, legacy=True), golden[f"roi/beta{beta}/features"])
    square = soft_roi_pool(golden["roi/x_square"], boxes, beta, legacy=True)
    assert_close(square, golden[f"roi/square_beta{beta}/features"])


def test_soft_roi_pooling_with_one_exponent_per_box(golden):
    beta = golden["roi/beta_tensor"]
    rows, columns = soft_roi_weights(golden["roi/boxes"], 5, 7, beta, legacy=True)
    assert_close(rows[..., :, None] * columns[..., None, :], golden["roi/beta_tensor_maps"])
    pooled = soft_roi_pool(golden["roi/x"], golden["roi/boxes"], beta, legacy=True)
    assert_close(pooled, golden["roi/beta_tensor_features"])


def test_soft_roi_maps_agree_in_both_modes_but_for_underflow(golden):
    boxes = golden["roi/boxes"]
    boxes = boxes[(boxes[..., 2:] > 0.1).all(-1)]
    assert len(boxes) >= 4
    for ours, official in zip(soft_roi_weights(boxes, 7, 7), soft_roi_weights(boxes, 7, 7, legacy=True), strict=True):
        torch.testing.assert_close(ours / ours.amax(-1, True), official / official.amax(-1, True), atol=1e-6, rtol=0)
    tiny = torch.tensor([[0.55, 0.5, 0.001, 0.001], [0.3, 0.3, 0.0, 0.0]])
    official_rows, official_columns = soft_roi_weights(tiny, 7, 7, legacy=True)
    assert (official_rows[0, :, None] * official_columns[0]).sum() == 0
    rows, columns = soft_roi_weights(tiny, 7, 7)
    assert torch.isfinite(rows).all()
    assert (rows[:, :, None] * columns[:, None]).amax((1, 2)).tolist() == [1.0, 1.0]
    on_a_centre = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    for legacy in (False, True):
        rows, columns = soft_roi_weights(on_a_centre, 7, 7, legacy=legacy)
        assert torch.equal(rows[0, :, None] * columns[0], torch.eye(7)[3, :, None] * torch.eye(7)[3])


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.5, 0.5, 1.0, 1.0), 41.8251),
        ((0.5, 0.5, 0.3, 0.3), 13.4067),
        ((0.5, 0.5, 0.001, 0.001), 1.0),
        ((0.55, 0.5, 0.001, 0.001), 0.0),
    ],
)
def test_sum_of_the_official_roi_map(box, expected):
    rows, columns = soft_roi_weights(torch.tensor([box]), 7, 7, legacy=True)
    assert float(rows.sum() * columns.sum()) == pytest.approx(expected, abs=1e-4)


def test_clip_boxes(golden):
    assert_close(clip_boxes(golden["roi/boxes"]), golden["boxes/clip_out"])


@pytest.mark.parametrize("name", ["prefix_kv", "prefix_kv_3d"])
def test_prefix(golden_model, golden, name):
    features = golden["dec/prefix_in" if name == "prefix_kv" else "dec/prefix_in_3d"]
    features = features[:, None] if features.ndim == 2 else features
    assert_close(golden_model.sentence_generator.prefix_projection(features), golden[f"dec/{name}"])


@pytest.fixture(params=["None", "one", "prefix"])
def offset(request, golden_model):
    config = golden_model.sentence_generator.config
    config.position_offset = {"None": 0, "one": 1, "prefix": config.prefix_length}[request.param]
    yield request.param
    config.position_offset = 0


def test_teacher_forcing(golden_model, golden, offset):
    ids, mask = golden["dec/target_ids"], golden["dec/target_attention_mask"]
    generator = golden_model.sentence_generator
    labels = generator.target_labels(ids, mask, ignore_padding=False)
    output = generator(input_ids=ids, attention_mask=mask, features=golden["dec/prefix_in"], labels=labels)
    assert_close(output.logits, golden[f"dec/offset_{offset}/logits"], POOLED_TOLERANCE)
    assert_close(output.loss, golden[f"dec/offset_{offset}/loss"])


def test_teacher_forcing_of_a_subset_and_of_several_features(golden_model, golden):
    ids, mask = golden["dec/target_ids"], golden["dec/target_attention_mask"]
    generator, selected = golden_model.sentence_generator, golden["dec/target_mask"]
    labels = ids  # padding counts, as in the official code, up to the longest of all candidates
    output = generator(
        input_ids=ids[selected],
        attention_mask=mask[selected],
        features=golden["dec/prefix_in"][selected],
        labels=labels[selected],
    )
    assert_close(output.loss, golden["dec/masked_loss"])
    length = int(mask[:2].sum(-1).max())
    output = generator(
        input_ids=ids[:2, :length],
        attention_mask=mask[:2, :length],
        features=golden["dec/prefix_in_3d"],
        labels=labels[:2, :length],
    )
    assert_close(output.loss, golden["dec/loss_3d"])


def test_greedy_generation(golden_model, golden, offset):
    name = {"None": "greedy20", "one": "greedy20_offset_one", "prefix": "greedy20_offset_prefix"}[offset]
    generator = golden_model.sentence_generator
    output = generator.generate(
        golden["dec/prefix_in"], max_length=20, return_dict_in_generate=True, output_logits=True
    )
    assert_close(output.sequences, golden[f"dec/{name}/ids"])
    if offset == "None":
        assert_close(torch.stack(output.logits, dim=1), golden["dec/greedy20/scores"], POOLED_TOLERANCE)


def test_greedy_generation_from_several_features_and_without_cache(golden_model, golden):
    generator = golden_model.sentence_generator
    assert_close(generator.generate(golden["dec/prefix_in_3d"], max_length=12), golden["dec/greedy12_3d/ids"])
    uncached = generator.generate(golden["dec/prefix_in"], max_length=20, use_cache=False)
    assert_close(uncached, golden["dec/greedy20/ids"])


def test_beam_search(golden_model, golden):
    sequences = golden_model.sentence_generator.generate(golden["dec/prefix_in"], max_length=14, num_beams=3)
    assert_close(sequences, golden["dec/beam3/ids"])


def test_generation_for_queries(golden_model, golden, image_features):
    output = golden_model(image_features=image_features, prompt_features=golden["txt/features"])
    sequences = golden_model.generate(
        query_features=output.query_features,
        query_mask=torch.tensor([[True] * 5, [True, False, True, False, False]]),
        max_length=20,
    )
    assert sequences.shape == (2, 5, 20)
    assert_close(sequences[0], golden["dec/greedy20_box/ids"])
    assert (sequences[1, 1] == golden_model.config.generator_config.pad_token_id).all()
    from_prompts = golden_model.generate(
        image_features=image_features, prompt_features=golden["txt/features"], max_length=20
    )
    assert_close(from_prompts[0], golden["dec/greedy20_box/ids"])


def test_classification(golden_model, golden):
    features, positive, negative = golden["cls/features"], golden["cls/pos"], golden["cls/neg"]
    for name, options in {
        "default": {},
        "temp05": {"temperature": 0.5},
        "softmax01": {"temperature": 0.1},
        "unnorm_softmax": {"normalize": False},
    }.items():
        # the recording classifies feature c against class c only
        probabilities = golden_model.classify(features, positive[0], negative[0], **options)
        assert_close(probabilities.diagonal(dim1=-2, dim2=-1), golden[f"cls/{name}/probs"])
    assert torch.equal(probabilities.diagonal(dim1=-2, dim2=-1) > 0.5, golden["cls/unnorm_softmax/preds"])


def test_unknown_and_missing_official_keys(golden, golden_info):
    official = {key.removeprefix("state_dict/"): v for key, v in golden.items() if key.startswith("state_dict/")}
    with pytest.raises(ValueError, match=r"2 keys.*detector\.surprise, txt_decoder\.other"):
        convert_official_state_dict(
            official | {"detector.surprise": torch.ones(1), "txt_decoder.other": torch.ones(1)}
        )
    removed = official.pop("detector.bbox_predictor.1.layers.3.bias")
    model = ChexModel(config_from_official(golden_info["config"], official, generator_heads=2))
    with pytest.raises(RuntimeError, match=r"detector\.box_head\.fc2\.bias"):
        model.load_state_dict(convert_official_state_dict(official), strict=True)
    assert removed.shape == (4,)


def test_reference_checkpoint():
    """A checkpoint that the official training code wrote, with recorded outputs."""
    folder = GOLDEN_DIR / "reference_checkpoint"
    expected = load_file(folder / "expected_outputs.safetensors")
    info = json.loads((folder / "expected_outputs.json").read_text(encoding="utf-8"))
    (checkpoint_path,) = folder.glob("chex_stage3/run_*/checkpoints/checkpoint_*.pth")
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    config = config_from_official(
        checkpoint["config_dict"], checkpoint["state_dict"], generator_heads=info["sizes"]["lm_head"]
    )
    model = ChexModel(config).eval()
    model.load_state_dict(convert_official_state_dict(checkpoint["state_dict"]), strict=True)

    assert_close(model.get_prompt_features(expected["token_ids"]), expected["text_features"])
    output = model(pixel_values=expected["image"][:, None].expand(-1, 3, -1, -1), input_ids=expected["token_ids"])
    for ours, recorded in OUTPUT_NAMES.items():
        if recorded in expected:
            tolerance = POOLED_TOLERANCE if ours.endswith("features") else TOLERANCE
            assert_close(output[ours], expected[recorded], tolerance)

    vocabulary = folder / "gpt_tokenizer"
    tokenizer = GPT2Tokenizer(vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"))
    special = config.generator_config.eos_token_id
    ids = torch.tensor([[special, *tokenizer(info["decoder_sentence"])["input_ids"], special]])
    ids = ids.expand(3, -1)
    loss = model.sentence_generator(input_ids=ids, features=output.query_features[0], labels=ids).loss
    assert_close(loss[None], expected["train_loss"])
