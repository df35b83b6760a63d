"""
`chex push`: what it would upload, and uploading with the real client of huggingface_hub, in a second process, to a
small Hub on this machine.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard, SpaceCard
from typer.testing import CliRunner

from processing_chex.errors import ChexInputError
from space_app import hub as hub_module
from space_app.cli import app
from space_app.hub import Upload, collect_model, collect_space, human, write_to_folder
from space_app.space_card import ENTRY, foreign_modules, needed_modules

from .hub_server import Fault, HubServer, hub_server
from .image_factory import gradient, save_image
from .test_auto_classes import run_without_package
from .test_cli import save_tiny_model


ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "b" * 34  # looks like one and is none
# Runs `chex` several times in one process, as loading the libraries takes seconds. Reads [[arguments, environment]].
DRIVER = """
import json, os, sys
import huggingface_hub.hf_api  # its log goes to this stream, not to one of those that the runner closes
from typer.testing import CliRunner
from space_app.cli import app
for arguments, environment in json.load(sys.stdin):
    kept = dict(os.environ)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    result = CliRunner().invoke(app, ["push", *arguments])
    os.environ.clear()
    os.environ.update(kept)
    trace = None if result.exception is None or isinstance(result.exception, SystemExit) else repr(result.exception)
    print(json.dumps([result.exit_code, result.stdout, result.stderr, trace]), file=sys.__stdout__)
"""


def environment(hub: HubServer | str, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        kept.pop(name, None)
    return kept | {
        "HF_ENDPOINT": hub if isinstance(hub, str) else hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
    }


def push_all(hub: HubServer | str, home: Path, calls: list[tuple[list[str], dict[str, str | None]]]) -> list[list]:
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(calls),
        env=environment(hub, home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for _, _, stderr, trace in answers:
        assert trace is None and "Traceback" not in stderr, stderr
    return answers


def show(*arguments):
    result = CliRunner().invoke(app, ["push", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def hub():
    with hub_server(TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", stage=3)


@pytest.fixture
def model_folder(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    from training.data.preparation import prepare, source_class

    out = tmp_path_factory.mktemp("data") / "phantom"
    options = {"num_train": 3, "num_validation": 0, "num_test": 0, "image_size": 64}
    prepare(source_class("phantom"), out, size=64, num_proc=1, options=options, say=lambda text: None)
    return out


# What would be uploaded


def test_dry_run_shows_everything_and_uploads_nothing(model_folder, monkeypatch):
    monkeypatch.setattr(hub_module, "push", lambda *args, **kwargs: pytest.fail("uploaded"))
    result = show(model_folder, "--repo", "lab/tiny", "--private")
    assert result.exit_code == 0, result.stderr
    assert "Model repository: lab/tiny (private)" in result.stdout
    upload = collect_model(model_folder, "lab/tiny")
    total = sum(len(hub_module.read(content)) for content in upload.files.values())
    assert f"{len(upload.files)} files, {human(total)}:" in result.stdout
    for name, size in upload.sizes().items():
        assert any(line.split()[0] == name and human(size) in line for line in result.stdout.splitlines() if line)
    assert "pipeline_tag: zero-shot-object-detection" in result.stdout
    assert result.stdout.rstrip().endswith("Nothing was uploaded. Add --yes to upload.")


def test_only_known_files_go_and_the_others_are_named(model_folder):
    strange = {
        "optimizer.bin": "training state",
        "checkpoints/step-10/model.safetensors": "training state",
        "patient_17.dcm": "image: may show a patient",
        "figures/scan.PNG": "image: may show a patient",
        "reports.csv": "data: may tell about patients",
        "history.jsonl": "data: may tell about patients",
        ".env": "hidden, or may hold credentials",
        ".cache/huggingface/token": "hidden, or may hold credentials",
        "steal.py": "code: that of this package goes instead",
        "notes.txt": "not needed",
        "subfolder/config.json": "not needed",
        "model-00001-of-00002.safetensors": "left over: other weight files are used",
    }
    for name in strange:
        (model_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (model_folder / name).write_bytes(b"Jane Doe, 1950-01-01")
    upload = collect_model(model_folder, "lab/tiny")
    assert upload.left_out == strange
    assert not set(strange) & set(upload.files)
    assert all(b"Jane Doe" not in hub_module.read(content) for content in upload.files.values())
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= set(
        upload.files
    )
    assert {"modeling_chex.py", "processing_chex.py", "generator_tokenizer/tokenizer.json"} <= set(upload.files)


def test_code_is_that_of_this_package_and_the_folder_stays_as_it_is(model_folder):
    (model_folder / "modeling_chex.py").write_text("import os\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()}
    upload = collect_model(model_folder, "lab/tiny")
    assert upload.files["modeling_chex.py"] == (ROOT / "modeling_chex" / "modeling_chex.py").read_bytes()
    assert any("1 code files of the folder are of another version" in note for note in upload.notes)
    assert json.loads(upload.files["config.json"])["auto_map"]["AutoModel"] == "modeling_chex.ChexModel"
    assert {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()} == before


def test_configurations_do_not_tell_where_they_came_from(model_folder):
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config["generator_config"]["_name_or_path"] = config["_name_or_path"] = "/home/someone/secret_project/model"
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sent = json.loads(collect_model(model_folder, "lab/tiny").files["config.json"])
    del config["_name_or_path"], config["generator_config"]["_name_or_path"]
    for key in ("auto_map", "custom_pipelines"):
        sent.pop(key), config.pop(key, None)
    assert sent == config


def test_secrets_are_never_uploaded(model_folder):
    config = json.loads((model_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["auth"] = TOKEN
    (model_folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ChexInputError, match=r"tokenizer_config\.json holds what looks like a token of the Hub"
    ) as error:
        collect_model(model_folder, "lab/tiny")
    assert TOKEN not in str(error.value)


def test_card_that_was_written_by_hand_stays(model_folder):
    own = "---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n"
    (model_folder / "README.md").write_text(own, encoding="utf-8")
    upload = collect_model(model_folder, "lab/tiny")
    assert upload.card == own and any("by hand" in note for note in upload.notes)
    assert "## Limitations" in collect_model(model_folder, "lab/tiny", new_card=True).card
    for broken in (
        "# no metadata\n",
        "---\ntags: [a\n---\n",
        "---\nlicense: other\n---\n",
        "---\nlicense: mit\ntags: a\n---\n",
    ):
        (model_folder / "README.md").write_text(broken, encoding="utf-8")
        with pytest.raises(ChexInputError, match=r"metadata of README\.md are not valid"):
            collect_model(model_folder, "lab/tiny")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist|no model folder"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
        (lambda folder: (folder / "processor_config.json").unlink(), r"no processor_config\.json"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), r"no tokenizer_config\.json"),
        (lambda folder: shutil.rmtree(folder / "generator_tokenizer"), "no generator_tokenizer"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"PK"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors"),
    ],
)
def test_incomplete_folders_are_refused(model_folder, damage, message):
    damage(model_folder)
    result = show(model_folder, "--repo", "lab/tiny")
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    with pytest.raises(ChexInputError, match=message):
        collect_model(model_folder, "lab/tiny")


def test_broken_weights_are_refused(model_folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_folder / "model.safetensors")
    name = min(tensors)
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, model_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ChexInputError, match="not finite"):
        collect_model(model_folder, "lab/tiny")


def test_shards_go_together(model_folder):
    from modeling_chex import ChexModel

    model = ChexModel.from_pretrained(model_folder)
    (model_folder / "model.safetensors").unlink()
    model.save_pretrained(model_folder, max_shard_size="50KB")
    (model_folder / "model-00001-of-00099.safetensors").write_bytes(b"old")
    upload = collect_model(model_folder, "lab/tiny")
    index = json.loads((model_folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = set(index["weight_map"].values())
    assert len(shards) > 1 and shards | {"model.safetensors.index.json"} <= set(upload.files)
    assert "model-00001-of-00099.safetensors" in upload.left_out
    (model_folder / min(shards)).unlink()
    with pytest.raises(ChexInputError, match="lacks model-00001"):
        collect_model(model_folder, "lab/tiny")


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "lab/..", "lab/x y", "lab/name.git", ""])
def test_names_of_repositories_are_checked(tiny, repo):
    result = show(tiny, "--repo", repo)
    assert result.exit_code == 2 and "USER/NAME" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--space", "--dataset"], "exclude each other"),
        (["--yes", "--to-folder", "x"], "exclude each other"),
        (["--space", "--results", "x"], "for models alone"),
        (["--space", "--license", "mit"], "Apache-2.0"),
        (["--space"], "is a folder, but a Space loads its model from the Hub"),
        (["--dataset"], "no prepared folder"),
    ],
)
def test_options_that_do_not_fit(tiny, options, message):
    result = show(tiny, "--repo", "lab/tiny", *options)
    assert result.exit_code == 2 and message in result.stderr


def test_no_option_takes_a_token():
    text = CliRunner().invoke(app, ["push", "--help"], env={"COLUMNS": "200"}).output
    assert "--token" not in text and "--to-folder" in text and "Exit codes" in text


def test_rights_are_asked_for_before_anything_is_uploaded(model_folder, monkeypatch):
    pushed = []
    monkeypatch.setattr(hub_module, "push", lambda *args, **kwargs: pushed.append(args) or "address")
    result = show(model_folder, "--repo", "lab/tiny", "--yes")
    assert result.exit_code == 2 and "--rights-checked" in result.stderr and not pushed
    (model_folder / "README.md").write_text("# ChEX, converted from `chex_stage3.pth`\n", encoding="utf-8")
    result = show(model_folder, "--repo", "lab/tiny", "--yes", "--private")
    assert result.exit_code == 2 and "PhysioNet" in result.stderr and not pushed
    assert show(model_folder, "--repo", "lab/tiny", "--yes", "--rights-checked").exit_code == 0 and len(pushed) == 1


# Into a folder


def test_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    upload = Upload("model", "lab/tiny", {"README.md": b"card", "a/b.json": b"{}"})
    target = tmp_path / "out"
    write_to_folder(upload, target)
    assert (target / "a" / "b.json").read_bytes() == b"{}" and sorted(os.listdir(tmp_path)) == ["out"]
    with pytest.raises(ChexInputError, match="--overwrite"):
        write_to_folder(upload, target)
    missing = Upload("model", "lab/tiny", {"README.md": b"new", "x": tmp_path / "nothing"})
    with pytest.raises(FileNotFoundError):
        write_to_folder(missing, target, overwrite=True)
    assert (target / "README.md").read_bytes() == b"card" and sorted(os.listdir(tmp_path)) == ["out"]
    write_to_folder(Upload("model", "lab/tiny", {"README.md": b"new"}), target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["README.md"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ChexInputError, match="not replaced"):
        write_to_folder(upload, tmp_path / "mine", overwrite=True)
    inside = Upload("model", "lab/tiny", {"README.md": target / "README.md"})
    with pytest.raises(ChexInputError, match="lies in"):
        write_to_folder(inside, target, overwrite=True)


# To a Hub


def test_model_arrives_and_its_card_can_be_followed(hub, model_folder, tmp_path):
    """Uploaded in one commit, then loaded from what arrived, by the code of its card, without this package."""
    (model_folder / "patient.dcm").write_bytes(b"secret")
    call = [str(model_folder), "--repo", "lab/tiny", "--yes", "--rights-checked", "--private"]
    ((code, stdout, stderr, _), (again, stdout_again, _, _)) = push_all(hub, tmp_path, [(call, {}), (call, {})])
    assert code == 0, stderr
    assert stdout.rstrip().endswith(f"Published: {hub.url}/lab/tiny")
    repository = hub.repositories["model", "lab/tiny"]
    assert repository.private and repository.commits == ["Upload model with chex push"]
    assert again == 0 and "Everything is there already" in stdout_again
    assert "patient.dcm" not in repository.files and b"secret" not in b"".join(repository.files.values())
    assert repository.files["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert all(header in (None, f"Bearer {TOKEN}") for _, _, header in hub.requests)

    arrived = tmp_path / "arrived"
    for name, content in repository.files.items():
        (arrived / name).parent.mkdir(parents=True, exist_ok=True)
        (arrived / name).write_bytes(content)
    ModelCard.load(arrived / "README.md")
    blocks = repository.files["README.md"].decode().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks).replace("lab/tiny", str(arrived))
    assert "AutoModel" in code and "pipeline(" in code and "chex.report" in code
    save_image(tmp_path / "scan.png", gradient(140, 150))
    run = run_without_package("import sys\n" + code + "\nprint('answers', len(answers[0]))", tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "answers" in run.stdout


def test_what_can_go_wrong_on_the_hub(hub, tmp_path):
    """One process; each call has a repository of its own, for which the Hub fails in another way."""
    space = ["lab/model", "--space", "--yes", "--repo"]
    create, commit = "POST /api/repos/create", "POST /api/spaces/lab/{}/commit/main"
    anonymous = {"HF_TOKEN": None}
    hub.faults = [
        Fault(commit.format("server-error"), 500, "out of order"),
        Fault(commit.format("refused"), 403, "you have no write access"),
        Fault(commit.format("conflict"), 412, "somebody was faster"),
        Fault(commit.format("too-large"), 413, "too large"),
        Fault(commit.format("cut-before"), drop="before", times=1),
        Fault(commit.format("cut-after"), drop="after", times=1),
        Fault("POST /api/spaces/lab/flaky/preupload", 503, "busy", times=1),
        Fault("GET /api/spaces/lab/hidden", 403, "not for you"),
    ]
    names = ["server-error", "refused", "conflict", "too-large", "cut-before", "cut-after", "flaky", "hidden"]
    calls = [([*space, f"lab/{name}"], {}) for name in names]
    calls += [([*space, "lab/wrong"], {"HF_TOKEN": "hf_wrong"}), ([*space, "lab/nobody"], anonymous)]
    calls += [([*space, "lab/cut-after"], {}), ([*space, "lab/server-error"], {})]
    results = push_all(hub, tmp_path, calls)
    seen = dict(zip(names, results, strict=False))

    def one_paragraph(name: str, code: int, *words: str) -> None:
        exit_code, stdout, stderr, _ = seen[name]
        error = stderr.splitlines()[-1]
        assert exit_code == code, stderr
        assert error.startswith("Error: ") and all(word in error for word in words), error
        assert "Published" not in stdout

    one_paragraph("server-error", 1, "HTTP 500", "out of order", "Run the same command again", "created and is empty")
    one_paragraph("refused", 1, "HTTP 403", "you have no write access", "token with write access")
    one_paragraph("conflict", 1, "HTTP 412", "changed by someone else", "somebody was faster")
    one_paragraph("too-large", 1, "HTTP 413", "does not take these files")
    one_paragraph("cut-before", 1, "connection", "Run the same command again", "together or not at all")
    one_paragraph("cut-after", 1, "connection", "the next run looks first")
    one_paragraph("hidden", 1, "HTTP 403", "not for you")
    assert seen["flaky"][0] == 0 and "Published" in seen["flaky"][1], seen["flaky"]
    wrong, nobody, after_cut, after_error = results[len(names) :]
    assert wrong[0] == 1 and "does not accept your token" in wrong[2] and "hf_wrong" not in wrong[2]
    assert nobody[0] == 2 and "hf auth login" in nobody[2]
    # the commit had arrived although its answer was lost; the other one had not
    assert after_cut[0] == 0 and "Everything is there already" in after_cut[1]
    assert len(hub.repositories["space", "lab/cut-after"].commits) == 1
    assert after_error[0] == 1 and "Nothing was changed on the Hub" in after_error[2]
    for name in ("server-error", "refused", "conflict", "too-large", "cut-before"):
        assert set(hub.repositories["space", f"lab/{name}"].files) == {".gitattributes"}, name
    assert hub.count(create) == 7 and ("space", "lab/nobody") not in hub.repositories


def test_offline_and_unreachable(tmp_path, hub):
    arguments = [sys.executable, "-m", "space_app.cli", "push", "lab/m", "--space", "--repo", "lab/s", "--yes"]
    for change, code, words in (
        ({"HF_HUB_OFFLINE": "1"}, 2, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, "The connection to http://127.0.0.1:9 failed"),
    ):
        variables = environment(hub, tmp_path) | change
        run = subprocess.run(arguments, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert run.returncode == code and words in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not hub.requests


def test_existing_repositories_are_replaced_only_when_told(hub, tmp_path):
    call = ["lab/model", "--space", "--yes", "--repo", "lab/page"]
    first, second = push_all(hub, tmp_path, [(call, {}), ([*call, "--private"], {})])
    assert first[0] == 0 and second[0] == 2 and "is public" in second[2]
    repository = hub.repositories["space", "lab/page"]
    assert repository.sdk == "gradio" and not repository.private
    SpaceCard(repository.files["README.md"].decode())
    repository.files |= {"old.txt": b"old", "app.py": b"print()"}
    refused, replaced = push_all(hub, tmp_path, [(call, {}), ([*call, "--overwrite"], {})])
    assert refused[0] == 2 and "--overwrite" in refused[2] and replaced[0] == 0
    assert "old.txt" not in repository.files and b"CHEX_MODEL" in repository.files["app.py"]
    assert set(repository.files) - {".gitattributes"} == set(collect_space("lab/model", "lab/page").files)
    assert len(repository.commits) == 2


def test_dataset_survives_a_kill_and_sends_nothing_twice(hub, phantom, tmp_path):
    arguments = [sys.executable, "-m", "space_app.cli", "push", str(phantom), "--dataset", "--repo", "lab/p", "--yes"]
    stop = threading.Event()
    stalled = Fault("POST /api/datasets/lab/p/commit", wait=stop, drop="before", times=1)
    stalled_upload = Fault("PUT /lfs/", wait=stop, drop="before", times=1)
    hub.faults = [stalled_upload]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            arguments, env=environment(hub, tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    interrupted = start()
    assert stalled_upload.reached.wait(120)
    time.sleep(0.5)
    interrupted.send_signal(signal.SIGINT)
    _, stderr = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and b"Stopped" in stderr and b"Traceback" not in stderr, stderr
    assert set(hub.repositories["dataset", "lab/p"].files) == {".gitattributes"} and not hub.objects

    hub.faults = [stalled]
    killed = start()
    assert stalled.reached.wait(120)
    killed.kill()
    killed.communicate(timeout=60)
    stop.set()
    sent = hub.count("PUT /lfs/")
    assert len(hub.objects) == 1 and not hub.repositories["dataset", "lab/p"].commits

    ((code, stdout, stderr, _),) = push_all(hub, tmp_path, [(arguments[4:], {})])
    assert code == 0, stderr
    assert hub.count("PUT /lfs/") == sent and stdout.rstrip().endswith(f"{hub.url}/datasets/lab/p")
    files = hub.repositories["dataset", "lab/p"].files
    assert set(files) == {".gitattributes", "README.md", "manifest.json", "data/train-00000-of-00001.parquet"}
    DatasetCard(files["README.md"].decode())


def test_dataset_lost_connections_are_tried_again(hub, phantom, tmp_path):
    hub.faults = [Fault("PUT /lfs/", drop="before", times=1), Fault("PUT /lfs/", 500, "busy", times=1)]
    call = [str(phantom), "--dataset", "--repo", "lab/p", "--yes"]
    ((code, _, stderr, _),) = push_all(hub, tmp_path, [(call, {})])
    assert code == 0, stderr
    assert hub.count("PUT /lfs/") == 3 and len(hub.repositories["dataset", "lab/p"].commits) == 1


# The Space


def test_space_runs_from_its_own_files(tiny, tmp_path):
    """What is uploaded is written to a folder, and its app.py started there with the tiny model."""
    result = show("lab/model", "--space", "--repo", "lab/page", "--to-folder", tmp_path / "space")
    assert result.exit_code == 0, result.stderr
    code = """
import os, pathlib, runpy
import modeling_chex, processing_chex, space_app, training
here = pathlib.Path.cwd().resolve()
for package in (modeling_chex, processing_chex, space_app, training):
    assert pathlib.Path(package.__file__).resolve().is_relative_to(here), package.__file__
runpy.run_path("app.py", run_name="__main__")
"""
    with hub_server(TOKEN) as unused:
        port = unused.url.rsplit(":", 1)[1]  # free again after the block
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"CHEX_MODEL": str(tiny), "GRADIO_SERVER_PORT": port, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    log = tmp_path / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path / "space", env=variables, stdout=output, stderr=output
        )
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        page = ""
        for _ in range(240):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            try:
                with opener.open(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                    page = answer.read().decode()
                break
            except OSError:
                time.sleep(0.5)
        assert "ChEX" in page
    finally:
        process.kill()
        process.wait()


def test_requirements_of_the_space_name_what_its_files_import():
    lines = (ROOT / "space_app" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = {line.split(">")[0].strip() for line in lines if line and not line.startswith("#")}
    imported = foreign_modules(needed_modules(ENTRY))
    assert {"PIL": "pillow", "gradio": "the SDK"}.keys() <= imported
    assert {{"PIL": "pillow"}.get(name, name) for name in imported} - {"gradio"} <= named
    assert "torchvision" not in named
