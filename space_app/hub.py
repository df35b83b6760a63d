"""
What goes to the Hub, and sending it there. Files are chosen by an allow-list; nothing else leaves the machine, and all
files of an upload appear in one commit or not at all.
"""

import hashlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from processing_chex.errors import ChexInputError


if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

Content = Path | bytes
KINDS = ("model", "space", "dataset")
# Files of a model folder that may leave the machine; `*.py` come from this package instead.
MODEL_FILES = re.compile(
    r"(config|generation_config|processor_config|preprocessor_config)\.json"
    r"|(generator_tokenizer/)?(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(generator_tokenizer/)?merges\.txt"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|LICENSE(\.txt|\.md)?"
)
# Reasons for what stays, by what it looks like; the first that fits is told.
STAYS = (
    (r"(^|/)checkpoint|optimizer|scheduler|random_states|\.(pt|pth|bin|ckpt|pkl|npz|npy|distcp)$", "training state"),
    (r"\.(dcm|dicom|png|jpe?g|tiff?|bmp|webp|pgm)$", "image: may show a patient"),
    (r"\.(csv|tsv|jsonl|parquet|arrow|xml|xlsx?|db|sqlite)$", "data: may tell about patients"),
    (r"(^|/)\.|token(s)?$|\.netrc|secret|credential|\.env|\.pem$|\.key$", "hidden, or may hold credentials"),
    (r"\.py$", "code: that of this package goes instead"),
    (r"(^|/)adapter/", "adapter: its weights are in the model already"),
)
SECRETS = (
    ("a token of the Hub", re.compile(rb"\bhf_[A-Za-z0-9]{20,}")),
    ("a private key", re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("an access key of AWS", re.compile(rb"\bAKIA[0-9A-Z]{16}\b")),
)
# Keys of configurations in which Transformers notes where something was loaded from.
PATH_KEYS = ("_name_or_path", "name_or_path")
NETWORK_MODULES = {"httpx", "httpx2", "httpcore", "httpcore2"}
KNOWN_METADATA = {"format", "total_size", "total_parameters"}


class UploadError(RuntimeError):
    """The Hub refused or failed; the message says what is there now and what to do."""


@dataclass(frozen=True)
class Upload:
    """
    What would be uploaded.

    Attributes:
        kind: "model", "space" or "dataset".
        repo: `USER/NAME`.
        files: Path in the repository -> file or content, sorted.
        left_out: Path in the folder -> why it stays.
        notes: What the user should know, in sentences.
        restricted: Why the rights must be confirmed before it may be uploaded, or None.
    """

    kind: str
    repo: str
    files: Mapping[str, Content]
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    restricted: str | None = None

    @property
    def card(self) -> str:
        return read(self.files["README.md"]).decode()

    def sizes(self) -> dict[str, int]:
        """Path in the repository -> bytes."""
        return {name: size_of(content) for name, content in self.files.items()}


def read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def size_of(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def check_repo_name(repo: str) -> str:
    """
    `USER/NAME` as it is.

    Raises:
        ChexInputError: It is no such name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ChexInputError(f"{repo!r} is no name of a repository ({error}): write USER/NAME.") from error
    if repo.count("/") != 1:
        raise ChexInputError(f"{repo!r} names no user or organisation: write USER/NAME.")
    return repo


# What is uploaded


def collect_model(
    folder: str | Path,
    repo: str,
    results: str | Path | None = None,
    run: str | Path | None = None,
    licence: str | None = None,
    new_card: bool = False,
) -> Upload:
    """
    A model folder, after it was loaded and found complete: its allowed files, the code of this package, and a card.

    Args:
        folder: As `save_pretrained`, training or `chex convert` write it.
        repo: `USER/NAME` on the Hub.
        results, run: See `model_facts.read_facts`.
        licence: Of the weights, an identifier of the Hub; by default what is known of the data decides.
        new_card: Replace a card that somebody wrote by hand.

    Raises:
        ChexInputError: The folder is incomplete, damaged or holds something secret.
    """
    from space_app.model_card import MARK, model_card
    from space_app.model_facts import read_facts

    folder = Path(folder)
    check_repo_name(repo)
    files, left_out = _choose(folder)
    _check_model(folder)
    facts = read_facts(folder, results, run)
    notes = list(facts.notes)
    code, configurations = _with_code(folder, files)
    files.update(configurations)
    files.update(code)
    notes += _changed_code(folder, code)
    left_out = {name: reason for name, reason in left_out.items() if name not in code}
    card = model_card(facts, repo, licence)
    own = folder / "README.md"
    if own.is_file() and not new_card:
        text = own.read_text(encoding="utf-8", errors="replace")
        if MARK not in text and "converted from `" not in text:
            card = text
            notes.append("README.md was written by hand and goes as it is; --new-card writes another one.")
    check_card(card, "model")
    files["README.md"] = card.encode()
    metadata = _unknown_metadata(files)
    if metadata:
        notes.append(f"The weight files hold metadata that go with them: {', '.join(metadata)}.")
    _check_secrets(files)
    restricted = None
    if not facts.free and licence is None:
        restricted = (
            "these weights were trained on credentialed data (PhysioNet), whose terms forbid passing them on freely"
            if facts.credentialed
            else "it is not known what all of the training data of these weights allow"
        )
    return Upload("model", repo, dict(sorted(files.items())), left_out, tuple(dict.fromkeys(notes)), restricted)


def collect_space(model: str, repo: str) -> Upload:
    """
    The Space for a model on the Hub.

    Args:
        model: `USER/NAME` of the model.
        repo: `USER/NAME` of the Space.

    Raises:
        ChexInputError: A name is no name of a repository, or the installation is incomplete.
    """
    from space_app.space_card import space_files

    check_repo_name(repo)
    if Path(model).is_dir():
        raise ChexInputError(
            f"{model} is a folder, but a Space loads its model from the Hub: push the folder first, and name its "
            "repository."
        )
    check_repo_name(model)
    files = space_files(model, repo)
    check_card(read(files["README.md"]).decode(), "space")
    return Upload("space", repo, files, notes=("The hardware of the Space is chosen in its settings on the Hub.",))


def collect_dataset(folder: str | Path, repo: str, licence: str | None = None) -> Upload:
    """
    A prepared phantom, after its files were compared with their checksums.

    Raises:
        ChexInputError: The folder is no prepared phantom, or damaged.
    """
    from space_app.dataset_card import dataset_card
    from training.data.prepared import MANIFEST, check_folder, read_info

    folder = Path(folder)
    check_repo_name(repo)
    try:
        info = read_info(folder)
        if info.dataset != "phantom":
            raise ChexInputError(
                f"{folder} holds {info.title}: only the phantom is published. Other data belong to those who gave "
                "them to you."
            )
        check_folder(folder, info, hashes=True)
    except (ValueError, OSError) as error:
        raise ChexInputError(str(error)) from error
    files: dict[str, Content] = {shard.file: folder / shard.file for shard in info.shards}
    files[MANIFEST] = folder / MANIFEST
    card = dataset_card(folder, info, repo, licence)
    check_card(card, "dataset")
    files["README.md"] = card.encode()
    left_out = {
        path.relative_to(folder).as_posix(): "not in the manifest"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in files
    }
    return Upload("dataset", repo, dict(sorted(files.items())), left_out)


def check_card(card: str, kind: str) -> None:
    """
    What can be checked of a card without the Hub: the block of metadata, and the values that the Hub restricts.

    Raises:
        ChexInputError: The metadata are missing or not valid.
    """
    import yaml
    from huggingface_hub import DatasetCard, ModelCard, SpaceCard

    try:
        block = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n", card, flags=re.DOTALL)
        data = yaml.safe_load(block.group(1)) if block is not None else None
        if not isinstance(data, dict):
            raise ValueError("there is no block of metadata between --- and --- at its start")
        {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}[kind](card)
        if not isinstance(data.get("license"), str):
            raise ValueError("license is missing")
        if data.get("license") == "other" and kind == "model" and not data.get("license_name"):
            raise ValueError("license: other needs license_name")
        for key in ("tags", "datasets", "metrics", "models"):
            value = data.get(key)
            if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise ValueError(f"{key} is no list of words")
        if kind == "space" and (data.get("sdk"), data.get("app_file")) != ("gradio", "app.py"):
            raise ValueError("sdk must be gradio and app_file app.py")
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ChexInputError(
            f"The metadata of README.md are not valid ({reason}): correct them, or write a new card with --new-card."
        ) from error


def _choose(folder: Path) -> tuple[dict[str, Content], dict[str, str]]:
    """(allowed files, the others with the reason why they stay)."""
    from space_app.model_facts import weight_files

    if not folder.is_dir():
        raise ChexInputError(f"There is no model folder {folder}: name one, such as runs/demo/model.")
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(folder).as_posix()
        if MODEL_FILES.fullmatch(name) and path.is_file():
            files[name] = path
        elif name != "README.md" and "__pycache__" not in path.parts:
            left_out[name] = next((why for look, why in STAYS if re.search(look, name.lower())), "not needed")
    used = {path.name for path in weight_files(folder)}
    for name in [name for name in files if name.startswith("model") and name not in used]:
        if name.endswith(".safetensors") or "model.safetensors" in used:  # the index stays with its shards
            del files[name]
            left_out[name] = "left over: other weight files are used"
    return files, left_out


def _check_model(folder: Path) -> None:
    """Load the model as a user would; every weight must be there and finite."""
    import torch

    from space_app.explain import load_model

    model, _ = load_model(folder, sentences=False)
    broken = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise ChexInputError(
            f"The weights in {folder} are broken: {broken[0]} and {len(broken) - 1} other tensors hold values that "
            "are not finite. Train or convert the model again."
        )


def _with_code(folder: Path, files: Mapping[str, Content]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """
    (the code of this package, the configurations that name it), which `trust_remote_code` needs. Configurations come
    without the paths that they were loaded from.
    """
    from modeling_chex import ChexModel, add_code
    from processing_chex import ChexImageProcessor, ChexProcessor

    with tempfile.TemporaryDirectory() as name:
        stage = Path(name)
        for file in [name for name in files if name.endswith(".json") and not name.endswith(".index.json")]:
            (stage / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / file, stage / file)
        add_code(stage, ChexModel, ChexProcessor, ChexImageProcessor)
        code = {path.name: path.read_bytes() for path in stage.glob("*.py")}
        configurations = {}
        for file in files:
            if file.split("/")[-1] in ("tokenizer.json", "vocab.json") or not (stage / file).is_file():
                continue
            content = json.loads((stage / file).read_text(encoding="utf-8"))
            configurations[file] = (json.dumps(_without_places(content), indent=2, sort_keys=True) + "\n").encode()
    return code, configurations


def _without_places(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_places(value) for key, value in content.items() if key not in PATH_KEYS}
    if isinstance(content, list):
        return [_without_places(value) for value in content]
    return content


def _changed_code(folder: Path, code: Mapping[str, bytes]) -> list[str]:
    changed = [
        name for name, content in code.items() if (folder / name).is_file() and (folder / name).read_bytes() != content
    ]
    if not changed:
        return []
    return [f"{len(changed)} code files of the folder are of another version; those of this package go instead."]


def _unknown_metadata(files: Mapping[str, Content]) -> list[str]:
    from space_app.model_facts import read_header

    names: set[str] = set()
    for name, content in files.items():
        if name.endswith(".safetensors") and isinstance(content, Path):
            names |= set(read_header(content).get("__metadata__") or ()) - KNOWN_METADATA
    return sorted(names)


def _check_secrets(files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        if name.endswith(".safetensors"):
            continue
        text = read(content)
        for what, pattern in SECRETS:
            if pattern.search(text):
                raise ChexInputError(f"{name} holds what looks like {what}: remove it. Nothing was uploaded.")


# Where it goes


def write_to_folder(upload: Upload, target: str | Path, overwrite: bool = False) -> None:
    """
    Write what would be uploaded into a new folder, which appears when it is complete.

    Raises:
        ChexInputError: The folder is there already and holds something.
    """
    target = Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            raise ChexInputError(f"{target} is there already: name another folder, or replace it with --overwrite.")
        if not (target.is_dir() and (target / "README.md").is_file()):
            raise ChexInputError(f"{target} was not written by this command and is not replaced: name another folder.")
    for content in upload.files.values():
        if isinstance(content, Path) and content.resolve().is_relative_to(target.resolve()):
            raise ChexInputError(f"{content} lies in {target}, which would be replaced: name another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    suffix = secrets.token_hex(4)
    partial, replaced = (target.parent / f".{target.name}.{suffix}.{kind}" for kind in ("partial", "replaced"))
    try:
        for name, content in upload.files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                shutil.copyfile(content, partial / name)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def push(
    upload: Upload, private: bool, overwrite: bool = False, message: str | None = None, say: Callable = print
) -> str:
    """
    Upload in one commit; returns the address of the repository.

    The login is that of huggingface_hub (`hf auth login`, or the variable HF_TOKEN). Large files are sent first; those
    that the Hub has already, for instance from an upload that was interrupted, are not sent again. Files of the
    repository that are not in the upload are deleted with `overwrite`, in the same commit.

    Raises:
        ChexInputError: Not logged in, offline, or the repository holds something else and `overwrite` is not set.
        UploadError: The Hub refused, failed or could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ChexInputError("HF_HUB_OFFLINE is set: unset it to upload, or use --to-folder.")
    token = get_token()
    if not token:
        raise ChexInputError(
            "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token with write access "
            "(https://huggingface.co/settings/tokens)."
        )
    api = HfApi()
    created = False
    step = "asking who you are"
    try:
        api.whoami()
        step = f"looking at {upload.repo}"
        there, parent, is_private = _look(api, upload)
        if there is not None:
            if private and not is_private:
                raise ChexInputError(
                    f"{upload.repo} exists and is public: make it private in its settings, or leave --private away."
                )
            if is_private and not private:
                say(f"{upload.repo} is private and stays so.")
            if _same_content(upload.files, there):
                say("Everything is there already: nothing was uploaded.")
                return address(api, upload)
            if there and not overwrite:
                others = ", ".join(sorted(there)[:3])
                raise ChexInputError(
                    f"{upload.repo} exists and holds other files ({len(there):,}, such as {others}): choose another "
                    "name, or replace its content with --overwrite. Earlier versions stay in its history."
                )
        else:
            step = f"creating {upload.repo}"
            api.create_repo(
                upload.repo,
                repo_type=upload.kind,
                private=private,
                space_sdk="gradio" if upload.kind == "space" else None,
            )
            created = True
            there, parent, _ = _look(api, upload)
        step = "uploading"
        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in upload.files.items()
        ]
        operations += [CommitOperationDelete(name) for name in sorted(set(there or ()) - set(upload.files))]
        api.create_commit(
            upload.repo,
            operations,
            commit_message=message or f"Upload {upload.kind} with chex push",
            repo_type=upload.kind,
            parent_commit=parent,
        )
    except ChexInputError:
        raise
    except KeyboardInterrupt:
        raise
    except Exception as error:
        raise UploadError(_explain(error, step, upload, created, token)) from error
    return address(api, upload)


def address(api: "HfApi", upload: Upload) -> str:
    part = "" if upload.kind == "model" else f"{upload.kind}s/"
    return f"{api.endpoint}/{part}{upload.repo}"


def _look(api: "HfApi", upload: Upload) -> tuple[dict[str, "RepoFile"] | None, str | None, bool]:
    """(files of the repository without .gitattributes, its last commit, whether it is private); None if not there."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = api.repo_info(upload.repo, repo_type=upload.kind)
    except RepositoryNotFoundError:
        return None, None, False
    tree = api.list_repo_tree(upload.repo, repo_type=upload.kind, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path != ".gitattributes"}
    return files, info.sha, bool(info.private)


def _same_content(files: Mapping[str, Content], there: Mapping[str, "RepoFile"]) -> bool:
    if set(files) != set(there):
        return False
    if any(size_of(content) != there[name].size for name, content in files.items()):
        return False
    return all(_has_digest(content, there[name]) for name, content in files.items())


def _has_digest(content: Content, entry: "RepoFile") -> bool:
    """Large files are known by SHA-256, others by the SHA-1 of git."""
    digest = hashlib.sha256() if entry.lfs is not None else hashlib.sha1(f"blob {size_of(content)}\0".encode())
    for block in [content] if isinstance(content, bytes) else _blocks(content):
        digest.update(block)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs is not None else entry.blob_id)


def _blocks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _explain(error: BaseException, step: str, upload: Upload, created: bool, token: str) -> str:
    """One paragraph: what happened, what is there now, what to do."""
    status, said = _status(error)
    left = f" {upload.repo} was created and is empty." if created else " Nothing was changed on the Hub."
    again = "Run the same command again: what has arrived is not sent a second time."
    if status == 401:
        text = (
            f"The Hub does not accept your token while {step}. Log in again with `hf auth login`, or set HF_TOKEN "
            "to a token with write access."
        )
    elif status in (402, 403):
        text = (
            f"You may not do this on the Hub while {step} (HTTP {status}): {said} Use a token with write access, and "
            "your own name or an organisation in which you may write."
        )
    elif status in (409, 412):
        text = f"The repository was changed by someone else while {step} (HTTP {status}): {said} {again}"
    elif status in (400, 413, 422):
        text = f"The Hub does not take these files while {step} (HTTP {status}): {said}"
    elif status == 404:
        text = f"The Hub does not find {upload.repo} while {step}: check the name, and whether your token may write."
    elif status is not None:
        text = f"The Hub failed while {step} (HTTP {status}): {said} {again}"
    elif _is_network(error):
        text = f"The connection to {_endpoint()} failed while {step} ({_chain(error)}). Check the network. {again}"
        if step == "uploading":
            left = " All files appear together or not at all; the next run looks first which it is."
    else:
        text = f"The upload failed while {step}: {_chain(error)}. {again}"
    return " ".join((text + left).replace(token, "***").split())


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> tuple[int | None, str]:
    """(HTTP status, what the Hub said) of an error or what it came from."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if response is not None and getattr(response, "status_code", None):
            said = getattr(cause, "server_message", None) or "the Hub gives no reason"
            return int(response.status_code), str(said).rstrip(".") + "."
    return None, ""


def _is_network(error: BaseException) -> bool:
    for cause in _causes(error):
        modules = {cls.__module__.split(".")[0] for cls in type(cause).__mro__}
        if isinstance(cause, (ConnectionError, TimeoutError)) or modules & {
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
        }:
            return True
    return False


def _chain(error: BaseException) -> str:
    last = list(_causes(error))[-1]
    return f"{type(last).__name__}: {last}" if str(last) else type(last).__name__


def human(size: int) -> str:
    """Bytes in the unit that gives one to three digits."""
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


__all__ = [
    "Upload",
    "UploadError",
    "check_card",
    "check_repo_name",
    "collect_dataset",
    "collect_model",
    "collect_space",
    "human",
    "push",
    "write_to_folder",
]
