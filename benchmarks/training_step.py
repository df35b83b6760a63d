"""
Time of one optimisation step of stages 1 to 3 at full size, split into its parts.

The model has its published size and random weights; objectives, frozen parts and optimiser are those of the published
configurations. Images are the phantom's, with labels of the 53 classes of Chest ImaGenome; in stage 1 half of them
stand for VinDr-CXR, with labels and boxes of its 22 classes. Anatomies are asked for by name (the other half of the
steps of stages 2 and 3 encodes their boxes, which is cheaper).

    encode    image encoder, with its backward pass where it is trained
    detect    prompt detector, post decoder and encoding of boxes, with their backward pass
    match     assignment of regions to boxes, without gradient
    generate  sentence generator with its backward pass
    update    clipping and AdamW
    other     augmentation, losses, prompts

The batch is the largest of 256, 128, ... that fits into the memory of the GPU; on a CPU it is 2, unless --batch-size
says otherwise. Stage 3 needs 21 GB of memory. Run from the repository root:
`python benchmarks/training_step.py`.
"""

import argparse
import functools
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import torch
from torch import Tensor

import training.objectives.detection
from modeling_chex import ChexConfig, ChexModel
from processing_chex import ChexImageProcessor
from processing_chex.prompt_sets import merge_prompt_sets, prompts_for_classes
from processing_chex.vocabulary import ANATOMY_NAMES, CIG_CLASSES, VINDR_CLASSES
from training.build_tokenizers import build_tokenizers
from training.collate import MixedDataset, RecordDataset, TextTable
from training.configuration import CONFIG_DIR, load_config
from training.data.phantom import encode_png, phantom_record
from training.data.record import empty_record, record_features
from training.model_setup import set_trainable
from training.supervision import ChexSupervision
from training.transforms import Augmentation


PARTS = ("encode", "detect", "match", "generate", "update", "other")
SIDE, DISTINCT = 256, 32


class Timeline:
    """
    Seconds of each part. Time belongs to the part that was entered last. In the backward pass a part is entered when
    the gradient of one of its results is complete, and left with the gradients of its inputs: autograd takes what was
    computed last first.
    """

    def __init__(self, device: torch.device):
        self.device, self.part, self.last = device, "other", 0.0
        self.seconds: Counter[str] = Counter()

    def enter(self, part: str) -> str:
        """Returns the part that is left."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now, left = time.perf_counter(), self.part
        self.seconds[left] += now - self.last
        self.part, self.last = part, now
        return left

    def leave(self, part: str) -> None:
        """Unless another part, to which the inputs of this one belong, has been entered."""
        if self.part == part:
            self.enter("other")

    def watch(self, function: Callable, part: str) -> Callable:
        """The same function, whose time is counted."""

        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> object:
            inputs = list(_with_gradient([*args, *kwargs.values()]))
            for tensor in inputs:
                tensor.register_hook(lambda _: self.leave(part))
            left = self.enter(part)
            result = function(*args, **kwargs)
            self.enter(left)
            for tensor in _with_gradient([result]):
                if not any(tensor is given for given in inputs):  # which outputs may hold as well
                    tensor.register_hook(lambda _: self.enter(part) and None)  # hooks must return nothing
            return result

        return wrapper


def _with_gradient(values: object) -> Iterator[Tensor]:
    """The tensors in arguments or outputs through which gradients flow."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                yield value
        elif isinstance(value, dict | list | tuple):
            yield from _with_gradient(value)


def records() -> tuple[datasets.Dataset, datasets.Dataset]:
    """Images with anatomies and reports, and images with boxes and labels of findings."""
    rng = np.random.default_rng(0)
    drawn, read = [], []
    for number in range(DISTINCT):
        row = phantom_record(7, number, size=SIDE)
        labels = rng.random((len(ANATOMY_NAMES), len(CIG_CLASSES))) < 0.05
        drawn.append(row | {"objects": None, "class_labels": None, "anatomy_labels": labels.astype(np.int8).tolist()})
        objects = []
        for category in (rng.random(len(VINDR_CLASSES)) < 0.1).nonzero()[0].tolist():
            for _ in range(rng.integers(1, 5)):
                x, y = rng.uniform(0, 0.7 * SIDE, 2).tolist()
                box = [x, y, x + 0.3 * SIDE, y + 0.2 * SIDE]
                objects.append({"bbox": box, "category": category, "phrase": ""})
        present = np.zeros(len(VINDR_CLASSES), dtype=np.int8)
        present[[item["category"] for item in objects]] = 1
        image = {"bytes": encode_png(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)), "path": None}
        known = {"sample_id": f"reading-{number}", "image": image, "height": SIDE, "width": SIDE}
        read.append(empty_record(objects=objects, class_labels=present.tolist(), **known))
    return (
        datasets.Dataset.from_list(drawn, features=record_features(CIG_CLASSES)),
        datasets.Dataset.from_list(read, features=record_features(VINDR_CLASSES)),
    )


class Step:
    """One stage, ready for optimisation steps."""

    def __init__(self, stage: int, device: torch.device, precision: str):
        self.config = load_config(CONFIG_DIR / f"stage{stage}.yaml", ["objectives.region_encoding=token"])
        self.device, self.precision = device, precision
        processor, texts, parts = ChexImageProcessor(), TextTable(), records()[: 2 if stage == 1 else 1]
        names = [CIG_CLASSES, VINDR_CLASSES][: len(parts)]
        prompts, places = merge_prompt_sets([prompts_for_classes(list(vocabulary)) for vocabulary in names])
        self.data = MixedDataset(
            [
                RecordDataset(part, processor, texts, num_classes=len(prompts.names), class_index=place, side=SIDE)
                for part, place in zip(parts, places, strict=True)
            ],
            [1] * len(parts),
        )
        tokenizer, generator_tokenizer = build_tokenizers(texts.texts)
        torch.manual_seed(0)
        ends = {f"{name}_token_id": generator_tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
        ends_of_prompts = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = ChexModel(
            ChexConfig(
                text_config=ends_of_prompts,
                post_decoder_config={} if stage > 1 else None,
                generator_config=ends if stage > 2 else None,
            )
        )
        set_trainable(model, self.config.trainable, self.config.frozen_vision_layers)
        self.supervision = ChexSupervision(
            model,
            processor,
            tokenizer,
            generator_tokenizer,
            prompts,
            texts,
            self.config.objectives,
            Augmentation(self.config.augmentation),
        ).to(device)
        self.supervision.train()
        self.parameters = [part for part in self.supervision.parameters() if part.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def run(self, batch_size: int, seed: int) -> Timeline:
        """An optimisation step; half of the images of stage 1 are of each data set."""
        images = np.arange(batch_size) * (len(self.data) // 2 + 1) % len(self.data)
        batch = self.data.__getitems__(images)[0].to(self.device)
        timeline, model = Timeline(self.device), self.supervision.model
        watched = [
            (model, "get_image_features", "encode"),
            (model, "forward", "detect"),
            (model, "encode_boxes", "detect"),
            (training.objectives.detection, "match_regions", "match"),
        ]
        if model.sentence_generator is not None:
            watched.append((model.sentence_generator, "forward", "generate"))
        originals = [getattr(owner, name) for owner, name, _ in watched]
        try:
            for (owner, name, part), original in zip(watched, originals, strict=True):
                setattr(owner, name, timeline.watch(original, part))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            timeline.last = time.perf_counter()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = self.supervision(batch, seed=seed)["loss"]
            timeline.enter("other")
            loss.backward()
            timeline.enter("update")
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            timeline.enter("other")
            self.optimizer.zero_grad()
        finally:
            for (owner, name, _), original in zip(watched, originals, strict=True):
                setattr(owner, name, original)
        return timeline


def measure(step: Step, batch_size: int, steps: int) -> tuple[int, Counter[str]]:
    """Batch size that fits, and mean seconds of each part."""
    while True:
        try:
            step.run(batch_size, seed=0)  # warm-up; AdamW makes its moments
            break
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            step.optimizer.zero_grad()
            torch.cuda.empty_cache()
    total: Counter[str] = Counter()
    for seed in range(1, steps + 1):
        total.update(step.run(batch_size, seed).seconds)
    return batch_size, Counter({part: seconds / steps for part, seconds in total.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", choices=("no", "bf16"), help="default: bf16 on a GPU, no on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.set_num_threads(arguments.threads)
    precision = arguments.precision or ("bf16" if on_gpu else "no")
    print(f"{torch.cuda.get_device_name() if on_gpu else f'CPU, {arguments.threads} threads'}, precision {precision}")
    print("stage  batch   seconds  " + "".join(f"{part:>10s}" for part in PARTS))
    for stage in arguments.stages:
        step = Step(stage, device, precision)
        batch_size = arguments.batch_size or (step.config.optimization.batch_size if on_gpu else 2)
        batch_size, seconds = measure(step, batch_size, arguments.steps)
        whole = seconds.total()
        shares = "".join(f"{100 * seconds[part] / whole:8.2f} %" for part in PARTS)
        print(f"{stage:5d}  {batch_size:5d}  {whole:8.2f}  {shares}", flush=True)
        del step
        gc.collect()


if __name__ == "__main__":
    main()
