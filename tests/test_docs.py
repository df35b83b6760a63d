"""
The documentation: every command and every Python block is run on a tiny model and tiny data, or parsed with the reason
why it is not run; links, anchors and file names exist; the API page is up to date; the notebook runs.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from space_app.cli import app

from .image_factory import gradient, save_dicom, save_image
from .test_cli import save_tiny_model


ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("pretrain_clip", "stage1", "stage2", "pretrain_generator", "stage3", "finetune")
WEIGHTS, CREDENTIALS = "needs published weights", "needs data that may not be passed on"
LONG = "takes long; tests/test_training.py and tests/test_distributed.py launch all stages"
SEVERAL = "starts several processes; tests/test_evaluation_run.py does"
SERVER = "serves until it is stopped; tests/test_space.py asks it"

# Commands that are parsed and not run: (expression that is found in them, the reason)
NOT_RUN = [
    (r"^make ", "the targets are what CI runs"),
    (r"^(source|export) ", "belongs to a shell"),
    (r"^chex data download", "fetches from other machines; tests/test_download.py has a server"),
    (r"^chex push .*--yes", "uploads; tests/test_push.py has a Hub"),
    (r"^chex convert", WEIGHTS),
    (r"labeler chexbert:|CheXzero.pt|runs/chex/stage3", WEIGHTS),
    (r"^chex data (prepare|check) (mimic-cxr|chest-imagenome|ms-cxr|vindr-cxr|nih-cxr14)", CREDENTIALS),
    (r"^chex data inspect prepared/(ms-cxr|chest-imagenome|vindr-cxr)", CREDENTIALS),
    (r"--tasks (all|od sg)", CREDENTIALS),
    (r"--twins", "nine tasks; tests/test_evaluation_run.py runs them"),
    (r"evaluation/run.py", SEVERAL),
    (r"^(accelerate launch|torchrun) .*training/", LONG),
    (r"^srun", LONG),
    (r"^python -m space_app", SERVER),
]
# Python that is compiled, and its imports resolved, but not run: (page, a part of it, the reason)
PYTHON_NOT_RUN = [
    ("docs/report-text.md", "stanza", "downloads a model"),
    ("docs/labelers.md", "chexbert:", WEIGHTS),
    ("docs/finetune.md", "load_adapter", "needs an adapter; tests/test_finetune.py loads one"),
]
# Where other tests run all blocks of a language on a page, and check more of them.
ELSEWHERE = {
    ("README.md", "python"): "test_pipeline.py",
    ("docs/reports.md", "python"): "test_report_generation.py",
    ("docs/finetune.md", "bash"): "test_finetune.py",
}
# Options that make a command small enough.
SMALLER = [
    ("--num-processes 2", "--num-processes 1"),
    ("data prepare own", "data prepare own --num-proc 1"),
    ("data prepare phantom", "data prepare phantom --num-proc 1 --option num_train=4 --option num_validation=2"
     " --option num_test=2 --overwrite"),
    ("--limit 200", "--limit 2 --bootstrap 5 --sections wording"),
]  # fmt: skip
# What a block takes for granted: (page, a part of it) -> code
PRELUDE = {
    ("docs/metrics.md", "paired_difference"): """
predictions = [{"boxes": [[0, 0, 2, 2]], "scores": [0.9], "labels": [0]}]
other_predictions = [{"boxes": [[0, 0, 2, 1]], "scores": [0.8], "labels": [0]}]
references = [{"boxes": [[0, 0, 2, 2]], "labels": [0]}]
""",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        found.append(Block(name_of(page), text.count("\n", 0, match.start()) + 1, match.group(1), match.group(2)))
    return found


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


BLOCKS = [block for page in PAGES if page != API for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands_of(block: Block) -> list[str]:
    """Its commands, one line each, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [command for command in commands if command]


def reason_not_run(command: str) -> str | None:
    return next((reason for expression, reason in NOT_RUN if re.search(expression, command)), None)


def smaller(command: str) -> str:
    for part, replacement in SMALLER:
        command = command.replace(part, replacement)
    return command


# Parsing


class Parsed(Exception):
    """The arguments were taken; nothing is to be run."""


def parse_chex(arguments: list[str]) -> None:
    """Raises what the command line of `chex` would show."""
    command, context, name = get_command(app), None, "chex"
    while True:
        context = command.make_context(name, list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            break
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
    if name == "evaluate":
        parse_script("evaluation/run.py", arguments)


def stop_after_parsing(parser: argparse.ArgumentParser, given=None, namespace=None) -> None:
    """In place of `ArgumentParser.parse_args`."""
    _, unknown = parser.parse_known_args(given, namespace)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    raise Parsed


def parse_script(path: str, arguments: list[str]) -> None:
    """The options of a script of the repository; of a training stage, the configuration too."""
    stem = Path(path).stem
    assert (ROOT / path).is_file(), f"there is no {path}"
    if path.startswith("training/"):
        from training.loop import parse_arguments

        assert stem in STAGES, f"{path} is no stage"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            config, _ = parse_arguments(stem, arguments, None)
        assert config.stage == stem
        return
    if path == "evaluation/run.py":
        from evaluation.run import build_parser
        from evaluation.tasks.catalog import DATA_SETS, find_tasks

        options = build_parser().parse_args(arguments)
        find_tasks(options.tasks)
        for entry in options.data:
            assert entry.split("=")[0] in DATA_SETS, f"--data {entry}: no such data set"
        return

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
        patch.setattr(sys, "argv", [path, *arguments])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / path), run_name="__main__")


def parse_command(command: str) -> None:
    """Checks a command without running it; raises what is wrong with it."""
    words = [word for word in shlex.split(command.split(" '||' ")[0]) if word != "..."]
    if words[0] == "srun":
        words.pop(0)
    match words:
        case ["make", target, *variables]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), f"no target {target}"
            for variable in variables:
                assert f"$({'if $('}{variable.split('=')[0]})" in makefile, f"the Makefile knows no {variable}"
        case ["source", ".venv/bin/activate"]:
            pass
        case ["export", variable]:
            name = variable.split("=")[0]
            sources = (path.read_text(encoding="utf-8") for path in (ROOT / "training").rglob("*.py"))
            assert any(f'"{name}"' in source for source in sources), f"nothing reads {name}"
        case ["chex", *arguments]:
            if arguments[0] == "evaluate" and "--model" not in arguments:  # part of a command: "chex evaluate ... "
                arguments += ["--model", "runs/demo/model", "--output", "runs/evaluation"]
            parse_chex(arguments)
        case ["python", "-m", "space_app", *arguments]:
            from space_app.app import main

            with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
                patch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
                main(arguments)
        case ["python", script, *arguments]:
            parse_script(script, arguments)
        case ["accelerate", "launch", *arguments]:
            from accelerate.commands.launch import launch_command_parser

            options = launch_command_parser().parse_args(arguments)
            if options.config_file:
                assert (ROOT / options.config_file).is_file(), options.config_file
            parse_script(options.training_script, options.training_script_args)
        case ["torchrun", *arguments]:
            from torch.distributed.run import get_args_parser

            options = get_args_parser().parse_args(arguments)
            parse_script(options.training_script, options.training_script_args)
        case _:
            raise AssertionError("no rule for this command: add one to parse_command")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood(page):
    """Unknown commands, options, overrides and tasks are errors, wherever in the documentation they stand."""
    for block in SHELL:
        if block.page == name_of(page):
            for command in commands_of(block):
                try:
                    parse_command(command)
                except SystemExit as error:
                    assert error.code == 0, f"{block}: {command}"
                except Exception as error:
                    pytest.fail(f"{block}: {command}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("chex explain scan.png --promt Edema", "--promt"),
        ("chex explian scan.png", "explian"),
        ("chex evaluate --model m --output o --tasks od_vindrr", "od_vindrr"),
        ("accelerate launch training/stage1.py init_from=x optimization.bach_size=3", "bach_size"),
        ("accelerate launch training/stage4.py", "stage4"),
        ("torchrun --nproc_per_node 2 training/stage1.py nonsense", "nonsense"),
        ("make demonstration", "demonstration"),
        ("python -m space_app --modell x", "--modell"),
        ("python evaluation/interactivity.py --model m --data d --output o --splitt test", "--splitt"),
        ("wget x", "no rule"),
    ],
)
def test_mistakes_in_commands_are_found(command, mistake, capsys):
    with pytest.raises((Exception, SystemExit)) as error:  # noqa: PT011 - from several parsers
        parse_command(command)
    message = getattr(error.value, "message", "") or str(error.value)
    assert mistake in message + capsys.readouterr().err


def test_commands_stand_in_blocks_that_are_checked():
    starts = ("chex ", "accelerate launch ", "torchrun ", "make ", "export ", "python ")
    for block in BLOCKS:
        if block.language not in ("bash", "python"):
            wrong = [line for line in block.text.splitlines() if line.lstrip("$ ").startswith(starts)]
            assert not wrong, f"{block}: commands belong into a block that begins with ```bash"
    for page in PAGES:
        for line in prose_of(page).splitlines():
            assert not re.match(r"    (chex|accelerate|torchrun|make|python) ", line) or page == API, (page, line)


def inline_code(page: Path) -> list[str]:
    return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose_of(page))]


@pytest.mark.parametrize("page", [page for page in PAGES if page != API], ids=name_of)
def test_commands_in_sentences_exist(page):
    """Of `chex ...` in running text: the commands and the options, since the rest is often left out."""
    for code in inline_code(page):
        words = code.split()
        if words[0] != "chex" or "..." in code and len(words) == 2:
            continue
        command, words = get_command(app), words[1:]
        while words and hasattr(command, "commands"):
            word = words.pop(0)
            if word.startswith("-"):
                words.insert(0, word)
                break
            assert word in command.commands, f"{name_of(page)}: `{code}`: there is no {word}"
            command = command.commands[word]
        if command.name == "evaluate":
            from evaluation.run import build_parser

            known = set(build_parser()._option_string_actions)
        else:
            known = {option for item in command.params for option in (*item.opts, *item.secondary_opts)} | {"--help"}
            known |= {"--install-completion", "--show-completion"}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known, f"{name_of(page)}: `{code}`: {command.name} has no {word}"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_can_be_imported(block):
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name == "stanza" or importlib.util.find_spec(alias.name), f"{block}: no {alias.name}"


def test_lists_of_what_is_not_run_are_not_outdated():
    commands = [command for block in SHELL for command in commands_of(block)]
    for expression, _ in NOT_RUN:
        assert any(re.search(expression, command) for command in commands), f"NOT_RUN: no command has {expression!r}"
    for part, _ in SMALLER:
        assert any(part in command for command in commands), f"SMALLER: no command has {part!r}"
    for page, part, _ in PYTHON_NOT_RUN:
        assert any(block.page == page and part in block.text for block in PYTHON), f"PYTHON_NOT_RUN: {page}, {part!r}"
    for (page, language), test in ELSEWHERE.items():
        assert any((block.page, block.language) == (page, language) for block in BLOCKS)
        source = (Path(__file__).parent / test).read_text(encoding="utf-8")
        assert Path(page).name in source, f"tests/{test} does not name {page}"


# Running


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which everything that the documentation names is there, and tiny."""
    from training.data.preparation import prepare

    folder = tmp_path_factory.mktemp("docs")
    for name in ("demo", "mine-detector"):
        save_tiny_model(folder / "runs" / name / "model", stage=3)
    shutil.copytree(folder / "runs" / "demo" / "model", folder / "runs" / "mine")
    save_image(folder / "scan.png", gradient(128, 160))
    (folder / "scans" / "more").mkdir(parents=True)
    save_image(folder / "scans" / "one.png", gradient(90, 120))
    for path in (folder / "scan.dcm", folder / "scans" / "more" / "two.dcm"):
        save_dicom(path, gradient(128, 160, 4095, np.uint16), bits_stored=12)
    sizes = {"num_train": 4, "num_validation": 2, "num_test": 2, "image_size": 64}
    prepare("phantom", folder / "prepared" / "phantom", num_proc=1, options=sizes)
    for name in ("mine", "vindr-cxr"):
        shutil.copytree(folder / "prepared" / "phantom", folder / "prepared" / name)
    lines = []
    for number, split in enumerate(("train", "train", "validation", "test"), start=1):
        image = f"scans/{number:04d}.png"
        (folder / "mydata" / "scans").mkdir(parents=True, exist_ok=True)
        save_image(folder / "mydata" / image, gradient(100, 100))
        found = {"bbox": [20, 30, 60, 70], "category": "Pleural effusion"}
        lines.append(json.dumps({"image": image, "split": split, "objects": [found]}))
    (folder / "mydata" / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_command(command: str) -> None:
    """In this process and folder, as from a shell; fails if it does."""
    words = shlex.split(smaller(command))
    if words[0] == "chex":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    elif words[:1] == ["python"]:
        module = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        assert module.main(words[2:]) in (0, None), command
    else:
        raise AssertionError(f"no rule how to run {command!r}: add one, or an entry of NOT_RUN with the reason")


def is_run(block: Block) -> bool:
    if (block.page, block.language) in ELSEWHERE:
        return False
    if block.language == "python":
        return not any(block.page == page and part in block.text for page, part, _ in PYTHON_NOT_RUN)
    return block.language == "bash" and any(reason_not_run(command) is None for command in commands_of(block))


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if is_run(block)}))
def test_commands_and_python_run(page, workplace, tmp_path, monkeypatch):
    """All blocks of a page, one after the other; Python shares its names."""
    folder = shutil.copytree(workplace, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict = {"__name__": "docs"}
    for block in BLOCKS:
        if block.page != page or not is_run(block):
            continue
        if block.language == "python":
            for (place, part), code in PRELUDE.items():
                if place == page and part in block.text:
                    exec(code, names)
            try:
                exec(compile(block.text, str(block), "exec"), names)
            except Exception as error:
                raise AssertionError(f"{block} fails with {type(error).__name__}: {error}") from error
            continue
        for command in commands_of(block):
            if reason_not_run(command) is None:
                run_command(command)
                if found := re.search(r"--(?:out|figure|sheet|output) (\S+)", command):
                    assert Path(found.group(1)).exists(), f"{block}: {command}\nwrote no {found.group(1)}"


# Text


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them; headings of one name get numbers."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, count in found.items() for number in range(count)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors_of(linked), f"{name_of(page)} links to {target}, but there is no such heading"


def test_links_of_the_notebook_exist():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)\s]+)\)", "".join(cell["source"])):
                assert (NOTEBOOK.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_that_are_mentioned_exist(page):
    """Paths and dotted names in backticks that begin with a folder or package of the repository."""
    packages = ("modeling_chex", "processing_chex", "training", "evaluation", "space_app")
    folders = tuple(f"{folder}/" for folder in (*packages, "tests", "benchmarks", "docs", ".ci"))
    for code in inline_code(page):
        for word in code.split():
            word = word.strip("(),;").split("#")[0].split("(")[0]
            if word.startswith(folders) and not re.search("[…<]", word):
                assert list(ROOT.glob(word.rstrip("/"))), f"{name_of(page)} names `{word}`, which is not there"
            elif re.fullmatch(rf"({'|'.join(packages)})(\.\w+)+", word):
                assert exists(word), f"{name_of(page)} names `{word}`, which is not there"


def exists(dotted: str) -> bool:
    """A module, or something in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[length:])
    return False


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short_and_name_no_machine(page):
    """Rows of tables cannot be broken, signatures of the API page neither."""
    text = page.read_text(encoding="utf-8")
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        inside ^= line.startswith("```")
        if not line.startswith("|") and not (page == API and inside):
            assert len(line) <= 120, f"{name_of(page)}:{number} has {len(line)} characters"
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users|mnt|data)/", text), "a path of one machine"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        if page.parent.name == "docs" and page.name != "README.md":
            assert f"]({page.name})" in index, f"docs/README.md does not list {page.name}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/README.md)" in readme, "the README does not link to the index"


# Keys and names in the table of the official code


SECTIONS = ("optimization", "objectives", "augmentation", "tracking", "selection", "data")


def has(value: object, keys: list[str]) -> bool:
    """Whether there is `value.key.key`, through dictionaries and attributes."""
    for key in keys:
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif hasattr(value, key):
            value = getattr(value, key)
        else:
            return False
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if page != API], ids=name_of)
def test_keys_of_the_training_configuration_exist(page):
    """`section.key` and `section.key=value` in running text."""
    from training.configuration import CONFIG_DIR, load_config

    path = CONFIG_DIR / "stage2.yaml"
    config = load_config(path)
    section, names = "|".join(SECTIONS), "objective_mode|gradient_checkpointing|mixed_precision|text_feature_dtype"
    for code in inline_code(page):
        if re.fullmatch(rf"({section})(\.[a-z_0-9]+)+", code) and not code.endswith((".md", ".py")):
            assert has(config, code.split(".")), f"{name_of(page)}: training has no key `{code}`"
        elif re.fullmatch(rf"(({section}|model)\.[a-z_.0-9]+|{names})=[^.].*", code) and "..." not in code:
            load_config(path, [code])


def test_keys_of_the_migration_table_exist():
    """Of the training and model configuration, tasks, metrics and environment variables."""
    from evaluation.tasks.catalog import METRICS, TASKS
    from modeling_chex import ChexConfig
    from training.configuration import CONFIG_DIR, load_config

    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    config = load_config(CONFIG_DIR / "stage2.yaml")
    model = ChexConfig()
    checked = 0
    for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text):
        first = key.split(".")[0]
        if first in SECTIONS:
            assert has(config, key.split(".")), f"training has no key {key}"
            checked += 1
        elif first.endswith("_config") and not key.endswith((".yaml", ".json")):
            assert has(model, key.split(".")), f"config.json has no key {key}"
            checked += 1
    assert checked > 40
    tasks, metrics = (
        [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[2])]
        for table in (text[text.index(f"| official {kind} |") :].split("\n\n")[0] for kind in ("task", "metric"))
    )
    assert len(tasks) == 9 and set(tasks) <= set(TASKS)
    known = {name for names in METRICS.values() for name in names}
    assert set(metrics) <= known | {"mean", "std", "value", "low", "high", "per_class"}
    # The sources of data sets name these variables.
    shown = CliRunner().invoke(app, ["data", "list"]).output
    for variable in re.findall(r"^\| `([A-Z_0-9]+_DIR)` \| the same", text, flags=re.MULTILINE):
        assert variable in shown


def test_all_official_keys_are_in_the_migration_table():
    """Those of the official run that is recorded in the tests."""

    def keys(values: object) -> set[str]:
        if not isinstance(values, dict):
            return set()
        skipped = (
            "anatomy_prompts",
            "pathology_pos_prompts",
            "pathology_neg_prompts",
        )  # their keys are names of classes
        return set(values).union(*(keys(value) for name, value in values.items() if name not in skipped))

    (path,) = (ROOT / "tests" / "golden").rglob("experiment_config.yaml")
    official = keys(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert len(official) > 120
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    named = {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}
    assert not official - named


def test_options_of_faq_and_quickstart_have_one_default():
    """The text says that commands take runs/demo/model."""
    for name in ("explain", "report"):
        assert "runs/demo/model" in CliRunner().invoke(app, [name, "--help"]).output


# API page and notebook


def load_api_builder():
    spec = importlib.util.spec_from_file_location("build_api", ROOT / "docs" / "build_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_api_page_is_up_to_date():
    assert API.read_text(encoding="utf-8") == load_api_builder().build_page(), "run `python docs/build_api.py`"


def test_api_page_of_a_small_module(tmp_path):
    builder = load_api_builder()
    (tmp_path / "small.py").write_text(
        'class Box:\n    """A box.\n\n    Args:\n        side: in pixels,\n            at least 1.\n    """\n\n'
        '    def grow(self, by: int = 1, *, twice: bool = False) -> "Box":\n        """Larger.\n\n        Raises:\n'
        '            ValueError: if `by` < 0.\n        """\n\n'
        'def hidden():\n    pass\n\n\n__all__ = ["Box", "hidden"]\n',
        encoding="utf-8",
    )
    (box,) = builder.definitions(tmp_path, "small", None)
    page = builder.describe(box, "small")
    assert "- `side`: in pixels, at least 1." in page and "- `ValueError`: if `by` < 0." in page
    assert "#### Box.grow\n\n```text\ngrow(by: int = 1, *, twice: bool = False) -> 'Box'\n```" in page
    with pytest.raises(KeyError, match="hidden"):
        list(builder.definitions(tmp_path, "small", ("hidden",)))


def notebook_code() -> list[str]:
    """The code cells, of a notebook that follows the format (4.5) and has no outputs."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch(r"[\w-]{1,64}", identifier) for identifier in identifiers)
    for cell in notebook["cells"]:
        expected = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            expected |= {"execution_count", "outputs"}
            assert cell["outputs"] == [] and cell["execution_count"] is None, "clear the outputs"
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == expected and all(isinstance(line, str) for line in cell["source"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebook_on_a_tiny_model(workplace, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(workplace / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(notebook_code()):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert isinstance(names["image"], Image.Image) and len(names["explanation"].answers) == 3
    assert names["more"].query_scores.shape == (1, 2)
    assert "Pleural effusion | present:" in capsys.readouterr().out


@pytest.mark.slow
def test_notebook_trains_the_model_that_is_missing(tmp_path):
    """As for a newcomer who has not run `make demo`: nothing is there."""
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(notebook_code()) + "\n", encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "runs" / "demo" / "model" / "model.safetensors").is_file()
    assert "regions of a query: (1, 1, 3, 4)" in result.stdout
