"""Model cards: of converted checkpoints, and of any model folder before it goes to the Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from space_app.model_facts import CREDENTIALED, DATA_TERMS, ModelFacts, Run


if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from modeling_chex import ChexConfig


HEADER = """---
library_name: transformers
pipeline_tag: zero-shot-object-detection
license: other
license_name: see-the-original-weights
tags:
- chex
- chest-x-ray
- radiology
- medical-imaging
---

"""

SAFETY = """## Intended use

Research on the interpretation of chest radiographs. **This is not a medical device.** It must not be used for
diagnosis, triage or any other clinical decision: outputs can be wrong in every respect, sentences can name findings
that are not in the image, and nothing here has been validated on patients of your institution.

## Licence

The conversion changes the file format, not the rights: the licence and the data use agreements of the original weights
apply to this folder as well. Official ChEX weights were trained on MIMIC-CXR, Chest ImaGenome and VinDr-CXR, which are
restricted to credentialed users; check their terms before you share the weights. The code that loads them is under
Apache-2.0.
"""

CITATION = """
## Citation

```bibtex
@inproceedings{mueller2024chex,
  title     = {ChEX: Interactive Localization and Region Description in Chest X-rays},
  author    = {M{\\"u}ller, Philip and Kaissis, Georgios and Rueckert, Daniel},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024}
}
```
"""


def official_card(
    config: ChexConfig, checkpoint: str, num_parameters: int, dtype: str, with_tokenizers: bool = True
) -> str:
    """README.md of a converted ChEX.

    Args:
        checkpoint: name of the official file.
        num_parameters: of all parts.
        dtype: of the weights.
        with_tokenizers: whether `ChexProcessor` can be loaded from the folder.
    """
    stage = 1 if config.post_decoder_config is None else 2 if config.generator_config is None else 3
    abilities = "locates what a text names and encodes regions"
    if stage == 3:
        abilities = "locates what a text names and describes regions in sentences"
    generate = ""
    if stage == 3:
        generate = """
sequences = model.generate(query_features=outputs.query_features, query_mask=outputs.query_mask)
answers = processor.post_process_explanation(outputs, sequences, inputs["original_sizes"], prompts=prompts)"""
    else:
        generate = """
answers = processor.post_process_explanation(outputs, None, inputs["original_sizes"], prompts=prompts)"""
    processor = 'ChexProcessor.from_pretrained("THIS_FOLDER")'
    note = ""
    if not with_tokenizers:
        extra = ", load_generator_tokenizer()" if stage == 3 else ""
        processor = f'ChexProcessor(ChexImageProcessor.from_pretrained("THIS_FOLDER"), load_clip_tokenizer(){extra})'
        note = (
            "\nThe folder was written without tokenizers. `load_clip_tokenizer` (`processing_chex.clip_tokenizer`)"
            + (" and `load_generator_tokenizer` (`processing_chex.generator_tokenizer`)" if stage == 3 else "")
            + " take them from the Hub.\n"
        )
    return f"""{HEADER}# ChEX, converted from `{checkpoint}`

ChEX ([Müller, Kaissis, Rueckert, ECCV 2024](https://arxiv.org/abs/2404.15770)) answers questions about chest
radiographs: it {abilities}. This folder holds the weights of an official
checkpoint of stage {stage}, {num_parameters:,} parameters in {dtype}, converted for Hugging Face Transformers.

## How to load

```python
from modeling_chex import ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor

model = ChexModel.from_pretrained("THIS_FOLDER").eval()
processor = {processor}
prompts = ["Pleural effusion", "Right lower lung zone"]
inputs = processor(images="scan.png", text=prompts)
outputs = model(**inputs){generate}
```
{note}
Images are grey, cut to their central square and resized to {config.vision_config.image_size} pixels; boxes come back
as x0, y0, x1, y1 in pixels of the original image. `attention_mode` is `"legacy"`: with a query mask, as the processor
gives it, the answer to one prompt depends on the other prompts of the call, as in the official code. Set it to
`"grouped"` for independent answers, which the published weights were not evaluated with.

{SAFETY}{CITATION}"""


def chexzero_card(checkpoint: str, num_parameters: int, dtype: str) -> str:
    """README.md of encoders from a CLIP checkpoint; see `official_card`."""
    return f"""{HEADER}# Image and prompt encoder for ChEX, converted from `{checkpoint}`

The two encoders of a CLIP checkpoint such as CheXzero's (Tiu et al., *Nature Biomedical Engineering*, 2022),
{num_parameters:,} parameters in {dtype}, as the start of ChEX training. There is no prompt detector in it: stage 1
initialises and trains it.

## How to load

```bash
accelerate launch training/stage1.py init_from=THIS_FOLDER
accelerate launch training/pretrain_generator.py init_from=THIS_FOLDER
```

{SAFETY}{CITATION}"""


MIN_TRANSFORMERS = "5.20"  # as in setup.cfg
MARK = "<!-- Written by `chex push`; a card without this line is left as it is. -->"
TAGS = ("chex", "chest-x-ray", "radiology", "medical-imaging", "grounding", "report-generation", "custom_code")
# Kinds of tasks (evaluation.md) as the Hub's task types, and metrics as people call them.
TASK_TYPES = {
    "detection": "object-detection",
    "grounding": "zero-shot-object-detection",
    "anatomy_localization": "object-detection",
    "box_classification": "zero-shot-image-classification",
    "region_classification": "zero-shot-image-classification",
    "box_description": "image-to-text",
    "region_description": "image-to-text",
    "report_generation": "image-to-text",
}
METRIC_NAMES = {
    "map": "mAP",
    "map10": "mAP at IoU 0.1",
    "map30": "mAP at IoU 0.3",
    "map50": "mAP at IoU 0.5",
    "coco_map": "mAP (COCO)",
    "miou": "mIoU",
    "best_iou": "IoU at the best score threshold",
    "iou_at_30": "IoU of boxes that score above 0.3",
    "macro_iou": "mIoU, mean of phrases",
    "auroc": "AUROC",
    "accuracy": "accuracy, mean of classes",
    "wauroc": "weighted AUROC",
    "macro_auroc": "AUROC, mean of classes",
    "mcc": "Matthews correlation",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "example_f1": "example-based F1",
    "micro_precision": "micro precision",
    "micro_recall": "micro recall",
    "micro_f1_14": "micro F1, 14 findings",
    "macro_f1_14": "macro F1, 14 findings",
    "micro_f1_5": "micro F1, 5 findings",
    "macro_f1_5": "macro F1, 5 findings",
    "example_f1_14": "example-based F1, 14 findings",
    "micro_precision_14": "micro precision, 14 findings",
    "micro_recall_14": "micro recall, 14 findings",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "meteor_normal": "METEOR, normal regions",
    "meteor_abnormal": "METEOR, abnormal regions",
    "meteor_ratio": "METEOR of own over other regions",
    "cider": "CIDEr (0 to 10)",
    "radgraph_f1": "RadGraph F1",
    **{f"bleu{order}": f"BLEU-{order}" for order in range(1, 5)},
}
CITATIONS = {
    "mueller2024chex": r"""@inproceedings{mueller2024chex,
  title     = {ChEX: Interactive Localization and Region Description in Chest X-rays},
  author    = {M{\"u}ller, Philip and Kaissis, Georgios and Rueckert, Daniel},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024}
}""",
    "tiu2022expert": """@article{tiu2022expert,
  title   = {Expert-level detection of pathologies from unannotated chest X-ray images via self-supervised learning},
  author  = {Tiu, Ekin and Talius, Ellie and Patel, Pujan and Langlotz, Curtis P. and Ng, Andrew Y. and
             Rajpurkar, Pranav},
  journal = {Nature Biomedical Engineering},
  year    = {2022}
}""",
    "radford2021learning": """@inproceedings{radford2021learning,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2021}
}""",
    "radford2019language": """@misc{radford2019language,
  title  = {Language Models are Unsupervised Multitask Learners},
  author = {Radford, Alec and Wu, Jeffrey and Child, Rewon and Luan, David and Amodei, Dario and Sutskever, Ilya},
  year   = {2019}
}""",
    "johnson2019mimic": """@article{johnson2019mimic,
  title   = {{MIMIC-CXR}, a de-identified publicly available database of chest radiographs with free-text reports},
  author  = {Johnson, Alistair E. W. and Pollard, Tom J. and Berkowitz, Seth J. and others},
  journal = {Scientific Data},
  year    = {2019}
}""",
    "wu2021chest": """@inproceedings{wu2021chest,
  title     = {Chest {ImaGenome} Dataset for Clinical Reasoning},
  author    = {Wu, Joy T. and Agu, Nkechinyere N. and Lourentzou, Ismini and others},
  booktitle = {NeurIPS Datasets and Benchmarks},
  year      = {2021}
}""",
    "boecking2022making": """@inproceedings{boecking2022making,
  title     = {Making the Most of Text Semantics to Improve Biomedical Vision--Language Processing},
  author    = {Boecking, Benedikt and Usuyama, Naoto and Bannur, Shruthi and others},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2022}
}""",
    "nguyen2022vindr": """@article{nguyen2022vindr,
  title   = {{VinDr-CXR}: An open dataset of chest {X}-rays with radiologist's annotations},
  author  = {Nguyen, Ha Q. and Lam, Khanh and Le, Linh T. and others},
  journal = {Scientific Data},
  year    = {2022}
}""",
    "wang2017chestx": """@inproceedings{wang2017chestx,
  title     = {{ChestX-ray8}: Hospital-scale Chest {X}-ray Database and Benchmarks},
  author    = {Wang, Xiaosong and Peng, Yifan and Lu, Le and Lu, Zhiyong and Bagheri, Mohammadhadi and
               Summers, Ronald M.},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2017}
}""",
}


def model_card(facts: ModelFacts, repo: str, licence: str | None = None) -> str:
    """README.md of a model folder for the Hub: metadata, how to use it, data, training, results, limits, licences.

    Args:
        facts: From `read_facts`.
        repo: `USER/NAME`, under which the model is loaded in the examples.
        licence: Identifier of the Hub for the weights; by default what is known of the data decides.

    Raises:
        ValueError: `repo` is no name of a repository.
    """
    name = repo.split("/")[-1]
    sections = [
        f"# {name}",
        MARK,
        _introduction(facts),
        "## How to use\n\n" + _usage(facts, repo),
        "## Intended use\n\n" + INTENDED,
        "## Out of scope\n\n" + OUT_OF_SCOPE,
        "## Training\n\n" + _training(facts),
        "## Evaluation\n\n" + _evaluation(facts),
        "## Limitations\n\n" + _limitations(facts),
        "## Ethics\n\n" + ETHICS,
        "## Licences\n\n" + _licences(facts, licence),
        "## Citation\n\n```bibtex\n" + "\n\n".join(CITATIONS[key] for key in _citations(facts)) + "\n```",
    ]
    return f"---\n{card_data(facts, name, licence).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def card_data(facts: ModelFacts, name: str, licence: str | None = None) -> Any:
    """The metadata of a model card as `huggingface_hub.ModelCardData`."""
    from huggingface_hub import ModelCardData

    results = list(eval_results(facts.results)) if facts.results else []
    named = licence or ("apache-2.0" if facts.free else "other")
    # a name of its own is needed beside "other"
    other = "physionet-credentialed-health-data-1.5.0" if facts.credentialed else "see-the-card"
    tags = [*TAGS, *(["synthetic-data"] if facts.synthetic else [])]
    known = [name for name in facts.data_sets if name in DATA_TERMS and name != "own"]
    return ModelCardData(
        language="en",
        license=named,
        license_name=other if named == "other" else None,
        library_name="transformers",
        # Its pipeline is of a kind of its own; the nearest one of the Hub's.
        pipeline_tag="zero-shot-object-detection",
        tags=tags,
        datasets=["chex-phantom" if name == "phantom" else name for name in known] or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def eval_results(results: Mapping[str, Any]) -> Iterable[EvalResult]:
    """Defined metrics of results.json for the `model-index` of the Hub, fractions with their intervals."""
    from huggingface_hub import EvalResult

    for task_name, task in results["tasks"].items():
        data = str(task.get("data"))
        title = DATA_TERMS[data].title if data in DATA_TERMS else data
        for metric, entry in task["metrics"].items():
            if not _is_number(entry.get("value")):
                continue
            interval = {key: round(entry[key], 4) for key in ("low", "high") if _is_number(entry.get(key))}
            yield EvalResult(
                task_type=TASK_TYPES.get(task.get("kind"), "image-to-text"),
                task_name=str(task.get("title", task_name)) + (" (on the phantom)" if task.get("twin") else ""),
                dataset_type="chex-phantom" if data == "phantom" else data,
                dataset_name=title,
                # Tasks with one data set would be merged without it.
                dataset_config=task_name,
                dataset_split=str(task.get("split", "test")),
                metric_type=metric,
                metric_name=METRIC_NAMES.get(metric, metric),
                metric_value=round(float(entry["value"]), 4),
                metric_args=interval or None,
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


INTENDED = """Research on the interpretation of chest radiographs: comparing methods, studying grounding and generated
sentences, teaching. **This is not a medical device.**"""

OUT_OF_SCOPE = """- Diagnosis, triage, second reading, screening or any other decision about a patient.
- Reports that reach a patient or a record without being written anew by a physician.
- Lateral views, other body parts, CT, children, animals; photographs of films or screens.
- Finding out who a patient is or what belongs to one person."""

ETHICS = """Radiographs and reports are health data even without names. Ask only with images that you may process, do
not upload patient images to public demos, and do not try to recover training data from the weights. Errors are not
spread evenly over people: before a study draws conclusions, measure by sex, age, view and site. Whoever reads an
answer should see that a program wrote it."""


def _introduction(facts: ModelFacts) -> str:
    ability = {
        1: "locates what a text names in a chest radiograph and encodes it",
        2: "locates what a text names in a chest radiograph and encodes regions, those that are drawn as well",
        3: "locates what a text names in a chest radiograph, describes it and regions that are drawn in sentences, "
        "and writes reports in which every sentence has its region",
    }[facts.stage]
    parts = ", ".join(f"{part.replace('_', ' ')} {_millions(count)}" for part, count in facts.parameters.items())
    vision = facts.config.get("vision_config") or {}
    origin = ""
    if facts.converted_from is not None:
        origin = f"\n\nThe weights were converted from `{facts.converted_from}`, a checkpoint of the official code."
    synthetic = ""
    if facts.synthetic:
        synthetic = (
            "\n\n**Trained on synthetic pictures alone.** It shows how the software works. It has never seen a "
            "radiograph, and what it says about one means nothing."
        )
    return (
        f"ChEX ([Müller, Kaissis, Rueckert, ECCV 2024](https://arxiv.org/abs/2404.15770)) {ability}. This is a model "
        f"of stage {facts.stage} for Hugging Face Transformers, {facts.num_parameters:,} parameters in {facts.dtype} "
        f"({parts}), for images of {vision.get('image_size', 224)} pixels."
        f"{synthetic}{origin}\n\n**For research only. Not for clinical use.**"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 100_000 else f"{count:,}"


def _usage(facts: ModelFacts, repo: str) -> str:
    sentences = facts.stage == 3
    generate = (
        "sequences = model.generate(query_features=outputs.query_features, query_mask=outputs.query_mask)\n"
        if sentences
        else ""
    )
    given = "sequences" if sentences else "None"
    frame = (
        "cut to their central square" if facts.geometry == "center_crop" else "padded to a square, nothing is cut off"
    )
    report = ""
    if sentences:
        report = '\nreport = chex.report("scan.png")\nprint(report.text)'
    legacy = ""
    if facts.config.get("attention_mode") == "legacy":
        legacy = (
            "\n\n`attention_mode` is `legacy`: the answer to one prompt depends on the other prompts of the call, as "
            "in the official code."
        )
    return f"""The repository brings its code along; read it before you trust it.
Transformers {MIN_TRANSFORMERS} or newer and Pillow are needed, and `pydicom` for DICOM.

```python
from transformers import pipeline

chex = pipeline("chest-xray-explanation", model="{repo}", trust_remote_code=True)
result = chex("scan.png", prompts=["Pleural effusion", "Right lower lung zone"], boxes=[[40, 60, 110, 120]])
for answer in result["answers"]:
    print(answer["query"], answer["score"], answer["regions"], answer["sentence"]){report}
```

The parts underneath:

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)
prompts = ["Pleural effusion", "Right lower lung zone"]
inputs = processor(images="scan.png", text=prompts, return_tensors="pt")
outputs = model(**inputs)
{generate}answers = processor.post_process_explanation(outputs, {given}, inputs["original_sizes"], prompts=prompts)
```

PNG, JPEG, TIFF and DICOM files are read, of any size and bit depth; frontal views are expected. Images are made grey
and {frame}. Boxes go in and come out as x0, y0, x1, y1 in pixels of the original image. A query that finds nothing
says so; its sentence is then about wherever the model looked.{legacy}"""


def _training(facts: ModelFacts) -> str:
    if facts.converted_from is not None and not facts.runs:
        return (
            "The checkpoint does not hold its training log. According to the paper, official models were trained on "
            "Chest ImaGenome (images and reports of MIMIC-CXR) and VinDr-CXR, starting from CheXzero and from GPT-2 "
            "trained on PubMed abstracts."
        )
    if not facts.runs:
        return "No record of the training came with the weights."
    rows = ["| stage | data | updates | hours | settings |", "|---|---|---|---|---|"]
    rows += [_run_row(run) for run in facts.runs]
    last = facts.runs[-1]
    losses = ", ".join(f"{name} {value:.4g}" for name, value in last.losses.items())
    text = "\n".join(rows)
    if losses:
        text += f"\n\nLast losses of {last.stage}: {losses}."
    outside = dict.fromkeys(name for run in facts.runs for name in run.starts_from)
    if outside:
        text += f"\n\nInitialised from weights that are not described here: {', '.join(map(_code, outside))}."
    return text


def _code(text: str) -> str:
    return f"`{text}`"


def _run_row(run: Run) -> str:
    names = [DATA_TERMS[name].title if name in DATA_TERMS else "data that are not known" for name in run.data_sets]
    data = ", ".join(names) + (f": {run.images:,} images" if run.images else "")
    settings = ", ".join(f"{name} {value}" for name, value in run.settings.items())
    hours = "" if run.seconds is None else f"{run.seconds / 3600:.2f}"
    steps = "" if run.steps is None else f"{run.steps:,}"
    return f"| {run.stage} | {data} | {steps} | {hours} | {settings} |"


def _evaluation(facts: ModelFacts) -> str:
    if facts.results is not None:
        return _result_tables(facts.results)
    if facts.headline is not None:
        rows = ["| number | value |", "|---|---|"]
        rows += [f"| {name} | {value:.4f} |" for name, value in facts.headline.items() if _is_number(value)]
        return "\n".join(rows) + "\n\nFractions; without intervals."
    return "These weights were not evaluated. Nothing is known about how well they work."


def _result_tables(results: Mapping[str, Any]) -> str:
    from evaluation.published import chex

    text = []
    resamples = results.get("resamples")
    for name, task in results["tasks"].items():
        published = not task.get("twin")
        header = "| metric | value | 95 % interval |" + (" published |" if published else "")
        rows = [header, "|---|---|---|" + ("---|" if published else "")]
        for metric, entry in task["metrics"].items():
            value = f"{entry['value']:.4f}" if _is_number(entry.get("value")) else "undefined"
            ends = [entry.get("low"), entry.get("high")]
            interval = f"{ends[0]:.4f} to {ends[1]:.4f}" if all(map(_is_number, ends)) else ""
            row = f"| {METRIC_NAMES.get(metric, metric)} | {value} | {interval} |"
            if published:
                reference = chex(name, metric)
                row += f" {reference.value:.4f} |" if reference is not None and reference.value is not None else " |"
            rows.append(row)
        data = str(task.get("data"))
        where = DATA_TERMS[data].title if data in DATA_TERMS else data
        twin = "" if published else ". The procedure of the paper's task on synthetic images; not comparable with it"
        text.append(
            f"### {task.get('title', name)}\n\nOn {where}, {task.get('split', 'test')} split, "
            f"{task.get('images', 0):,} images{twin}.\n\n" + "\n".join(rows)
        )
        for metric, reason in (task.get("not_computed") or {}).items():
            text.append(f"{METRIC_NAMES.get(metric, metric)} was not computed: {_without_paths(str(reason))}.")
    method = "Fractions, not percent."
    if resamples:
        method += (
            f" Intervals are percentiles of {resamples:,} bootstrap samples of images: they tell of the "
            "choice of test images, not of training again or of other hospitals."
        )
    versions = results.get("versions") or {}
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    return method + (f" Computed with {used}." if used else "") + "\n\n" + "\n\n".join(text)


def _without_paths(text: str) -> str:
    """Of absolute paths, the last name: the rest tells about a machine."""
    return re.sub(r"(?<![\w.:/])(?:~|/[\w.~ -]+)(?:/[\w.~-]+)*/([\w.~-]+)", r"\1", text)


def _limitations(facts: ModelFacts) -> str:
    points = []
    if "phantom" in facts.data_sets:
        points.append(
            "It learned from drawn films and from texts of a small grammar. Numbers on them measure the software, "
            "not the reading of radiographs, and nothing carries over to patients. Small and faint findings are "
            "located worst."
        )
    populations = dict.fromkeys(
        DATA_TERMS[name].population for name in facts.data_sets if name in DATA_TERMS and name != "phantom"
    )
    if populations:
        points.append(
            f"Training population: {'; '.join(populations)}. Other scanners, countries, ages and frequencies of "
            "findings give other errors."
        )
    if "unknown" in facts.data_sets:
        points.append("Not all of its training data are known, so nothing is known about whom they leave out.")
    points += [
        "Sides are those of the patient. The model can confuse left and right; check every side.",
        "Sentences can name findings that are not there and leave out those that are; that they read well is no "
        "evidence.",
        "Comparisons with earlier images cannot be right: the model sees one image.",
        "A missing box does not mean a normal image.",
        "Scores are not calibrated probabilities of disease.",
        "It was not tried on patients in any clinical setting.",
    ]
    return "\n".join(f"- {point}" for point in points)


def _licences(facts: ModelFacts, licence: str | None) -> str:
    lines = ["- **Code** (`*.py` in this repository): Apache-2.0."]
    if licence is not None:
        weights = f"{licence}, as chosen by those who published them."
    elif facts.free:
        weights = "Apache-2.0; no data with terms of their own went into them."
    elif facts.credentialed:
        weights = (
            f"trained on data under the {CREDENTIALED}. PhysioNet regards models derived from such data as containing "
            "sensitive information and asks that they be shared on PhysioNet under the same agreement. **Do not pass "
            "these weights on** unless you have signed it and your recipients have, too."
        )
    else:
        weights = (
            "not known, because not all of their training data are. Ask whoever trained them before you use them."
        )
    lines.append(f"- **Weights**: {weights}")
    for name in facts.data_sets:
        if name in DATA_TERMS:
            terms = DATA_TERMS[name]
            title = f"[{terms.title}]({terms.url})" if terms.url else terms.title
            lines.append(f"- **Data**, {title}: {terms.licence}.")
    if facts.converted_from is not None or any(run.starts_from for run in facts.runs):
        lines.append(
            "- The weights that training started from (such as CheXzero or GPT-2) have licences of their own."
        )
    return "\n".join(lines)


def _citations(facts: ModelFacts) -> list[str]:
    keys = ["mueller2024chex", "tiu2022expert", "radford2021learning"]
    if facts.stage == 3:
        keys.append("radford2019language")
    terms = (DATA_TERMS[name] for name in facts.data_sets if name in DATA_TERMS)
    return list(dict.fromkeys([*keys, *(one.citation for one in terms if one.citation)]))


__all__ = [
    "CITATIONS",
    "MARK",
    "METRIC_NAMES",
    "card_data",
    "chexzero_card",
    "eval_results",
    "model_card",
    "official_card",
]
