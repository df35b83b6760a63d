"""`chex data`: arguments, messages and exit codes; Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from space_app.cli import app
from space_app.data_command import parse_options, raw_folders
from training.data.preparation import PhantomSource, source_class
from training.data.prepared import read_info


ROOT = Path(__file__).parents[1]
SMALL = ["--size", "64", "--num-proc", "1", "--option", "num_train=6", "--option", "num_validation=0"]


def chex(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def own(tmp_path) -> Path:
    """Own data: three images, one of them damaged."""
    folder = tmp_path / "own data=mine"
    folder.mkdir()
    lines = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 40), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        box = {"bbox": [1, 2, 30, 40], "category": "Mass", "phrase": "A mass."}
        lines.append(json.dumps({"image": f"{number}.png", "view": "PA", "objects": [box]}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    damaged = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(damaged[: len(damaged) // 2])
    return folder


class TestPrepare:
    def test_own_data_from_raw_folder_to_sheet(self, own, tmp_path):
        out, sheet = tmp_path / "out", tmp_path / "sheet.png"
        arguments = ["prepare", "own", "--raw", own, "--out", out, "--num-proc", 1, "--size", 32]
        failed = chex(*arguments, code=2)
        assert "1 of the first 3 images (of 3) are unusable" in failed.stderr
        assert not out.exists()
        done = chex(*arguments, "--max-rejected", 50)
        assert "train: 2 images, 1 unusable (see " in done.stdout
        assert read_info(out).splits["train"].records == 2
        found = json.loads(chex("inspect", out, "--json", "--sheet", sheet).stdout)
        assert found["splits"]["train"]["boxes"] == {"Mass": 2}
        assert [row[1] for row in found["rejected"]] == ["2.png"]
        assert PIL.Image.open(sheet).width > 700
        assert "already prepared" in chex(*arguments, "--max-rejected", 50).stdout
        other = chex(*arguments, "--max-rejected", 50, "--size", 36, code=2)
        assert "--overwrite" in other.stderr and read_info(out).size == 32
        chex(*arguments, "--max-rejected", 50, "--size", 36, "--overwrite")
        assert read_info(out).size == 36

    def test_environment_variable_names_the_raw_folder(self, own, tmp_path, monkeypatch):
        monkeypatch.setenv("OWN_DATA_DIR", str(own))
        chex("prepare", "OWN", "--out", tmp_path / "out", "--num-proc", 1, "--max-rejected", 100)
        assert read_info(tmp_path / "out").dataset == "own"

    def test_phantom_needs_no_raw_folder(self, tmp_path):
        chex("prepare", "phantom", "--out", tmp_path / "out", *SMALL, "--option", "num_test=2")
        assert [split.records for split in read_info(tmp_path / "out").splits.values()] == [6, 2]

    def test_missing_raw_data_is_one_paragraph(self, tmp_path, monkeypatch):
        monkeypatch.delenv("VINDR_CXR_DIR", raising=False)
        for arguments in ([], ["--raw", tmp_path]):
            failed = chex("prepare", "vindr_cxr", *arguments, "--out", tmp_path / "out", code=2)
            assert failed.stderr.startswith("Error: VinDr-CXR needs") and failed.stderr.count("\n") == 1
            assert "VINDR_CXR_DIR" in failed.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["mimick"], "There is no data set 'mimick'"),
            (["phantom", "--size", 8], "size must be an integer of at least 32"),
            (["phantom", "--max-rejected", 101], "from 0 to 100"),
            (["phantom", "--option", "seeds=3"], "The phantom has no option 'seeds'. Options: seed=7"),
            (["phantom", "--option", "seed"], "--option seed has no '='"),
            (["phantom", "--option", "seed=x"], "--option seed is a whole number, not 'x'"),
            (["mimic-cxr", "--option", "reports=perhaps"], "--option reports is true or false"),
            (["mimic-cxr", "--raw", "/nowhere"], "there is no folder /nowhere"),
            (["mimic-cxr", "--raw", "jpeg=/tmp"], "no raw download 'jpeg'. It has: jpg, report"),
            (["ms-cxr", "--raw", "jpg=/tmp", "--raw", "jpg=/tmp"], "names the folder of jpg twice"),
            (["phantom", "--raw", "/tmp"], "leave its raw folder away"),
        ],
    )
    def test_mistakes_are_explained(self, tmp_path, arguments, message):
        failed = chex("prepare", *arguments, "--out", tmp_path / "out", code=2)
        assert message in failed.stderr and "unexpected" not in failed.stderr
        assert not (tmp_path / "out").exists()

    def test_unwritable_place_is_explained(self, tmp_path):
        (tmp_path / "file").write_text("", encoding="utf-8")
        failed = chex("prepare", "phantom", *SMALL, "--out", tmp_path / "file" / "out", code=2)
        assert str(tmp_path / "file") in failed.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_is_finished(tmp_path, number):
    out = tmp_path / "out"
    options = ["--size", "64", "--option", "num_train=300", "--option", "num_validation=0", "--option", "num_test=0"]
    command = ["prepare", "phantom", "--out", str(out), *options, "--num-proc"]
    process = subprocess.Popen(
        [sys.executable, "-m", "space_app.cli", "data", *command, "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial-*/shards/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if number == signal.SIGINT:  # a terminal sends it to all processes of the command
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted." in errors and "run the same command again to go on from there" in errors
    assert "Traceback" not in errors and not out.exists()

    said = chex(*command, "1").stdout
    assert "Going on: " in said and read_info(out).splits["train"].records == 300
    assert not list(tmp_path.glob("out.partial-*"))


class TestOtherCommands:
    def test_list_names_sources_variables_and_options(self):
        shown = chex("list").stdout
        for word in ("chest-imagenome", "--raw imagenome=DIR", "MIMIC_CXR_JPG_DIR", "phantom", "num_train=8000"):
            assert word in shown

    def test_check_reports_problems_with_exit_code_2(self, own, tmp_path):
        (own / "1.png").unlink()
        failed = chex("check", "own", "--raw", own, code=2)
        assert "1.png" in failed.stdout
        assert "no raw files" in chex("check", "phantom", code=2).stderr

    def test_check_of_complete_data_succeeds(self, own):
        (own / "2.png").write_bytes((own / "1.png").read_bytes())
        chex("check", "own", "--raw", own)

    def test_download_explains_what_it_does_not_have(self, tmp_path):
        assert "There is no download 'own'" in chex("download", "own", "--out", tmp_path, code=2).stderr

    def test_inspection_of_raw_data_prints_tables(self, own, tmp_path):
        shown = chex("inspect", "own", "--raw", own, "--sheet", tmp_path / "sheet.png", "--images", 2).stdout
        assert "Own data" in shown and "Mass" in shown and "Unusable images: 1" in shown
        assert (tmp_path / "sheet.png").is_file()

    def test_inspection_of_something_else_is_refused(self, tmp_path):
        assert "no prepared folder" in chex("inspect", tmp_path, code=2).stderr
        assert "does not exist" in chex("inspect", tmp_path / "nothing", code=2).stderr
        assert "There is no data set 'nothing'" in chex("inspect", "nothing", code=2).stderr
        failed = chex("inspect", "phantom", "--sheet", tmp_path / "no" / "sheet.png", code=2)
        assert "create it first" in failed.stderr


class TestArguments:
    def test_raw_folders_by_key_and_in_common(self, tmp_path):
        mimic = source_class("mimic_cxr")
        assert raw_folders(mimic, []) == (None, {})
        odd = tmp_path / "jpg=odd"
        odd.mkdir()
        assert raw_folders(mimic, [str(tmp_path), f"report={odd}"]) == (str(tmp_path), {"report_dir": str(odd)})
        assert raw_folders(mimic, [str(odd)]) == (str(odd), {})

    def test_options_take_the_type_of_their_default(self):
        assert parse_options(PhantomSource, ["seed=3", "num-train = 12"]) == {"seed": 3, "num_train": 12}
        assert parse_options(source_class("mimic-cxr"), ["reports=No", "missing=skip"]) == {
            "reports": False,
            "missing": "skip",
        }
