"""The files of the Space: its card for a given model, what starts it, and the modules that it needs."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from processing_chex.errors import ChexInputError


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_chex", "processing_chex", "space_app", "training")
ENTRY = ROOT / "space_app" / "app.py"
CARD = ROOT / "space_app" / "README.md"
REQUIREMENTS = ROOT / "space_app" / "requirements.txt"


def space_card(model: str, repo: str) -> str:
    """README.md of the Space for the model of a repository on the Hub: the card of this package, with title and model.

    Args:
        model: `USER/NAME` of the model.
        repo: `USER/NAME` of the Space.
    """
    from huggingface_hub import SpaceCard

    card = SpaceCard(CARD.read_text(encoding="utf-8"))
    card.data.title = repo.split("/")[-1]
    card.data.models = [model]
    card.text = card.text.rstrip() + f"\n\nThis Space asks [{model}](https://huggingface.co/{model}).\n"
    return f"---\n{card.data.to_yaml()}\n---\n{card.text}"


def starter(model: str) -> str:
    """app.py of the Space. The variable `CHEX_MODEL` of the Space comes before the model that is named here."""
    if '"' in model or "\\" in model:
        raise ValueError(f"{model!r} is no name of a repository.")
    return f'''"""Starts the page of ChEX (space_app/app.py) with a model."""

import os


os.environ.setdefault("CHEX_MODEL", "{model}")

from space_app.app import main  # noqa: E402


if __name__ == "__main__":
    main([])
'''


def space_files(model: str, repo: str) -> dict[str, Path | bytes]:
    """Path in the repository -> file or content: everything that the Space needs, and nothing else."""
    files: dict[str, Path | bytes] = {
        "README.md": space_card(model, repo).encode(),
        "app.py": starter(model).encode(),
        "requirements.txt": REQUIREMENTS,
        "LICENSE": ROOT / "LICENSE",
    }
    for path in needed_modules(ENTRY):
        files[path.relative_to(ROOT).as_posix()] = path
    for path in sorted((ROOT / "space_app" / "assets").iterdir()):
        if path.suffix in (".css", ".html", ".js", ".svg"):
            files[path.relative_to(ROOT).as_posix()] = path
    missing = [name for name, content in files.items() if isinstance(content, Path) and not content.is_file()]
    if "LICENSE" in missing:  # an installed package has it elsewhere
        del files["LICENSE"]
        missing.remove("LICENSE")
    if missing:
        raise ChexInputError(f"This installation lacks {', '.join(missing)}: install the package again.")
    return dict(sorted(files.items()))


def needed_modules(entry: Path) -> list[Path]:
    """Files of this repository that a module imports, directly or not, and itself; not those for types alone."""
    found: dict[Path, None] = {}
    waiting = [entry]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] in PACKAGES:
                waiting += filter(None, (_file(parts[:length]) for length in range(1, len(parts) + 1)))
    return sorted(found)


def foreign_modules(paths: list[Path]) -> set[str]:
    """Top-level packages from elsewhere that the files import without an `except ImportError`."""
    names = {name.split(".")[0] for path in paths for name in _imports(path, optional=False)}
    return names - set(PACKAGES) - set(sys.stdlib_module_names)


def _file(parts: list[str]) -> Path | None:
    path = ROOT.joinpath(*parts)
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(path: Path, optional: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it except under `if TYPE_CHECKING`."""
    package = path.relative_to(ROOT).parts[:-1]

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for part in node.orelse:
                yield from visit(part)
            return
        if isinstance(node, ast.Try) and not optional:
            caught = [ast.unparse(handler.type) for handler in node.handlers if handler.type is not None]
            if any("ImportError" in name for name in caught):
                for part in (*node.handlers, *node.orelse, *node.finalbody):
                    yield from visit(part)
                return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


__all__ = ["foreign_modules", "needed_modules", "space_card", "space_files", "starter"]
