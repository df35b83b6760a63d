"""`chex explain` and `chex report` over folders and patterns: what is taken, resumed, written, and told at the end."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from processing_chex import ChexInputError
from space_app.batch import Job, Journal, find_inputs, run_batches
from space_app.cli import app
from space_app.explain import ChexExplainer

from .image_factory import gradient, save_dicom, save_image
from .test_cli import save_tiny_model


ROOT = Path(__file__).parents[1]
FOUND = ["--threshold", "0.2"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), stage=3)


@pytest.fixture
def scans(tmp_path):
    """Five images among other files."""
    folder = tmp_path / "scans"
    (folder / "inner").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    save_image(folder / "b.png", gradient(90, 120))
    save_image(folder / "a.jpg", gradient(60, 60))
    save_dicom(folder / "c", gradient(64, 80, 4095, np.uint16), bits_stored=12)
    save_image(folder / "inner" / "d.PNG", gradient(50, 70))
    save_image(folder / "inner" / "e [1].png", gradient(70, 50))
    save_image(folder / ".hidden" / "no.png", gradient(20, 20))
    save_image(folder / ".no.png", gradient(20, 20))
    (folder / "notes.txt").write_text("hello", encoding="utf-8")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    return folder


NAMES = ["a.jpg", "b.png", "c", "inner/d.PNG", "inner/e [1].png"]


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def explain(images, model_folder, out, *more):
    images = images if isinstance(images, list) else [images]
    return run("explain", *images, "-m", model_folder, "-p", "Heart", "-p", "Nodule", "--out", out, *FOUND, *more)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- inputs -----------------------------------------------------------------------------------------------------------


def test_folders_and_patterns(scans):
    inputs = find_inputs([str(scans)])
    assert inputs.paths == tuple(str(scans / name) for name in NAMES)
    assert (inputs.skipped, inputs.collected) == (3, True)  # .no.png, notes.txt, DICOMDIR; .hidden is not looked into
    assert find_inputs([f"{scans}/*.png"]).paths == (str(scans / "b.png"),)
    assert [Path(path).name for path in find_inputs([f"{scans}/**/*.[pP][nN][gG]"]).paths] == [
        *("b.png", "d.PNG", "e [1].png"),
    ]
    everything = find_inputs([f"{scans}/*"])
    assert sorted(everything.paths) == sorted(inputs.paths)
    assert len(find_inputs([f"{scans}/**"]).paths) == 5  # each once
    one = str(scans / "inner" / "e [1].png")  # a file whose name looks like a pattern
    assert find_inputs([one, str(scans), one]).paths == (one, *(str(scans / name) for name in NAMES[:-1]))
    named = find_inputs([str(scans / "notes.txt"), "missing.png"])
    assert (named.paths, named.skipped, named.collected) == ((str(scans / "notes.txt"), "missing.png"), 0, False)


def test_nothing_is_found(scans, tmp_path, model_folder):
    (tmp_path / "empty").mkdir()
    for argument, message in (
        (tmp_path / "empty", "holds no images (0 other files)"),
        (f"{scans}/*.tif", "matches no images (0 other files)"),
        (f"{scans}/*.txt", "matches no images (1 other files)"),
    ):
        result = run("explain", argument, "--model", model_folder)
        assert result.exit_code == 2 and str(argument) in result.stderr and message in result.stderr
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_folders_without_out(scans, model_folder):
    result = run("explain", scans, "-m", model_folder, "-p", "Heart", "--json", *FOUND)
    assert result.exit_code == 0
    images = [image["image"] for image in json.loads(result.stdout)["images"]]
    assert images == [str(scans / name) for name in NAMES]
    assert result.stderr == "Skipped 3 files that are hidden or no image.\n"
    (scans / "z.png").write_bytes(b"")
    result = run("explain", scans, "-m", model_folder, "-p", "Heart", *FOUND)
    assert result.exit_code == 1 and "z.png is empty" in result.stderr and "b.png (120 x 90 pixels)" in result.stdout


# -- results ----------------------------------------------------------------------------------------------------------


def test_lines_are_the_explanations_in_order(scans, model_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    result = explain(scans, model_folder, out, "--box", "10,10,40,40", "--batch-size", 2)
    assert result.exit_code == 0 and result.stdout == ""
    assert f"Written: {out} (5 images)" in result.stderr and "Skipped 3 files" in result.stderr
    explainer = ChexExplainer.from_pretrained(model_folder)
    for line, name in zip(read_lines(out), NAMES, strict=True):
        expected = explainer.explain(str(scans / name), ["Heart", "Nodule"], [[10, 10, 40, 40]], 0.2).to_dict()
        assert line.keys() == expected.keys() and line["image"] == str(scans / name)
        assert (line["width"], line["height"], line["frame"]) == tuple(
            expected[key] for key in ("width", "height", "frame")
        )
        for answer, same in zip(line["answers"], expected["answers"], strict=True):
            assert (answer["query"], answer["sentence"]) == (same["query"], same["sentence"])
            assert answer["score"] == pytest.approx(same["score"], abs=2e-4)
            assert answer["box"] == pytest.approx(same["box"], abs=0.02)


def test_finished_images_are_left_alone(scans, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    assert explain(scans / "b.png", model_folder, out).exit_code == 0
    first = out.read_bytes()
    seen = []
    answer = Job.answer
    monkeypatch.setattr(
        Job,
        "answer",
        lambda self, explainer, paths, debug: seen.extend(paths) or answer(self, explainer, paths, debug),
    )
    result = explain(scans, model_folder, out)
    assert result.exit_code == 0 and "(5 images, 1 of them before)" in result.stderr
    assert seen == [str(scans / name) for name in NAMES if name != "b.png"]
    assert out.read_bytes().startswith(first) and len(read_lines(out)) == 5
    monkeypatch.setattr(Job, "load", lambda self: pytest.fail("nothing is to be done"))
    assert explain(scans, model_folder, out).exit_code == 0


def test_bad_files_are_named_at_the_end_and_tried_again(scans, model_folder, tmp_path):
    good = (scans / "b.png").read_bytes()
    (scans / "b.png").write_bytes(good[:200])
    save_dicom(scans / "ct.dcm", gradient(9, 9, 99, np.uint16), Modality="CT")
    out = tmp_path / "out.csv"
    result = explain([scans, tmp_path / "missing.png"], model_folder, out, "--box", "10,10,55,40")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[-5] == "4 of 7 images failed:"
    for line, name in zip(lines[-4:], ("b.png", "ct.dcm", "e [1].png", "missing.png"), strict=True):
        assert line.startswith("Error: ") and name in line  # the box does not fit into e
    with out.open(encoding="utf-8") as file:
        assert {Path(row["image"]).name for row in csv.DictReader(file)} == {"a.jpg", "c", "d.PNG"}
    (scans / "b.png").write_bytes(good)
    (scans / "ct.dcm").unlink()
    result = explain(scans, model_folder, out, "--box", "10,10,55,40")
    assert result.exit_code == 1 and "1 of 5 images failed" in result.stderr
    with out.open(encoding="utf-8") as file:
        assert {Path(row["image"]).name for row in csv.DictReader(file)} == {"a.jpg", "b.png", "c", "d.PNG"}


def test_an_error_of_the_program_costs_one_image(scans, model_folder, tmp_path, monkeypatch):
    forward = ChexExplainer.explain_read

    def explode(self, items, *arguments, **options):
        if any(item["image"].endswith("b.png") for item in items):
            raise RuntimeError("out of luck")
        return forward(self, items, *arguments, **options)

    monkeypatch.setattr(ChexExplainer, "explain_read", explode)
    result = explain(scans, model_folder, tmp_path / "out.jsonl")
    assert result.exit_code == 1 and "1 of 5 images failed" in result.stderr
    assert "RuntimeError: out of luck" in result.stderr and "--debug" in result.stderr
    assert [Path(line["image"]).name for line in read_lines(tmp_path / "out.jsonl")] == [
        *("a.jpg", "c", "d.PNG", "e [1].png"),
    ]
    with pytest.raises(RuntimeError, match="out of luck"):
        explain(scans, model_folder, tmp_path / "other.jsonl", "--debug")


def test_table_of_regions(scans, model_folder, tmp_path):
    out = tmp_path / "out.csv"
    assert explain(scans, model_folder, out).exit_code == 0
    lines = read_lines(tmp_path / "out.csv.jsonl")
    expected = [
        (line["image"], answer["query"], *region["box"], region["score"], answer["sentence"])
        for line in lines
        for answer in line["answers"]
        for region in answer["regions"]
    ]
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        rows
        and [
            (
                row["image"],
                row["query"],
                *(float(row[edge]) for edge in ("x0", "y0", "x1", "y1", "score")),
                row["sentence"],
            )
            for row in rows
        ]
        == expected
    )


def test_coco(scans, model_folder, tmp_path, capsys):
    pycocotools = pytest.importorskip("pycocotools.coco")
    out = tmp_path / "out.json"
    assert explain(scans, model_folder, out).exit_code == 0
    coco = pycocotools.COCO(str(out))
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == [str(scans / name) for name in NAMES]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["Heart", "Nodule"]
    lines = read_lines(tmp_path / "out.json.jsonl")
    for image, line in zip(coco.loadImgs(coco.getImgIds()), lines, strict=True):
        assert (image["width"], image["height"]) == (line["width"], line["height"])
        for category, answer in enumerate(line["answers"], start=1):
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]], catIds=[category]))
            assert len(annotations) == len(answer["regions"]) > 0
            for annotation, region in zip(annotations, answer["regions"], strict=True):
                x, y, width, height = annotation["bbox"]
                assert (x, y, x + width, y + height) == pytest.approx(region["box"])
                assert annotation["score"] == region["score"]
                assert annotation["area"] == pytest.approx(width * height, abs=0.01)
                assert annotation["iscrowd"] == 0
    results = coco.loadRes(
        [{k: a[k] for k in ("image_id", "category_id", "bbox", "score")} for a in coco.anns.values()]
    )
    assert len(results.anns) == len(coco.anns)
    capsys.readouterr()
    none = tmp_path / "none.json"
    assert run("explain", scans, "-m", model_folder, "-p", "Heart", "--out", none, "--threshold", 0.99).exit_code == 0
    empty = pycocotools.COCO(str(none))
    assert len(empty.imgs) == 5 and not empty.anns and [cat["name"] for cat in empty.cats.values()] == ["Heart"]


# -- reports ----------------------------------------------------------------------------------------------------------


def test_report_of_one_image(scans, model_folder):
    image = scans / "b.png"
    report = ChexExplainer.from_pretrained(model_folder).report(str(image), 0.2)
    result = run("report", image, "-m", model_folder, *FOUND)
    assert result.exit_code == 0 and result.stderr == ""
    assert f"{image} (120 x 90 pixels)" in result.stdout and "".join(report.text.split()) in "".join(
        result.stdout.split()
    )
    document = json.loads(run("report", image, "-m", model_folder, "--json", *FOUND).stdout)
    assert document["images"] == [report.to_dict()] and document["errors"] == []
    nothing = run("report", image, "-m", model_folder, "--threshold", 0.99, "--select-regions", "none")
    assert nothing.exit_code == 0 and "Nothing is worth a sentence" in nothing.stdout


def test_options_of_reports(scans, model_folder):
    image = str(scans / "b.png")
    explainer = ChexExplainer.from_pretrained(model_folder)
    arguments = ["--preset", "paper", "--findings", "vindr15", "--select-regions", "all", "--order", "anatomy"]
    arguments += ["--prefer", "probability", "--max-sentences", "3", "--no-negatives", "--max-length", "8"]
    result = run("report", image, "-m", model_folder, "--json", *FOUND, *arguments)
    expected = explainer.report(
        image,
        0.2,
        preset="paper",
        findings="vindr15",
        select_regions="all",
        order="anatomy",
        prefer="probability",
        max_sentences=3,
        negatives="drop",
        max_length=8,
    )
    assert json.loads(result.stdout)["images"] == [expected.to_dict()]
    unknown = run("report", image, "-m", model_folder, "--findings", "all of them")
    assert unknown.exit_code == 2 and "chexpert" in unknown.stderr
    long = run("report", image, "-m", model_folder, "--max-length", 500)
    assert long.exit_code == 2 and "at most 48" in long.stderr


def test_reports_of_a_folder(scans, model_folder, tmp_path):
    (scans / "bad.png").write_bytes(b"no image")
    for name in ("out.jsonl", "out.csv"):
        result = run("report", scans, "-m", model_folder, "--out", tmp_path / name, "--batch-size", 3, *FOUND)
        assert result.exit_code == 1 and "1 of 6 images failed" in result.stderr and "bad.png" in result.stderr
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["image"] for line in lines] == [str(scans / name) for name in NAMES]
    explainer = ChexExplainer.from_pretrained(model_folder)
    for line in lines:
        assert line["text"] == explainer.report(line["image"], 0.2).text != ""
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sentences = [(line["image"], sentence) for line in lines for sentence in line["sentences"]]
    assert len(rows) == len(sentences)
    for row, (image, sentence) in zip(rows, sentences, strict=True):
        assert (row["image"], row["text"], row["name"], row["prompt"]) == (
            *(image, sentence["text"], sentence["name"], sentence["prompt"]),
        )
        assert [float(row[edge]) for edge in ("x0", "y0", "x1", "y1")] == sentence["box"]
        assert json.loads(row["regions"]) == [[*region["box"], region["score"]] for region in sentence["regions"]]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_file_holds_results_of_one_kind(scans, model_folder, tmp_path):
    out = tmp_path / "out.jsonl"
    assert explain(scans / "b.png", model_folder, out).exit_code == 0
    before = out.read_bytes()
    for changed, more in (("geometry", ["--geometry", "letterbox"]), ("boxes", ["--box", "1,1,40,40"])):
        result = explain(scans, model_folder, out, *more)
        assert result.exit_code == 2 and f"another {changed}:"[:-1] in result.stderr and "--overwrite" in result.stderr
    assert run("report", scans, "-m", model_folder, "--out", out).exit_code == 2
    other = save_tiny_model(tmp_path / "other", stage=3)
    assert "another model" in explain(scans, other, out).stderr
    assert out.read_bytes() == before
    assert explain(scans / "a.jpg", model_folder, out, "--geometry", "letterbox", "--overwrite").exit_code == 0
    assert [Path(line["image"]).name for line in read_lines(out)] == ["a.jpg"]
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("mine\n", encoding="utf-8")
    result = explain(scans, model_folder, foreign)
    assert result.exit_code == 2 and "not written by this command" in result.stderr
    assert foreign.read_text(encoding="utf-8") == "mine\n"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("out.txt", [], ".jsonl, .csv, .json (COCO)"),
        ("missing/out.jsonl", [], "does not exist"),
        ("out.jsonl", ["--json"], "--out and --json"),
        ("out.jsonl", ["--figure", "a.png"], "--out and --figure"),
        ("out.jsonl", ["--max-length", "500"], "at most 48"),
        ("out.jsonl", ["--prompt", " "], "Prompt 3 is empty"),
        ("out.jsonl", ["--model", "nowhere"], "does not exist"),
    ],
)
def test_wrong_options(scans, model_folder, tmp_path, name, more, message):
    result = explain(scans, model_folder, tmp_path / name, *more)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / name).exists()


def test_half_written_and_damaged_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    with Journal(path, {"a": 1}) as journal:
        journal.append([{"image": "one"}, {"image": "zwei \udcff ü"}])
        with pytest.raises(ChexInputError, match="another run"):
            Journal(path, {"a": 1})
    whole = path.read_bytes()
    for end in (b'{"image": "th', b"{", b'{"image": "three"}'):
        path.write_bytes(whole + end)
        with Journal(path, {"a": 1}) as journal:
            assert journal.repaired and list(journal.finished) == ["one", "zwei \udcff ü"]
            journal.append([{"image": "three"}])
            assert [result["image"] for result in journal] == ["one", "zwei \udcff ü", "three"]
        path.write_bytes(whole)
    path.write_bytes(b'{"image": "on\n' + whole)
    with pytest.raises(ChexInputError, match=r"Line 1 of .*out\.jsonl is damaged"):
        Journal(path, {"a": 1})
    (tmp_path / "out.jsonl.settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(ChexInputError, match="is damaged"):
        Journal(path, {"a": 1})


# -- processes --------------------------------------------------------------------------------------------------------


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "space_app.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_two_processes_give_what_one_gives(scans, model_folder, tmp_path):
    (scans / "bad.png").write_bytes(b"no image")
    for number in range(4):
        save_image(scans / f"f{number}.png", gradient(40 + number, 60))
    for processes in (1, 2):
        process = subprocess.run(
            command("explain", scans, "-m", model_folder, "-p", "Heart", "-b", "5,5,30,30", "--batch-size", 2)
            + ["--out", str(tmp_path / f"{processes}.jsonl"), "--num-processes", str(processes), *FOUND],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(),
            timeout=300,
        )
        assert process.returncode == 1, process.stderr
        assert "1 of 10 images failed" in process.stderr and "bad.png" in process.stderr.splitlines()[-1]
    assert len(read_lines(tmp_path / "1.jsonl")) == 9
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_processes_end_before_the_results_do(scans, model_folder, tmp_path):
    """One that still started when the others had done all the work found its semaphores gone."""
    job = Job("explain", str(model_folder), prompts=("Heart",))
    paths = find_inputs([str(scans)]).paths
    run_batches(job, paths, tmp_path / "out.jsonl", batch_size=2, num_processes=3)
    assert not multiprocessing.active_children()


def test_models_that_fail_in_other_processes_are_reported(scans, model_folder, tmp_path):
    weights = model_folder / "model.safetensors"
    broken = save_tiny_model(tmp_path / "broken", stage=3)
    (broken / "model.safetensors").write_bytes(weights.read_bytes()[:5000])
    job = Job("explain", str(broken), prompts=("Heart",))
    with pytest.raises(ChexInputError, match="cannot be loaded"):
        run_batches(job, find_inputs([str(scans)]).paths, tmp_path / "out.jsonl", batch_size=2, num_processes=2)


def test_killed_at_any_time_and_gone_on_with(scans, model_folder, tmp_path):
    """A real process, killed as soon as it has written something; its last line is then cut as if by the kill."""
    for number in range(25):
        save_image(scans / f"f{number:02}.png", gradient(30 + number % 7, 40))
    out = tmp_path / "out.csv"
    journal = tmp_path / "out.csv.jsonl"
    arguments = command("report", scans, "-m", model_folder, "--batch-size", 1, "--out", out, *FOUND)
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(30)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    content = journal.read_bytes()
    whole = content[: content.rindex(b"\n") + 1]
    last = whole[:-1].rfind(b"\n") + 1
    finished = whole[:last].count(b"\n")
    assert whole.count(b"\n") < 30
    journal.write_bytes(whole[: last + (len(whole) - last) // 2])
    second = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "half-written last line was removed" in second.stderr
    assert f"(30 images, {finished} of them before)" in second.stderr or finished == 0
    names = [Path(line["image"]).name for line in read_lines(journal)]
    assert names == [Path(path).name for path in find_inputs([str(scans)]).paths]
    clean = tmp_path / "clean.csv"
    assert run("report", scans, "-m", model_folder, "--batch-size", 1, "--out", clean, *FOUND).exit_code == 0
    assert clean.read_bytes() == out.read_bytes()


def test_completion_is_offered():
    result = subprocess.run(
        [*command("--show-completion", "bash")[:-2], "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert "--install-completion" in result.stdout
    complete = subprocess.run(
        [sys.executable, "-c", "from space_app.cli import main; main()"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"_CHEX_COMPLETE": "complete_bash", "COMP_WORDS": "chex rep", "COMP_CWORD": "1"},
        timeout=60,
    )
    assert complete.stdout.split() == ["report"]
