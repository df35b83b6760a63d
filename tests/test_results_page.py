"""The pages about an evaluation: published numbers, Markdown, HTML and figures from `results.json`."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from evaluation.page import ResultsError, main, write_pages
from evaluation.page_html import radar_data
from evaluation.plots import Axis, Series, calibration, interval_strip, precision_recall, radar
from evaluation.published import (
    CHEX,
    NOTE,
    PAPER,
    PROMPT_SETS,
    PUBLISHED,
    RADAR,
    best_baseline,
    chex,
    find_published,
    ratio_to_chex,
)
from evaluation.results_view import (
    NINE_TASKS,
    flatten,
    headline,
    interval,
    mean_std,
    overview,
    percent,
    read_results,
    reference_sentences,
    split_sentences,
)


VINDR = (
    "Aortic enlargement",
    "Atelectasis",
    "Cardiomegaly",
    "Calcification",
    "Consolidation",
    "Interstitial lung disease (ILD)",
    "Infiltration",
    "Lung opacity",
    "Mediastinal shift",
    "Mass or nodule",
    "Pulmonary fibrosis",
    "Pneumothorax",
    "Pleural thickening",
    "Pleural effusion",
    "Other lesion",
)
MSCXR = VINDR[1:3] + ("Consolidation", "Edema", "Lung opacity", "Pleural effusion", "Pneumonia", "Pneumothorax")
CHEXPERT = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
EVIL = "<script>alert('no')</script> small mass & \"nodule\" | `x`."


# --- results as an evaluation writes them ---


def measured(value, std=0.012, official=False, undefined=0):
    entry = {
        "value": value,
        "mean": value - 0.0004,
        "std": std,
        "low": max(0.0, value - 1.96 * std),
        "high": min(1.0, value + 1.96 * std),
        "undefined": undefined,
    }
    if official:
        entry["official"] = {"value": value - 0.021, "mean": value - 0.0213, "std": std * 1.1}
    return entry


def task(title, kind, data, metrics, *, twin=False, images=1500, units=None, unit="image", **more):
    content = {
        "title": title,
        "kind": kind,
        "data": "phantom" if twin else data,
        "split": "test",
        "twin": twin,
        "images": images,
        "units": units or images,
        "unit": unit,
        "metrics": metrics,
        "per_class": [],
        "settings": {},
        "tuning": None,
        "notes": [],
        "not_computed": {},
        "curves": {},
        "examples": [],
        "seconds": {"tuning": 0.0, "scoring": 3.21},
    }
    assert set(more) <= {*content, "headline"}
    return content | more


def curves(names, rng):
    recall = np.linspace(0, 1, 101)
    result = {}
    for name in names:
        reach = rng.uniform(0.3, 1.0)
        kept = recall[recall <= reach]
        result[name] = {
            "recall": kept.round(4).tolist(),
            "precision": np.clip(rng.uniform(0.5, 1) * (1 - kept / reach * rng.uniform(0.4, 1)), 0, 1)
            .round(4)
            .tolist(),
        }
    confidence = np.linspace(0.05, 0.95, 10)
    counts = (4000 * np.exp(-5 * confidence)).astype(int)
    return {
        "precision_recall": result,
        "calibration": {
            "confidence": confidence.round(4).tolist(),
            "accuracy": (confidence**1.6).round(4).tolist(),
            "count": counts.tolist(),
        },
    }


def picture(folder, name, rng):
    y, x = np.mgrid[0:224, 0:224] / 223
    body = 200 * np.exp(-(((x - 0.5) / 0.28) ** 2)) * (0.6 + 0.4 * np.cos(9 * y)) + 12 * rng.standard_normal(
        (224, 224)
    )
    path = folder / "examples" / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(body.clip(0, 255).astype(np.uint8)).save(path)
    return f"examples/{name}"


def box(corners, label, kind="prediction", group=0, score=None):
    return {"box": list(corners), "label": label, "score": score, "kind": kind, "group": group}


def example(folder, number, rng, score, title, **more):
    return {
        "sample_id": f"p10/s{number:04d}",
        "image": picture(folder, f"test-{number:06d}.png", rng),
        "frame": [224, 224],
        "title": title,
        "score": score,
        "boxes": [],
        "generated": "",
        "reference": "",
        "sentences": [],
    } | more


def detection_examples(folder, rng, start):
    result = []
    for index in range(6):
        x, y = rng.uniform(0.05, 0.5, 2).round(4).tolist()
        result.append(
            example(
                folder,
                start + index,
                rng,
                round(0.1 * index, 2),
                "lowest scores" if index < 3 else "drawn at random",
                boxes=[
                    box((x, y, x + 0.3, y + 0.25), "Pleural effusion", group=13, score=0.8712),
                    box((0.1, 0.6, 0.4, 0.9), "Cardiomegaly", group=2, score=0.3141),
                    box((x + 0.02, y + 0.03, x + 0.33, y + 0.27), "Pleural effusion", "target", 13),
                    box((0.6, 0.1, 0.8, 0.3), "Interstitial lung disease (ILD)", "target", 5),
                ],
            )
        )
    return result


def report_example(folder, number, rng, title="drawn at random"):
    texts = (
        ("The heart is mildly enlarged.", "Cardiac silhouette", 0),
        ("There is mild interstitial pulmonary edema.", "Edema", 1),
        ("No pleural effusion is seen.", "Pleural effusion", 2),
        (EVIL, "Lung lesion", 3),
        ("The aorta is tortuous.", "Mediastinum", 4),
    )
    return example(
        folder,
        number,
        rng,
        0.6667,
        title,
        boxes=[
            box((0.35, 0.5, 0.75, 0.85), "Cardiac silhouette", group=0, score=0.93),
            box((0.1, 0.2, 0.45, 0.8), "Edema", group=1, score=0.81),
            box((0.55, 0.2, 0.9, 0.8), "Edema", group=1, score=0.79),
            box((0.05, 0.75, 0.3, 0.95), "Pleural effusion", group=2, score=0.66),
            box((0.7, 0.75, 0.95, 0.95), "Pleural effusion", group=2, score=0.62),
            box((0.2, 0.3, 0.3, 0.4), "Lung lesion", group=3, score=0.55),
            box((0.34, 0.52, 0.76, 0.84), "Cardiomegaly", "target", -1),
        ],
        generated=" ".join(text for text, *_ in texts),
        reference="Mild interstitial pulmonary edema. The heart is mildly enlarged. There is a pleural effusion. "
        "A pacemaker projects over the left chest.",
        sentences=[{"text": text, "prompt": prompt, "group": group} for text, prompt, group in texts],
    )


def make_results(folder: Path, twins=False):
    """
    Results with what happens: numbers with and without an official column, undefined and not computed metrics, classes
    without positives, a task that was not run, one of the project's own, texts that are markup.
    """
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    finding = "" if twins else "_14"
    needs = "needs the CheXbert weights: chex evaluate --labeler chexbert:FOLDER"
    texts = {
        "meteor": measured(0.1287, 0.001),
        "bleu1": measured(0.2961, 0.0024),
        "bleu2": measured(0.1771),
        "bleu3": measured(0.1102),
        "bleu4": measured(0.0671, 0.0011),
        "rouge_l": measured(0.1958, 0.001),
        "cider": measured(0.1797, 0.008),
    }

    def per_class(names, metrics):
        return [
            {"name": name, "positives": 0 if rank == 8 else int(rng.integers(3, 900))}
            | {metric: None if rank == 8 else float(rng.uniform(0.02, 0.7)) for metric in metrics}
            for rank, name in enumerate(names)
        ]

    detection = {
        "map": measured(0.1423, 0.006, official=True),
        "map10": measured(0.1801, 0.007, official=True),
        "map30": measured(0.1512, 0.006, official=True),
        "map50": measured(0.1098, 0.005, official=True),
        "coco_map": measured(0.0512, 0.004),
    }
    tasks = {
        "od_vindr": task(
            "Object detection, VinDr-CXR",
            "detection",
            "vindr-cxr",
            detection,
            twin=twins,
            headline="map",
            per_class=per_class(VINDR, ("map", "map50")),
            curves=curves(VINDR[:8] + VINDR[9:], rng),
            settings={"post_processing": {"score": "product", "temperature": 0.15, "scales": [1.0] * 15}},
            tuning={
                "task": "od_vindr",
                "settings": {"score": "product", "temperature": 0.15},
                "log": [{"stage": "scale", "candidate": 1.1, "map": 0.1391}, {"stage": "score", "candidate": 0.15}],
            },
            notes=["Without positives in this split, so undefined and left out of means: Mediastinal shift."],
            examples=detection_examples(folder, rng, 0),
        ),
        "od_mscxr": task(
            "Object detection, MS-CXR",
            "detection",
            "ms-cxr",
            {key: measured(entry["value"] + 0.03, 0.013, official=True) for key, entry in detection.items()},
            twin=twins,
            images=169,
            per_class=per_class(MSCXR, ("map", "map50")),
            curves=curves(MSCXR, rng),
        ),
        "sg_mscxr": task(
            "Sentence grounding, MS-CXR",
            "grounding",
            "ms-cxr",
            {
                "miou": measured(0.4631, 0.0145),
                "best_iou": measured(0.481),
                "iou_at_30": measured(0.476),
                "macro_iou": measured(0.402),
                "map": measured(0.4391, 0.022),
            },
            twin=twins,
            images=169,
            examples=[
                example(
                    folder,
                    20 + n,
                    rng,
                    0.2 * n,
                    "lowest scores",
                    boxes=[
                        box((0.1, 0.5, 0.4, 0.9), "Small right pleural effusion", group=0, score=0.8),
                        box((0.12, 0.52, 0.42, 0.88), "Small right pleural effusion", "target", 0),
                        box((0.55, 0.2, 0.9, 0.5), "Patchy opacity in the left upper lung zone", "target", 1),
                    ],
                    sentences=[
                        {"text": text, "prompt": text, "group": group}
                        for group, text in enumerate(
                            ("Small right pleural effusion", "Patchy opacity in the left upper lung zone")
                        )
                    ],
                )
                for n in range(2)
            ],
        ),
        "rc_mscxr": task(
            "Region classification, MS-CXR",
            "box_classification",
            "ms-cxr",
            {
                "auroc": measured(0.8179, 0.013, official=True),
                "accuracy": measured(0.512, 0.03),
                "mcc": measured(-0.0312, 0.03),
            },
            twin=twins,
            images=169,
            units=234,
            unit="box",
            per_class=per_class(MSCXR, ("auroc",)),
        ),
        "rc_cig": task(
            "Region classification, Chest ImaGenome",
            "region_classification",
            "chest-imagenome",
            {"wauroc": measured(0.7012, 0.002, undefined=3), "macro_auroc": {"value": None, "undefined": 1000}},
            twin=twins,
            images=3402,
            per_class=per_class([f"finding {n}" for n in range(53)], ("wauroc",)),
            notes=["macro_auroc is undefined: finding 8 has no positives."],
        ),
        "re_mscxr": task(
            "Region explanation, MS-CXR",
            "box_description",
            "ms-cxr",
            {f"micro_f1{finding}": measured(0.4912, 0.0224), f"macro_f1{finding}": measured(0.1987), **texts},
            twin=twins,
            images=169,
            examples=[
                example(
                    folder,
                    30 + n,
                    rng,
                    0.5 * n,
                    "lowest scores",
                    boxes=[box((0.1, 0.5, 0.4, 0.9), "Right pleural effusion.", "target", 0)],
                    generated="There is a right pleural effusion.",
                    reference="Right pleural effusion.",
                    sentences=[{"text": "There is a right pleural effusion.", "prompt": "box", "group": 0}],
                )
                for n in range(2)
            ],
        ),
        "re_cig": task(
            "Region explanation, Chest ImaGenome",
            "region_description",
            "chest-imagenome",
            {} if not twins else {"micro_f1": measured(0.51, 0.004)},
            twin=twins,
            images=3402,
            not_computed={} if twins else {"micro_f1_14": needs, "meteor": "needs Java 8 or newer"},
        ),
        "rg_mimic": task(
            "Report generation, MIMIC-CXR",
            "report_generation",
            "mimic-cxr",
            {
                f"micro_f1{finding}": measured(0.5187, 0.006),
                f"macro_f1{finding}": measured(0.3211, 0.007),
                f"example_f1{finding}": measured(0.4512, 0.006, official=True),
                **texts,
            },
            twin=twins,
            images=3082,
            per_class=per_class(CHEXPERT, ("f1",)),
            not_computed={"radgraph_f1": "needs the package radgraph and its weights"},
            examples=[
                report_example(folder, 40, rng, "lowest scores"),
                report_example(folder, 41, rng),
            ],
        ),
        "anatomy_localization": task(
            "Anatomy localisation",
            "anatomy_localization",
            "chest-imagenome",
            {"miou": measured(0.842, 0.001)},
            twin=twins,
            images=3402,
        ),
    }
    results = {
        "schema": 1,
        "created": "2026-11-26T09:12:33+00:00",
        "command": 'accelerate launch evaluation/run.py --model models/chex --tasks all --note "<b>&"',
        "seed": 2147483647,
        "resamples": 1000,
        "model": {
            "path": "models/chex",
            "sha256": "0123456789abcdef" * 4,
            "parameters": 1_012_345_678,
            "name": "chex-stage3",
        },
        "data": {
            name: {"folder": f"prepared/{name}", "split": "test", "images": count, "fingerprint": f"{count:016x}"}
            for name, count in (
                [("phantom", 400)] if twins else [("vindr-cxr", 1500), ("ms-cxr", 169), ("mimic-cxr", 3082)]
            )
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "seconds": {"image encoder": 12.3, "detection": 45.0, "total": 90.0},
        "skipped": {"od_nih8": "needs prepared/nih-cxr14: chex data prepare nih-cxr14 --raw DIR"},
        "tasks": tasks,
    }
    return results


def write(folder, results):
    path = folder / "results.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["real", "twins"])
def pages(request, tmp_path_factory):
    """(results, html, markdown, folder, whether twins)."""
    folder = tmp_path_factory.mktemp("pages")
    results = make_results(folder, request.param)
    written = write_pages(write(folder, results))
    assert [path.name for path in written[:2]] == ["index.html", "results.md"]
    assert all(path.is_file() for path in written)
    return results, *(path.read_text(encoding="utf-8") for path in written[:2]), folder, request.param


# --- published numbers ---

# (task, metric, model, label) -> (value in percent, std in percent, source), typed from the published tables.
TYPED = {
    ("sg_mscxr", "miou", "ChEX", None): (47.52, 1.45, PAPER),
    ("sg_mscxr", "map", "ChEX", None): (44.47, 2.21, PAPER),
    ("sg_mscxr", "miou", "BioViL (masks)", None): (22.75, 1.26, PAPER),
    ("sg_mscxr", "map", "CheXzero (boxes)", None): (5.94, 0.64, PAPER),
    ("sg_mscxr", "miou", "OmniFM-DR", None): (46.2, None, PAPER),
    ("sg_mscxr", "miou", "TransVG, CheXzero backbone", None): (53.51, 1.53, PAPER),
    ("sg_mscxr", "map", "TransVG, BioViL backbone", None): (41.24, 2.73, PAPER),
    ("od_nih8", "map", "ChEX", None): (11.14, None, NOTE),
    ("od_nih8", "map", "Loc-ADPD-BioViL", None): (11.9, None, RADAR),
    ("od_mscxr", "map", "ChEX", None): (16.60, None, NOTE),
    ("od_mscxr", "map", "best supervised detector", None): (15.83, None, NOTE),
    ("od_mscxr", "map", "BioViL", None): (7.1, None, RADAR),
    ("od_vindr", "map", "Faster R-CNN", None): (None, None, RADAR),
    ("rc_mscxr", "auroc", "ChEX", None): (82.33, None, NOTE),
    ("rc_mscxr", "auroc", "Faster R-CNN + BioViL", None): (76.13, None, NOTE),
    ("rc_cig", "wauroc", "ChEX", None): (70.46, None, NOTE),
    ("rc_cig", "wauroc", "Faster R-CNN", None): (58, None, RADAR),
    ("re_mscxr", "micro_f1_14", "ChEX", None): (49.97, 2.24, PAPER),
    ("re_mscxr", "macro_f1_5", "RGRG", None): (38.34, 2.23, PAPER),
    ("re_mscxr", "micro_f1_5", "BioViL", None): (12.79, 2.25, PAPER),
    ("re_mscxr", "meteor", "ChEX", None): (8.79, 0.54, PAPER),
    ("re_cig", "macro_f1_14", "ChEX", None): (29.13, 0.35, PAPER),
    ("re_cig", "micro_f1_5", "RGRG", None): (31.93, 0.31, PAPER),
    ("re_cig", "meteor", "CheXzero", None): (3.68, 0.04, PAPER),
    ("rg_mimic", "micro_f1_14", "ChEX", None): (52.32, None, NOTE),
    ("rg_mimic", "example_f1_14", "ChEX", None): (58.76, None, NOTE),
    ("rg_mimic", "micro_f1_14", "MAIRA-1", None): (55.7, None, NOTE),
    ("rg_mimic", "micro_f1_14", "RGRG", None): (49.6, None, RADAR),
    ("rg_mimic", "bleu1", "ChEX", None): (29.58, 0.24, PAPER),
    ("rg_mimic", "bleu4", "ChEX", None): (6.52, 0.11, PAPER),
    ("rg_mimic", "meteor", "ChEX", None): (13.26, 0.10, PAPER),
    ("rg_mimic", "rouge_l", "ChEX", None): (19.49, 0.10, PAPER),
    ("rg_mimic", "cider", "ChEX", None): (18.49, 0.79, PAPER),
    ("rg_mimic", "cider", "M2 Trans (NLL+BS+fCEN)", None): (50.9, None, PAPER),
    ("rg_mimic", "rouge_l", "Med-PaLM M 84B", None): (27.29, None, PAPER),
    ("rg_mimic", "bleu1", "ORGAN", None): (40.7, None, PAPER),
    ("rg_mimic", "meteor", "RaDialog-RG", None): (14.0, None, PAPER),
    ("rg_mimic", "rouge_l", "BioViL-T", None): (29.6, None, PAPER),
    ("rg_mimic", "f1_14", "ChEX", "Cardiomegaly"): (66.62, 1.08, PAPER),
    ("rg_mimic", "f1_14", "ChEX", "Pneumothorax"): (17.59, 3.21, PAPER),
    ("rg_mimic", "f1_14", "RGRG", "No Finding"): (63.2, None, PAPER),
    ("rg_mimic", "f1_14", "MAIRA-1", "Support Devices"): (84.5, None, PAPER),
    ("rg_mimic", "f1_14", "ChEX", "Fracture"): (0, None, PAPER),
}


@pytest.mark.parametrize("key", TYPED, ids=lambda key: "-".join(map(str, key[:3])))
def test_published_numbers(key):
    task_name, metric, model, label = key
    value, std, source = TYPED[key]
    entry = find_published(task_name, metric, model, label)[0]
    assert entry.value == (None if value is None else pytest.approx(value / 100, abs=1e-12))
    assert entry.std == (None if std is None else pytest.approx(std / 100, abs=1e-12))
    assert entry.source == source


def test_published_numbers_are_fractions_and_each_once_per_source():
    keys = [(e.task, e.metric, e.model, e.label, e.source) for e in PUBLISHED]
    assert len(set(keys)) == len(keys)
    assert {e.task for e in PUBLISHED} == set(NINE_TASKS)
    for entry in PUBLISHED:
        assert (entry.value is None) <= (entry.ratio is not None)
        assert entry.value is None or 0 <= entry.value < 1
        assert entry.std is None or 0 < entry.std < 0.05
        # what is printed is the value, in the digits of the source
        number = entry.printed.split(" ")[0]
        shown = entry.ratio if number.startswith("×") else entry.value * 100
        assert float(number.lstrip("×")) == pytest.approx(shown, abs=1e-9)
    assert len([e for e in PUBLISHED if e.label is not None]) == 3 * 14


def test_best_baseline_is_the_best_comparable_number():
    assert best_baseline("sg_mscxr", "miou").model == "TransVG, CheXzero backbone"
    assert best_baseline("od_nih8", "map").printed == "11.9"
    assert best_baseline("od_vindr", "map").ratio == 1.29
    # another METEOR and a later study are left out
    assert best_baseline("rg_mimic", "meteor").model == "RGRG"
    assert best_baseline("rg_mimic", "micro_f1_14").model == "MAIRA-1"
    assert best_baseline("anatomy_localization", "miou") is None
    assert chex("od_vindr", "map") is None


def test_ratios_to_chex_are_those_of_the_radar_figure():
    assert ratio_to_chex("od_vindr", "map", "BioViL") == 0.20
    assert ratio_to_chex("od_nih8", "map", "BioViL") == 0.24
    assert ratio_to_chex("re_cig", "micro_f1_14", "RGRG") == pytest.approx(45.26 / 53.34)
    assert ratio_to_chex("sg_mscxr", "miou", "BioViL") == pytest.approx(28.57 / 47.52)
    assert ratio_to_chex("rc_cig", "wauroc", "BioViL") == pytest.approx(0.95, abs=0.005)
    assert ratio_to_chex("rg_mimic", "micro_f1_14", "Faster R-CNN") is None


def test_prompt_sets_fit_together():
    assert len(PROMPT_SETS) == 8
    for row in PROMPT_SETS:
        precision, recall = row.values["micro_precision_14"], row.values["micro_recall_14"]
        assert 2 * precision * recall / (precision + recall) == pytest.approx(row.values["micro_f1_14"], abs=2e-4)
    default = next(row for row in PROMPT_SETS if (row.regions, row.findings) == ("positive", "all"))
    assert default.values["macro_f1_14"] == 0.3269
    assert max(row.values["micro_f1_14"] for row in PROMPT_SETS) == default.values["micro_f1_14"] == 0.5237


# --- reading ---


def broken(change):
    def apply(folder):
        results = make_results(folder)
        change(results)
        return write(folder, results)

    return apply


def _drop_task_key(results):
    del results["tasks"]["sg_mscxr"]["metrics"]


def _drop_value(results):
    del results["tasks"]["sg_mscxr"]["metrics"]["miou"]["value"]


def _text_value(results):
    results["tasks"]["sg_mscxr"]["metrics"]["miou"]["value"] = "0.4"


def _bad_curve(results):
    results["tasks"]["od_vindr"]["curves"]["precision_recall"]["Atelectasis"]["recall"].pop()


def _bad_box(results):
    results["tasks"]["od_vindr"]["examples"][0]["boxes"][0]["box"] = [0, 1]


def _outside_image(results):
    results["tasks"]["od_vindr"]["examples"][0]["image"] = "../secret.png"


def _bad_name(results):
    results["tasks"]["../x"] = results["tasks"].pop("sg_mscxr")


PROBLEMS = {
    "no model": (lambda r: r.pop("model"), "the file lacks 'model'"),
    "no hash": (lambda r: r["model"].pop("sha256"), "'model' lacks 'sha256'"),
    "no schema": (lambda r: r.pop("schema"), "lacks 'schema'"),
    "other schema": (lambda r: r.update(schema=2), "has the schema 2, this version reads 1"),
    "tasks as list": (lambda r: r.update(tasks=[]), "has a list as 'tasks', expected an object"),
    "no metrics": (_drop_task_key, "the task 'sg_mscxr' lacks 'metrics'"),
    "no value": (_drop_value, "the task 'sg_mscxr', metric 'miou', lacks 'value'"),
    "text for number": (_text_value, "metric 'miou', has a text as 'value', expected a number or null"),
    "uneven curve": (_bad_curve, "'Atelectasis', has"),
    "short box": (_bad_box, "example 1, has the box [0, 1], expected four numbers"),
    "image elsewhere": (_outside_image, "names the image '../secret.png'"),
    "task name": (_bad_name, "has the name '../x'"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_damaged_results_are_named(tmp_path, problem):
    change, message = PROBLEMS[problem]
    path = broken(change)(tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(ResultsError, match=re.escape(message)) as caught:
        write_pages(path)
    assert str(path) in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_missing_half_written_and_foreign_files(tmp_path):
    with pytest.raises(ResultsError, match="does not exist"):
        write_pages(tmp_path / "results.json")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(make_results(tmp_path))[:1000], encoding="utf-8")
    with pytest.raises(ResultsError, match="is damaged"):
        write_pages(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="is damaged"):
        write_pages(path)
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ResultsError, match="holds a list, expected an object"):
        write_pages(path)


def test_damaged_image_is_named_and_a_missing_one_left_out(tmp_path):
    results = make_results(tmp_path)
    path = write(tmp_path, results)
    image = tmp_path / results["tasks"]["od_vindr"]["examples"][0]["image"]
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ResultsError, match=re.escape(str(image))):
        write_pages(path)
    image.unlink()
    page = write_pages(path)[0].read_text(encoding="utf-8")
    assert page.count("The image was not stored.") == 1
    # its boxes are still drawn
    first = page[page.index('<article class="example"') :]
    assert first[: first.index("</article>")].count('<rect class="box') == 4


def test_nan_is_undefined(tmp_path):
    results = make_results(tmp_path)
    results["tasks"]["sg_mscxr"]["metrics"]["miou"] |= {"value": float("nan"), "low": float("nan")}
    read = read_results(write(tmp_path, results))
    row = overview(read)[3]
    assert (row.task, row.state) == ("sg_mscxr", "undefined")
    assert read["tasks"]["sg_mscxr"]["metrics"]["miou"]["low"] is None


def test_parts_that_may_be_missing(tmp_path):
    results = make_results(tmp_path)
    for content in results["tasks"].values():
        for key in ("per_class", "settings", "tuning", "notes", "not_computed", "curves", "examples", "seconds"):
            content.pop(key)
        for entry in content["metrics"].values():
            for key in ("mean", "std", "low", "high", "undefined", "official"):
                entry.pop(key, None)
    results["resamples"] = 0
    results["model"] |= {"path": None, "parameters": None, "sha256": "in memory"}
    results.pop("skipped")
    results.pop("seconds")
    written = write_pages(write(tmp_path, results))
    page = parse(written[0].read_text(encoding="utf-8"))
    assert "Explained reports" not in page.words and "14.2" in page.words


def test_no_tasks_at_all(tmp_path):
    results = make_results(tmp_path) | {"tasks": {}, "data": {}, "skipped": {}}
    page = parse(write_pages(write(tmp_path, results))[0].read_text(encoding="utf-8"))
    assert page.words.count("not among the tasks of this run") == len(NINE_TASKS)


# --- rows and formats ---


def test_formats():
    assert [percent(v) for v in (0.3412, 1, 0, None, -0.0312, -0.0001)] == ["34.1", "100.0", "0.0", "–", "−3.1", "0.0"]
    assert interval({"low": 0.31, "high": 0.372}) == "31.0 – 37.2"
    assert interval({"low": None, "high": 0.3}) == "–"
    assert mean_std({"mean": 0.4752, "std": 0.0145}) == "47.52 ± 1.45"
    assert flatten({"a": {"b": 0.1 + 0.2, "c": [1, 2]}, "d": None}) == [
        ("a › b", "0.3"),
        ("a › c", "[1, 2]"),
        ("d", "null"),
    ]


def test_headline_of_twins_and_of_runs_with_few_metrics(tmp_path):
    results = make_results(tmp_path, twins=True)
    assert headline("rg_mimic", results["tasks"]["rg_mimic"]) == "micro_f1"
    assert headline("od_vindr", results["tasks"]["od_vindr"]) == "map"
    only = dict(results["tasks"]["rg_mimic"], metrics={"bleu4": {"value": 0.1}}, not_computed={})
    assert headline("rg_mimic", only) == "bleu4"


def test_overview_has_the_nine_tasks_in_order_and_says_why_numbers_are_missing(tmp_path):
    rows = overview(read_results(write(tmp_path, make_results(tmp_path))))
    assert [row.task for row in rows] == [*NINE_TASKS, "anatomy_localization"]
    states = {row.task: (row.state, row.reason) for row in rows if row.state != "computed"}
    assert states["od_nih8"][0] == "not run"
    assert states["re_cig"] == ("not computed", "needs the CheXbert weights: chex evaluate --labeler chexbert:FOLDER")
    assert len(states) == 2
    assert rows[3].chex.value == 0.4752 and rows[3].baseline.value == 0.5351


def test_sentences_of_the_reference_find_their_boxes():
    example = {
        "boxes": [box((0, 0, 1, 1), "Small mass.", "target", 2)],
        "sentences": [
            {"text": "The heart is mildly enlarged.", "group": 0},
            {"text": "No pleural effusion is seen.", "group": 1},
        ],
        "reference_sentences": [],
        "generated": "",
        "reference": "Small mass. The heart is enlarged. There is a pleural effusion. No edema. No pleural effusion.",
    }
    assert [s.group for s in reference_sentences(example)] == [2, 0, None, None, 1]
    assert split_sentences("Heart size 1.5 cm. No mass? Lungs clear.") == [
        "Heart size 1.5 cm.",
        "No mass?",
        "Lungs clear.",
    ]
    example["reference_sentences"] = [{"text": "Said otherwise.", "group": 1}]
    assert [(s.text, s.group) for s in reference_sentences(example)] == [("Said otherwise.", 1)]


# --- the HTML page ---

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what a reader meets, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.references, self.ids, self.links = [], [], [], [], []
        self.shown, self.groups, self.graphics = [], [], []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        values = dict(attributes)
        self.references += [
            values[name] for name in ("src", "href", "xlink:href", "srcset", "action") if name in values
        ]
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"][1:]] if tag == "a" else []
        self.shown += [values["data-show"]] if "data-show" in values else []
        self.groups += [values["data-group"]] if "data-group" in values else []
        if tag == "svg":
            self.graphics.append(values)

    def handle_endtag(self, tag):
        while self.open[-1] != tag:
            assert self.open[-1] in {"th", "td", "tr"}, f"<{self.open[-1]}> is not closed before </{tag}>"
            self.open.pop()
        self.open.pop()

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def parse(html):
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def test_page_is_well_formed_and_loads_nothing(pages):
    html = pages[1]
    page = parse(html)
    assert page.references
    assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in page.references)
    outside_texts = re.sub(r">[^<]*<", "><", html)
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|fetch\(|XMLHttp|src=", outside_texts)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.links) <= set(page.ids)
    assert html.count("<script>") == 1


def test_texts_are_escaped(pages):
    html = pages[1]
    assert html.count("<script>alert") == 0
    assert "&lt;script&gt;alert(&#x27;no&#x27;)&lt;/script&gt; small mass &amp; &quot;nodule&quot;" in html
    assert "--note &quot;&lt;b&gt;&amp;&quot;" in html


def test_graphics_are_described(pages):
    for graphic in parse(pages[1]).graphics:
        assert graphic.get("aria-hidden") == "true" or (graphic["role"] == "img" and len(graphic["aria-label"]) > 5)


def test_head_says_what_was_evaluated(pages):
    results, html, _, _, _ = pages
    words = parse(html).words
    for part in (
        "chex-stage3",
        "1.01 billion",
        "1,012,345,678",
        results["model"]["sha256"],
        "2026-11-26 09:12:33 UTC",
        "1,000 resamples, seed 2147483647",
        "transformers 5.23.0",
        results["command"],
        *(entry["fingerprint"] for entry in results["data"].values()),
    ):
        assert part in words, part


def test_twins_are_called_synthetic(pages):
    _, html, markdown, _, twins = pages
    words = parse(html).words
    for text in (words, markdown):
        assert ("Synthetic images; not comparable with published numbers" in text) == twins
        assert ("real data" in text) == twins
    # published numbers are muted, and no published mark stands on the scale of a twin
    assert ('class="n pub muted"' in html) == twins
    assert ('class="published"' in html) != twins


def test_numbers_stand_beside_published_ones(pages):
    _, html, _, _, twins = pages
    row = html[html.index('href="#task-sg_mscxr"') :]
    row = " ".join(parse("<table><tr><th><a " + row[: row.index("</tr>")] + "</tr></table>").text)
    for part in ("46.3", "43.5 – 49.2", "47.52 ± 1.45", "53.51 ± 1.53", "TransVG, CheXzero backbone"):
        assert part in row
    words = parse(html).words
    assert "needs prepared/nih-cxr14: chex data prepare nih-cxr14 --raw DIR" in words
    assert "macro_auroc is undefined: finding 8 has no positives." in words
    assert "needs the package radgraph and its weights" in words
    assert "undefined in 3 resamples" in words
    assert "12.10 ± 0.66" in words  # by the official rules
    assert ("needs Java 8 or newer" in words) != twins
    # F1 by label beside the published ones only where the data are the same
    article = html[html.index('id="task-rg_mimic"') :]
    article = article[: article.index("</article>")]
    assert ("66.62 ± 1.08" in article) != twins


def test_sentences_and_boxes_belong_together(pages):
    page = parse(pages[1])
    assert page.shown and set(page.shown) <= set(page.groups)
    html = pages[1]
    article = html[html.index('<article class="example wide"') :]
    article = article[: article.index("</article>")]
    lines = re.findall(r'<li class="t(\w)">(<button type=button data-show="\d+-(\d)")?', article)
    generated, reference = lines[:5], lines[5:]
    assert [(colour, group) for colour, _, group in generated] == [
        ("0", "0"),
        ("1", "1"),
        ("2", "2"),
        ("3", "3"),
        ("n", ""),
    ]
    # edema and heart are answered, the effusion is denied, nobody speaks of the pacemaker
    assert [(colour, group) for colour, _, group in reference] == [("1", "1"), ("0", "0"), ("n", ""), ("n", "")]
    colours = dict(re.findall(r'<rect class="box c(\w)(?: dashed)?" data-group="\d+-(\d)"', article))
    assert all(colour == group for colour, group in colours.items()) and len(colours) == 4
    first = re.search(r'<rect class="box c0" data-group="\d+-0" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', article)
    assert [float(value) for value in first.groups()] == pytest.approx([0.35 * 224, 0.5 * 224, 0.4 * 224], abs=0.06)


def test_failures_say_what_was_missed(pages):
    html = pages[1]
    card = html[html.index('<article class="example"') :]
    words = parse(card[: card.index("</article>") + 10]).words
    assert re.search(r"Pleural effusion 1 box · score 0\.87 · IoU 0\.7\d", words)
    assert "Cardiomegaly 1 box · score 0.31 · not annotated" in words
    assert "Interstitial lung disease (ILD) missed" in words


def test_a_report_without_sentences_still_shows_its_reference(tmp_path):
    results = make_results(tmp_path)
    example = results["tasks"]["rg_mimic"]["examples"][0]
    example |= {"sentences": [], "generated": "", "boxes": [], "reference": "No acute disease. Heart size normal."}
    html = write_pages(write(tmp_path, results))[0].read_text(encoding="utf-8")
    card = html[html.index('<article class="example wide"') :]
    words = parse(card[: card.index("</article>") + 10]).words
    assert "Generated report · Nothing. Reference report · No acute disease. · Heart size normal." in words


def test_lines_can_be_reached_by_keyboard(pages):
    html = pages[1]
    assert html.count("<button type=button data-show=") == html.count("data-show=")
    assert "Escape" in html
    assert html.count("<div class=scroll tabindex=0 role=region aria-label=") >= 8


# --- Markdown and figures ---


def test_markdown_tables_are_regular_and_texts_are_literal(pages):
    _, _, markdown, folder, _ = pages
    blocks = re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE)
    assert len(blocks) >= 20
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert "46.3 | 43.5 – 49.2" in markdown.replace("*", "")
    assert "47.52 ± 1.45" in markdown and "×1.29 (r), Faster R-CNN" in markdown
    for path in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown):
        assert (folder / path).is_file()
    assert not re.search(r"https?://", markdown)


def test_markdown_escapes_markup(tmp_path):
    results = make_results(tmp_path)
    results["tasks"]["sg_mscxr"]["title"] = "a|b <img src=x> *c*\n# d"
    results["tasks"]["sg_mscxr"]["notes"] = ["[x](y) `z`"]
    results["model"]["path"] = "a`b|c"
    markdown = write_pages(write(tmp_path, results))[1].read_text(encoding="utf-8")
    assert r"### a\|b \<img src=x\> \*c\* \# d" in markdown
    assert r"- \[x\](y) \`z\`" in markdown
    assert r"``a`b\|c``" in markdown


def test_figures_are_files_of_their_own(pages):
    _, _, _, folder, twins = pages
    names = sorted(path.name for path in (folder / "figures").iterdir())
    assert names == [
        "od_mscxr-calibration.svg",
        "od_mscxr-precision-recall.svg",
        "od_vindr-calibration.svg",
        "od_vindr-precision-recall.svg",
        "radar.svg",
    ]
    for name in names:
        root = ElementTree.parse(folder / "figures" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and int(root.get("width")) > 100
    texts = "".join(ElementTree.parse(folder / "figures" / "radar.svg").getroot().itertext())
    assert ("ChEX, real images" in texts) == twins


def test_radar_is_divided_by_chex_only_for_real_data(pages):
    results, _, _, _, twins = pages
    axes, series, unit, description = radar_data(results | {"tasks": copy.deepcopy(results["tasks"])})
    assert [axis.name for axis in axes] == [short for short, *_ in NINE_TASKS.values()]
    lines = {line.name: line.values for line in series}
    ours = lines["chex-stage3"]
    if twins:
        assert unit == "percent" and ours[3] == 0.4631
        assert lines["ChEX, real images"][3] == 0.4752
        assert set(lines) == {"chex-stage3", "ChEX, real images"}
    else:
        assert unit == "ratio" and ours[3] == pytest.approx(0.4631 / 0.4752)
        assert ours[0] is None  # nothing to divide by
        assert lines["ChEX, published"] == [1.0] * 9
        assert lines["Faster R-CNN"][0] == 1.29
        assert CHEX not in lines
    assert ours[1] is None and "not run" in axes[1].detail
    assert "SG MS-CXR" in description


def svg(text):
    return ElementTree.fromstring(text)


def test_radar_places_values_and_leaves_gaps():
    axes = [Axis(name) for name in "abcd"]
    drawing = svg(
        radar(
            axes,
            [Series("full", [1, 1, 1, 1], "reference"), Series("gap", [0.5, None, 2.0, 1.0], "ours")],
            description="d",
        )
    )
    paths = {node.get("class"): node.get("d") for node in drawing if node.tag == "path"}
    assert paths["radarline area reference"].endswith("Z")
    assert paths["radarline ours"].count("M") == 2  # c-d and d-a; none at b
    marks = [node for node in drawing if node.get("class") == "mark ours"]
    centre_x, centre_y = 200, 150
    positions = [(float(node.get("cx")) - centre_x, float(node.get("cy")) - centre_y) for node in marks]
    (up_x, up), (down_x, down), (left, left_y) = positions
    assert (up_x, down_x, left_y) == pytest.approx((0, 0, 0), abs=0.1)
    assert down == pytest.approx(-4 * up, abs=0.2) and left == pytest.approx(2 * up, abs=0.2)


def test_radar_draws_values_out_of_range_at_the_rim():
    drawing = svg(radar([Axis("a"), Axis("b"), Axis("c")], [Series("x", [9.0, 0.1, -1.0], "ours")], description="d"))
    marks = [node for node in drawing if node.get("class") == "mark ours"]
    assert float(marks[0].get("cy")) == pytest.approx(150 - 104, abs=0.1)
    assert (float(marks[2].get("cx")), float(marks[2].get("cy"))) == pytest.approx((200, 150), abs=0.1)


def test_small_plots():
    strip = svg(interval_strip(0.5, 0.25, 0.75, 0.6, "d"))
    nodes = {node.get("class"): node for node in strip}
    assert float(nodes["dot"].get("cx")) == 80
    assert nodes["span"].get("d") == "M42.0 9H118.0"
    assert nodes["published"].get("d").startswith("M95.2")
    plot = svg(precision_recall({"recall": [0, 0.5, None, 1], "precision": [1, 0.5, 0.2, None]}, "d"))
    line = next(node for node in plot.iter("path") if node.get("class") == "line ours")
    assert line.get("d") == "M36.0 8.0L89.0 55.0"
    assert "undefined" in "".join(svg(precision_recall({"recall": [], "precision": []}, "d")).itertext())
    many = {"recall": np.linspace(0, 1, 5000).tolist(), "precision": np.linspace(1, 0, 5000).tolist()}
    assert len(precision_recall(many, "d")) < 8000
    bins = svg(calibration({"confidence": [0.5, 0.25, None], "accuracy": [0.5, 0.0, 0.3], "count": [10, 40, 7]}, "d"))
    heights = [float(node.get("height")) for node in bins.iter("rect")]
    assert heights == [32, 8]
    assert "highest: 40" in "".join(bins.itertext())


# --- command line and browser ---


def test_command_makes_the_pages_again(tmp_path):
    path = write(tmp_path, make_results(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "evaluation.page"]
    done = subprocess.run([*command, path], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.endswith(("index.html", "results.md"))]
    assert (tmp_path / "index.html").is_file()


def test_command_errors(tmp_path, capsys):
    assert main([str(tmp_path / "results.json")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert main([str(write(tmp_path, make_results(tmp_path)))]) == 0


def test_pages_need_no_torch():
    code = "import sys, evaluation.page; print(any(name in sys.modules for name in ('torch', 'transformers')))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [360, 900, 1600])
def test_nothing_is_wider_than_the_window(pages, tmp_path, width):
    """The page in a frame of that width, measured by a script, in a browser."""
    shutil.copy(pages[3] / "index.html", tmp_path / "page.html")
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id=f src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id=o></pre><script>'
        "document.getElementById('f').onload = function () {"
        "var page = document.getElementById('f').contentDocument, root = page.documentElement;"
        "var line = page.querySelector('.example.wide [data-show]'); line.click();"
        "var article = line.closest('article');"
        "var result = {width: root.scrollWidth, lit: article.querySelectorAll('rect.lit').length,"
        "asking: article.classList.contains('asking'), pressed: line.getAttribute('aria-pressed')};"
        "page.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}));"
        "result.after = article.querySelectorAll('rect.lit').length;"
        "document.getElementById('o').textContent = JSON.stringify(result); };</script>",
        encoding="utf-8",
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    done = subprocess.run(
        [
            "chromium",
            *flags.split(),
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1700,1000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    result = json.loads(re.search(r"<pre id=\"o\">(\{.*?\})</pre>", done.stdout).group(1))
    assert result == {"width": width, "lit": 1, "asking": True, "pressed": "true", "after": 0}
