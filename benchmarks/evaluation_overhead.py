"""
What the evaluation costs beside the model: its time against a bare loop of the same model calls, and its memory at two
numbers of images.

    python benchmarks/evaluation_overhead.py --images 128
    python benchmarks/evaluation_overhead.py --images 800 --model runs/demo/model --data runs/demo/phantom

The bare loop reads the images, encodes them, and asks the model everything that the nine tasks (as twins on the
phantom) and anatomy localisation ask, keeping nothing. The evaluation does the same, writes predictions, scores them
with a bootstrap of 250 resamples, and writes results. Memory is the highest resident size of a process that makes
predictions only, with the tiny model, which leaves little beside the images.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from transformers import set_seed

from evaluation.engine import Options, bind_tasks, evaluate
from evaluation.inference import DataSource, ModelSource, open_data
from evaluation.tasks.base import EvaluationContext, centre_boxes
from evaluation.tasks.catalog import find_tasks
from evaluation.tasks.records import iterate_targets
from modeling_chex import ChexConfig, ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.prompt_sets import class_prompts
from processing_chex.report import ReportQueries
from training.build_tokenizers import build_tokenizers
from training.data.phantom import phantom_datasets


BATCH = 64
SIZES = {"tiny": (64, 32, 1), "demo": (128, 128, 3)}


def build(data: datasets.DatasetDict, size: str) -> tuple[ChexModel, ChexProcessor]:
    """A model with random weights: `demo` has the sizes of the demo's."""
    side, width, layers = SIZES[size]
    rows = data["validation"].select_columns(["sentences"])
    tokenizer, generator_tokenizer = build_tokenizers([text for row in rows for text in row["sentences"]], 800, 560)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = generator_tokenizer.eos_token_id
    encoder = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    set_seed(0)
    model = ChexModel(
        ChexConfig(
            vision_config=encoder | {"image_size": side, "patch_size": 16, "num_hidden_layers": layers + 1},
            text_config=encoder | ids | {"vocab_size": len(tokenizer), "num_hidden_layers": 2},
            detector_config={"num_attention_heads": 4, "intermediate_size": 2 * width, "num_layers": layers},
            post_decoder_config={"num_attention_heads": 4, "intermediate_size": 2 * width, "num_layers": 1},
            generator_config={
                **{"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 128, "prefix_hidden_size": width},
                **{"vocab_size": len(generator_tokenizer), "bos_token_id": end, "eos_token_id": end},
            },
            projection_dim=width,
        )
    )
    processor = ChexProcessor(ChexImageProcessor(size={"height": side, "width": side}), tokenizer, generator_tokenizer)
    return model.eval(), processor


@torch.inference_mode()
def bare_loop(model: ChexModel, processor: ChexProcessor, dataset: datasets.Dataset) -> int:
    """Everything that the tasks ask; returns the number of sentences."""
    context = EvaluationContext(model, processor)
    prompts = class_prompts("phantom")
    classes, positive, negative = (context.class_features(prompts, kind) for kind in ("box", "positive", "negative"))
    regions = context.anatomy_features()
    report = ReportQueries.encode(prompts, context.text_features)
    generation = {"max_length": 33, "do_sample": False, "num_beams": 1}
    targets = list(iterate_targets(dataset, processor.image_processor))
    sentences = 0

    def describe(features: torch.Tensor) -> None:
        nonlocal sentences
        for chunk in features.split(context.generation_batch):
            if len(chunk):
                ids = model.generate(query_features=chunk[None], **generation)
                sentences += len(processor.decode_sentences(ids)[0])

    for start in range(0, len(dataset), BATCH):
        rows = dataset[start : start + BATCH]
        of_batch = targets[start : start + BATCH]
        images = model.get_image_features(processor(images=rows["image"], return_tensors="pt")["pixel_values"])
        model(image_features=images, prompt_features=regions, use_post_decoder=False)
        output = model(image_features=images, prompt_features=classes, use_post_decoder=False, clip_boxes=True)
        model.classify(output.region_features, positive[:, None, None], negative[:, None, None])
        phrases = [list(target.grounded_phrases()) for target in of_batch]
        width = max(map(len, phrases))
        if width:
            mask = torch.tensor([[q < len(of_image) for q in range(width)] for of_image in phrases])
            queries = torch.zeros(*mask.shape, classes.shape[-1])
            queries[mask] = context.text_features([phrase for of_image in phrases for phrase in of_image])
            model(image_features=images, prompt_features=queries, query_mask=mask, use_post_decoder=False)
        found = [centre_boxes(target.object_boxes, model.device) for target in of_batch]
        if any(map(len, found)):
            features = model.encode_boxes(images, found)
            counts = torch.tensor([len(of_image) for of_image in found])
            of_boxes = features[torch.arange(features.shape[1])[None] < counts[:, None]]
            model.classify(of_boxes, positive, negative)
            describe(of_boxes)
        present = torch.stack([torch.from_numpy(target.anatomy_present) for target in of_batch])
        boxes = torch.stack([centre_boxes(target.anatomy_boxes, model.device) for target in of_batch])
        features = model.encode_boxes(images, boxes, box_mask=present)
        model.classify(features, positive, negative)
        describe(features[present])
        output = model(image_features=images, prompt_features=report.features, clip_boxes=True)
        probability = model.classify(output.query_features, report.positive, report.negative).squeeze(-1)
        describe(output.query_features[report.select(probability, output.present, False)])
    return sentences


def run_engine(
    model: ChexModel, processor: ChexProcessor, data: datasets.DatasetDict, folder: Path, score: bool, limit: int
) -> float:
    tasks = bind_tasks(find_tasks(["anatomy_localization", "all"]), ["phantom"], twins=True)
    start = time.perf_counter()
    evaluate(
        ModelSource(model=model, processor=processor),
        {"phantom": DataSource("phantom", data)},
        tasks,
        folder,
        Options(limit=limit, progress=False, score=score, batch_size=BATCH),
    )
    return time.perf_counter() - start


def measure_memory(arguments: argparse.Namespace, cache: Path) -> None:
    """In a process of its own: the highest resident size after predictions."""
    for images in (arguments.images, 4 * arguments.images):
        command = [sys.executable, __file__, "--memory-of", str(images), "--data", str(cache), "--images", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
        print(f"memory: {images:>6} images, predictions of all tasks: {peak:.0f} MiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", help="folder; left out: random weights of the demo's size")
    parser.add_argument("--data", help="cache folder of the phantom; left out: drawn")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if arguments.data:
            data = open_data(arguments.data)
        else:
            side = SIZES["demo"][0]
            counts = {"num_train": 0, "num_validation": 64, "num_test": 4 * arguments.images}
            data = phantom_datasets(folder / "phantom", image_size=side, **counts)
        if arguments.memory_of:
            model, processor = build(data, "tiny")
            run_engine(model, processor, data, folder / "memory", False, arguments.memory_of)
            print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
            return
        if arguments.model:
            model = ChexModel.from_pretrained(arguments.model).eval()
            processor = ChexProcessor.from_pretrained(arguments.model)
        else:
            model, processor = build(data, "demo")
        test = data["test"].select(range(min(arguments.images, len(data["test"]))))
        bare_loop(model, processor, test.select(range(min(BATCH, len(test)))))  # what is only slow once
        bare, engine = [], []
        for number in range(arguments.repeats):
            start = time.perf_counter()
            sentences = bare_loop(model, processor, test)
            bare.append(time.perf_counter() - start)
            engine.append(run_engine(model, processor, data, folder / f"run{number}", True, arguments.images))
        print(f"{len(test)} images, {sentences} sentences, {torch.get_num_threads()} threads")
        print(f"bare loop of model calls:           {min(bare):7.2f} s")
        print(f"evaluation, 250 resamples, written: {min(engine):7.2f} s  ({min(engine) / min(bare) - 1:+.1%})")
        if not arguments.model:
            measure_memory(arguments, folder / "phantom")


if __name__ == "__main__":
    main()
