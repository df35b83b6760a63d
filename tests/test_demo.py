"""The main job on a few images: every step of it, the reuse of what is finished, and the README's example."""

import json
import logging
import re
from pathlib import Path

import pytest
from PIL import Image

from evaluation.demo import STAGES, run_demo


README = Path(__file__).parents[1] / "README.md"
HEADLINES = ("anatomy_miou", "detection_map50", "grounding_miou", "region_auroc", "description_f1", "report_f1")


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, fast=True)
    return folder


def test_results_are_where_the_readme_says(demo_dir):
    metrics = json.loads((demo_dir / "metrics.json").read_text(encoding="utf-8"))
    for name in HEADLINES:
        assert 0 <= metrics[name] <= 1
        assert 0 <= metrics["baselines"][name] <= 1
    page = (demo_dir / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3
    assert not re.search(r"""(?:src|href)=["']?https?://""", page), "the page must not load anything"
    for stage in STAGES:
        assert (demo_dir / "fast" / stage / "model" / "config.json").is_file()
    folder = demo_dir / "fast" / "evaluation"
    tasks = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]
    for name, regions in (("re_mscxr", False), ("re_cig", True), ("rg_mimic", False)):
        left_out = {"meteor", *(("meteor_normal", "meteor_abnormal") if regions else ())}
        reasons = {metric: reason for metric, reason in tasks[name]["not_computed"].items() if "meteor" in metric}
        assert set(reasons) == left_out
        assert all(reason.startswith("left out of the demo") for reason in reasons.values())
    assert "not computed: left out of the demo" in (folder / "results.md").read_text(encoding="utf-8")
    assert "left out of the demo" in (folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("given", "expected"), [(None, 1), ("3", 2)])
def test_threads_of_the_environment_win(tmp_path, monkeypatch, given, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    threads = [2]
    monkeypatch.setattr("torch.set_num_threads", threads.append)

    class Stop(Exception):
        pass

    def stop(name):
        raise Stop

    monkeypatch.setattr("importlib.import_module", stop)
    with pytest.raises(Stop):
        run_demo(tmp_path, fast=True)
    assert threads[-1] == expected


def test_a_second_run_reuses_what_exists_and_says_so(demo_dir, caplog):
    weights = demo_dir / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    with caplog.at_level(logging.WARNING):
        run_demo(demo_dir, fast=True)
    assert weights.stat().st_mtime_ns == before
    reused = [record.getMessage() for record in caplog.records if "reusing" in record.getMessage()]
    assert len(reused) == len(STAGES) + 1


def test_example_of_the_readme(demo_dir, tmp_path, monkeypatch):
    *_, code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "runs/demo/model" in code
    Image.effect_noise((150, 180), 40).save(tmp_path / "scan.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("runs/demo/model", str(demo_dir / "model")), names)
    (answer,) = names["answers"]
    assert answer["prompts"] == ["Pleural effusion", "Right lower lung zone"]
    assert len(answer["boxes"]) == len(answer["sentences"]) == 2
