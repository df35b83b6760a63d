"""
What the evaluation costs beside the model: its processor time against a bare loop of the same model calls, and the
memory of its predictions at two numbers of images.

    python benchmarks/evaluation_overhead.py --images 200
    python benchmarks/evaluation_overhead.py --images 200 --model runs/demo/model --data runs/demo/phantom

The bare loop reads the images, encodes them, and asks the model everything that the nine tasks (as twins on the
phantom) and anatomy localisation ask, keeping nothing. The evaluation does the same, writes predictions, scores them
with a bootstrap of 250 resamples, and writes results with examples. METEOR, a program of its own, is left out. The
model has the sizes of `training/configs/phantom` with random weights unless one is given. Times are those of all
threads of the process (user and system), so that other programs on the machine matter little. Memory is the highest
resident size of a process of its own that makes the predictions.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import set_seed

from evaluation.engine import Options, bind_tasks, evaluate
from evaluation.inference import DataSource, ModelSource, open_data
from evaluation.tasks.base import Batch, EvaluationContext
from evaluation.tasks.catalog import PRESETS, find_tasks
from evaluation.tasks.records import iterate_targets
from modeling_chex import ChexConfig, ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.prompt_sets import class_prompts
from processing_chex.report import REPORT_PRESETS, ReportQueries
from training.build_tokenizers import build_tokenizers
from training.configuration import CONFIG_DIR, load_config
from training.data.phantom import phantom_datasets


BATCH = 64
RESAMPLES = 250
MEMORY_FACTOR = 4
METEOR = dict.fromkeys(("meteor", "meteor_normal", "meteor_abnormal"), "left out of the benchmark")


def build(data: datasets.DatasetDict) -> tuple[ChexModel, ChexProcessor]:
    """A model of the sizes of `training/configs/phantom`, with random weights."""
    parts = {name: load_config(CONFIG_DIR / "phantom" / f"{name}.yaml") for name in ("pretrain_clip", "stage2")}
    parts["generator"] = load_config(CONFIG_DIR / "phantom" / "pretrain_generator.yaml")
    sizes = {name: dict(config.model) for name, config in parts.items()}
    sizes["generator"].pop("max_generation_length")
    vocabularies = parts["pretrain_clip"].prompt_vocab_size, parts["pretrain_clip"].generator_vocab_size
    rows = data["validation"].select_columns(["sentences"])
    tokenizer, generator_tokenizer = build_tokenizers(
        [text for row in rows for text in row["sentences"]], *vocabularies
    )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = generator_tokenizer.eos_token_id
    shared = sizes["pretrain_clip"]
    set_seed(0)
    model = ChexModel(
        ChexConfig(
            **shared | {"text_config": {**shared["text_config"], **ids, "vocab_size": len(tokenizer)}},
            **sizes["stage2"],
            generator_config={
                **sizes["generator"],
                **{"vocab_size": len(generator_tokenizer), "bos_token_id": end, "eos_token_id": end},
            },
        )
    )
    side = shared["vision_config"]["image_size"]
    processor = ChexProcessor(ChexImageProcessor(size={"height": side, "width": side}), tokenizer, generator_tokenizer)
    return model.eval(), processor


@torch.inference_mode()
def bare_loop(model: ChexModel, processor: ChexProcessor, dataset: datasets.Dataset) -> int:
    """Everything that the tasks ask; returns the number of sentences."""
    context = EvaluationContext(model, processor)
    prompts, preset = class_prompts("phantom"), PRESETS["phantom"]
    classes, positive, negative = (context.class_features(prompts, kind) for kind in ("box", "positive", "negative"))
    regions = context.anatomy_features()
    report, options = ReportQueries.encode(prompts, context.text_features), REPORT_PRESETS[preset.report]
    generation = {"max_length": preset.max_length, "do_sample": False, "num_beams": 1}
    targets = list(iterate_targets(dataset, processor.image_processor))
    sentences = 0

    def describe(features: torch.Tensor, mask: torch.Tensor) -> list[str]:
        nonlocal sentences
        texts = context.generate(features[mask], **generation)
        sentences += len(texts)
        return texts

    for start in range(0, len(dataset), BATCH):
        rows = dataset[start : start + BATCH]
        of_batch = targets[start : start + BATCH]
        images = model.get_image_features(processor(images=rows["image"], return_tensors="pt")["pixel_values"])
        batch = Batch(context, images, of_batch)
        model(image_features=images, prompt_features=regions, use_post_decoder=False)
        output = model(image_features=images, prompt_features=classes, use_post_decoder=False, clip_boxes=True)
        model.classify(output.region_features, positive[:, None, None], negative[:, None, None])
        phrases = [list(target.grounded_phrases()) for target in of_batch]
        width = max(1, *map(len, phrases))
        mask = torch.tensor([[query < len(of_image) for query in range(width)] for of_image in phrases])
        queries = torch.zeros(*mask.shape, classes.shape[-1])
        queries[mask] = context.text_features([phrase for of_image in phrases for phrase in of_image])
        model(image_features=images, prompt_features=queries, query_mask=mask, use_post_decoder=False)
        features, annotated = batch.object_features()
        model.classify(features, positive, positive.mean(0, keepdim=True).expand_as(positive))
        describe(features, torch.from_numpy(annotated))
        features = batch.region_features()
        model.classify(features, positive, negative)
        described = [torch.from_numpy(target.described_regions()) for target in of_batch]
        describe(features, torch.stack(described))
        output = model(image_features=images, prompt_features=report.features, clip_boxes=True)
        probability = report.abnormality(output.query_features, model.classify, options.sign)
        found = (output.region_scores > options.threshold).any(-1)
        selected = report.select(probability, found, findings=options.select_findings, regions=options.select_regions)
        written = describe(output.query_features, selected)
        context.text_features([text for text in written if text])  # for the similarity of sentences
    return sentences


def run_engine(
    model: ChexModel, processor: ChexProcessor, data: datasets.DatasetDict, folder: Path, score: bool, limit: int
) -> dict[str, Any] | None:
    return evaluate(
        ModelSource(model=model, processor=processor),
        {"phantom": DataSource("phantom", data)},
        bind_tasks(find_tasks(["anatomy_localization", "all"]), ["phantom"], twins=True),
        folder,
        Options(limit=limit, progress=False, score=score, batch_size=BATCH, resamples=RESAMPLES, left_out=METEOR),
    )


def sentences_of(results: dict[str, Any]) -> int:
    tasks = results["tasks"]
    return sum(tasks[name]["texts"] for name in ("re_mscxr", "re_cig")) + tasks["rg_mimic"]["sentences_generated"]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of all threads, and the result."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def measure_memory(arguments: argparse.Namespace, cache: Path) -> None:
    """In a process of its own: the highest resident size after predictions."""
    for images in (arguments.images, MEMORY_FACTOR * arguments.images):
        command = [sys.executable, __file__, "--memory-of", str(images), "--data", str(cache)]
        if arguments.model:
            command += ["--model", arguments.model]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"memory: {found['images']:>6} images, predictions of all tasks: {found['peak_mib']:.0f} MiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--model", help="folder; left out: random weights")
    parser.add_argument("--data", help="cache folder of the phantom; left out: drawn")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cache = Path(arguments.data) if arguments.data else folder / "phantom"
        if arguments.data:
            data = open_data(cache)
        else:
            counts = {"num_train": 0, "num_validation": 64, "num_test": MEMORY_FACTOR * arguments.images}
            data = phantom_datasets(cache, image_size=128, **counts)
        if arguments.model:
            model = ChexModel.from_pretrained(arguments.model).eval()
            processor = ChexProcessor.from_pretrained(arguments.model)
        else:
            model, processor = build(data)
        if arguments.memory_of:
            images = min(arguments.memory_of, len(data["test"]))
            run_engine(model, processor, data, folder / "memory", False, images)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"images": images, "peak_mib": peak}))
            return
        test = data["test"].select(range(min(arguments.images, len(data["test"]))))
        bare_loop(model, processor, test.select(range(min(BATCH, len(test)))))  # what is only slow once
        bare, engine = [], []
        for number in range(arguments.repeats):
            seconds, sentences = timed(lambda: bare_loop(model, processor, test))
            bare.append(seconds)
            seconds, results = timed(
                lambda number=number: run_engine(model, processor, data, folder / f"run{number}", True, len(test))
            )
            engine.append(seconds)
            if sentences_of(results) != sentences:
                raise RuntimeError(f"The bare loop wrote {sentences} sentences, the tasks {sentences_of(results)}.")
        parts = ", ".join(f"{name} {results['seconds'][name]:.1f}" for name in ("predictions", "scores"))
        print(f"{len(test)} images, {sentences} sentences, {torch.get_num_threads()} threads")
        print(f"bare loop of model calls:           {min(bare):7.2f} s of processor time")
        print(
            f"evaluation, {RESAMPLES} resamples, written: {min(engine):7.2f} s  ({min(engine) / min(bare) - 1:+.1%}); "
            f"seconds by the clock: {parts}"
        )
        measure_memory(arguments, cache)


if __name__ == "__main__":
    main()
