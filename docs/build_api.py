"""
Writes docs/api.md from the docstrings of the public classes and functions; --check says whether it is up to date.

    python docs/build_api.py [--check]

The sources are read, not imported, so that nothing has to be installed and the page does not depend on versions.
"""

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
WIDTH = 116
SECTIONS = ("Args", "Arguments", "Attributes", "Returns", "Raises", "Yields")

INTRODUCTION = """# API

Classes and functions for use from Python, with what their docstrings say. Written by `docs/build_api.py`; edit the
docstrings, not this page. Methods that are inherited from Transformers are not listed. [concepts.md](concepts.md)
explains the words, [quickstart.md](quickstart.md) shows most of it in use.
"""

# Heading -> (module, names or None for all that its `__all__` offers and that have a docstring)
CONTENTS: dict[str, list[tuple[str, tuple[str, ...] | None]]] = {
    "Asking a model": [
        ("space_app.explain", ("ChexExplainer", "load_model")),
        (
            "modeling_chex.pipeline_chex",
            (
                "ChexPipeline",
                "Explanation",
                "Answer",
                "Region",
                "Report",
                "ReportSentence",
                "save_with_code",
                "add_code",
            ),
        ),
        ("space_app.figure", ("draw_figure", "save_figure")),
        ("space_app.dicom_sr", ("write_structured_report",)),
    ],
    "Model": [
        ("modeling_chex.modeling_chex", ("ChexModel",)),
        ("modeling_chex.outputs", ("ChexOutput", "ChexImageFeatures")),
        ("modeling_chex.sentence_generator", None),
        (
            "modeling_chex.configuration_chex",
            ("ChexConfig", "ChexDetectorConfig", "ChexPostDecoderConfig", "ChexGeneratorConfig"),
        ),
        ("modeling_chex.prompt_detector", None),
        ("modeling_chex.post_decoder", None),
    ],
    "Images, prompts and boxes": [
        ("processing_chex.processing_chex", ("ChexProcessor",)),
        ("processing_chex.image_processing_chex", None),
        ("processing_chex.image_loading", ("load_image",)),
        ("processing_chex.errors", ("ChexInputError",)),
        ("processing_chex.prompt_sets", None),
        ("processing_chex.report", ("ReportOptions", "report_queries", "write_reports", "deduplicate", "is_negative")),
    ],
    "Data": [
        ("training.data.prepared", ("open_prepared", "read_info", "PreparedInfo")),
        ("training.data.preparation", ("prepare",)),
        ("training.data.own_data", ("OwnData", "OwnConfig")),
        ("training.data.phantom", ("render_phantom", "PhantomSample", "PhantomObject", "phantom_datasets")),
        ("training.data.report_text", None),
        ("training.collate", ("RecordStream",)),
    ],
    "Training": [
        (
            "training.configuration",
            (
                *(
                    "load_config",
                    "StageConfig",
                    "DataConfig",
                    "SubsetConfig",
                    "AugmentationConfig",
                    "OptimizationConfig",
                ),
                *("ObjectiveConfig", "TrackingConfig", "SelectionConfig"),
            ),
        ),
        ("training.lora", ("LoraOptions",)),
        *(
            (f"training.objectives.{name}", None)
            for name in ("contrastive", "detection", "matching", "generation", "reduction", "weights")
        ),
    ],
    "Evaluation": [
        ("evaluation.engine", ("evaluate", "evaluate_model", "Options")),
        ("evaluation.bootstrap", None),
        ("evaluation.labelers", None),
        ("evaluation.labelers.base", ("Labeler", "LabelerUnavailable")),
        *(
            (f"evaluation.metrics.{name}.{name}", None)
            for name in (
                *("detection_map", "coco_map", "grounding_iou", "box_iou", "region_auroc", "box_auroc"),
                *("clinical_f1", "finding_f1", "radgraph_f1", "bleu", "rouge_l", "meteor", "cider"),
            )
        ),
    ],
}

Definition = ast.ClassDef | ast.FunctionDef


def build_page(root: Path = ROOT) -> str:
    """The text of docs/api.md."""
    parts, links = [], []
    for heading, modules in CONTENTS.items():
        parts.append(f"## {heading}")
        links.append(f"- [{heading}](#{anchor(heading)})")
        for module, names in modules:
            for definition in definitions(root, module, names):
                parts.append(describe(definition, module))
    return "\n\n".join([INTRODUCTION + "\n" + "\n".join(links), *parts]) + "\n"


def definitions(root: Path, module: str, names: tuple[str, ...] | None) -> Iterator[Definition]:
    """
    Public classes and functions of a module, in the order of `names`, or of the file.

    Raises:
        KeyError: A name is not defined in the module, or has no docstring.
    """
    path = root / (module.replace(".", "/") + ".py")
    tree = ast.parse((path if path.is_file() else path.with_suffix("") / "__init__.py").read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, Definition) and ast.get_docstring(node)}
    if names is None:
        offered = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        public = offered[0] if offered else [name for name in found if not name.startswith("_")]
        names = tuple(name for name in found if name in public)
    for name in names:
        if name not in found:
            raise KeyError(f"{module} has no class or function {name} with a docstring: correct CONTENTS.")
        yield found[name]


def describe(definition: Definition, module: str) -> str:
    """A definition with its signature, docstring, fields and public methods."""
    name = definition.name
    blocks = [f"### {name}", f"`{module}`"]
    if isinstance(definition, ast.FunctionDef):
        return "\n\n".join([*blocks, code(signature(definition)), render(ast.get_docstring(definition) or "")])
    bases = ", ".join(ast.unparse(base) for base in definition.bases)
    blocks.append(code(f"class {name}({bases})" if bases else f"class {name}"))
    docstring = ast.get_docstring(definition) or ""
    blocks.append(render(docstring))
    if (fields := [node for node in definition.body if is_field(node)]) and "Args:" not in docstring:
        blocks.append(code("\n".join(ast.unparse(field) for field in fields)))
    for method in definition.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_") and method.name != "__call__":
            continue
        if text := ast.get_docstring(method):
            blocks += [f"#### {name}.{method.name}", code(signature(method)), render(text)]
    return "\n\n".join(block for block in blocks if block)


def is_field(node: ast.stmt) -> bool:
    if not isinstance(node, ast.AnnAssign) or ast.unparse(node.target).startswith("_"):
        return False
    return not ast.unparse(node.annotation).startswith("ClassVar")


def signature(function: ast.FunctionDef) -> str:
    """On one line if it fits, else one parameter a line."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    parameters = [parameter(*pair) for pair in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        parameters.append("*" + parameter(arguments.vararg, None))
    elif arguments.kwonlyargs:
        parameters.append("*")
    parameters += [parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parameters.append("**" + parameter(arguments.kwarg, None))
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if parameters and parameters[0] in ("self", "cls"):
        parameters.pop(0)
    if decorators & {"property", "cached_property"}:
        return function.name + (f" -> {ast.unparse(function.returns)}" if function.returns else "")
    end = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    line = f"{function.name}({', '.join(parameters)}){end}"
    return line if len(line) <= WIDTH else f"{function.name}(\n    " + ",\n    ".join(parameters) + f",\n){end}"


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = argument.arg + (f": {ast.unparse(argument.annotation)}" if argument.annotation else "")
    return text + (f" = {ast.unparse(default)}" if default is not None else "")


def code(text: str) -> str:
    return f"```text\n{text}\n```"


def render(docstring: str) -> str:
    """Markdown of a docstring: prose as it is, sections such as "Args:" as lists."""
    blocks: list[str] = []
    lines = docstring.splitlines()
    while lines:
        line = lines.pop(0)
        title = line.removesuffix(":").strip()
        if line.endswith(":") and not line.startswith(" ") and title in SECTIONS:
            body = []
            while lines and (not lines[0].strip() or lines[0].startswith(" ")):
                body.append(lines.pop(0))
            blocks += [f"**{title}**", section(textwrap.dedent("\n".join(body)), title)]
        elif line.startswith("```"):
            body = []
            while lines and not (closing := lines.pop(0)).startswith("```"):
                body.append(closing)
            blocks.append(code("\n".join(body)))
        elif line.startswith("    "):  # an example
            body = [line]
            while lines and (not lines[0].strip() or lines[0].startswith("    ")):
                body.append(lines.pop(0))
            blocks.append(code(textwrap.dedent("\n".join(body)).strip("\n")))
        elif line.strip():
            body = [line]
            while lines and lines[0].strip() and not lines[0].startswith("    "):
                if lines[0].removesuffix(":") in SECTIONS or lines[0].startswith("```"):
                    break
                body.append(lines.pop(0))
            blocks.append(listed(body))
    return "\n\n".join(blocks)


def listed(lines: list[str]) -> str:
    """A paragraph, in which lines that begin with a hyphen are items."""
    items: list[str] = []
    for line in lines:
        if line.lstrip().startswith(("- ", "* ")) or not items:
            items.append(line.strip())
        else:
            items[-1] += " " + line.strip()
    return "\n".join(wrap(item, "  " if item.startswith(("- ", "* ")) else "") for item in items)


def section(body: str, title: str) -> str:
    """The content of a section: an item for each entry, or plain prose."""
    entries: list[list[str]] = []
    for line in body.splitlines():
        if not line.strip():
            continue
        if not line.startswith(" ") or not entries:
            entries.append([line.strip()])
        else:
            entries[-1].append(line.strip())
    if title in ("Returns", "Yields"):
        return listed([line for line in body.splitlines() if line.strip()])
    items = []
    for entry in entries:
        text = " ".join(entry)
        if match := re.match(r"(\*{0,2}[\w, /]+?)(?: (\([^:]*\)))?:(?= |$)\s*(.*)", text):
            names, kind, rest = match.groups()
            text = f"`{names}`" + (f" {kind}" if kind else "") + f": {rest}"
        items.append(wrap(f"- {text}", "  "))
    return "\n".join(items)


def wrap(text: str, indent: str) -> str:
    text = re.sub(r"\[`([^`]+)`\](?!\()", r"`\1`", text)  # references of Transformers' own documentation
    text = re.sub(r"\\\((.+?)\\\)", r"$\1$", text)
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if the page is out of date and --check was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    page = build_page()
    current = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if page == current:
        return 0
    if check:
        print("docs/api.md is out of date: run `python docs/build_api.py`.", file=sys.stderr)
        return 1
    partial = PAGE.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
