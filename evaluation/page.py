"""
Pages about an evaluation, made of its `results.json`: `index.html` (one file, nothing is loaded), `results.md` and the
figures as SVG files. They can be made again at any time: `python -m evaluation.page FOLDER/results.json`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.files import write_text
from evaluation.page_html import radar_data, render_html
from evaluation.page_markdown import render_markdown
from evaluation.page_style import FIGURE_STYLE
from evaluation.plots import calibration, precision_recall_grid, radar, standalone
from evaluation.results_view import ResultsError, read_results


def write_pages(results_path: str | Path) -> list[Path]:
    """
    Write `index.html`, `results.md` and `figures/*.svg` beside a results file, each atomically.

    Args:
        results_path: `results.json`, or its folder.

    Returns:
        The files: the HTML page, the Markdown page, the figures.

    Raises:
        ResultsError: The results file is missing, damaged, of another schema, or lacks parts; or an image of an
            example is damaged. Nothing is written then.
        OSError: The folder cannot be written.
    """
    results_path = Path(results_path)
    results = read_results(results_path)
    folder = results_path if results_path.is_dir() else results_path.parent
    figures = _figures(results)
    names = {name: f"figures/{name}.svg" for name in figures}
    # All pages are made before the first is written, so that they are of one state.
    html = render_html(results, folder)
    markdown = render_markdown(results, names)
    written = [write_text(folder / "index.html", html), write_text(folder / "results.md", markdown)]
    return written + [write_text(folder / names[name], drawing) for name, drawing in figures.items()]


def _figures(results: Mapping[str, Any]) -> dict[str, str]:
    """SVG files by name."""
    axes, series, unit, description = radar_data(results)
    figures = {"radar": radar(axes, series, description=description, unit=unit, legend=True)}
    for name, task in results["tasks"].items():
        curves = task["curves"].get("precision_recall") or {}
        if curves:
            title = f"Precision over recall by class, {task['title']}"
            figures[f"{name}-precision-recall"] = precision_recall_grid(curves, title)
        bins = task["curves"].get("calibration") or {}
        if bins.get("confidence"):
            figures[f"{name}-calibration"] = calibration(bins, f"Calibration, {task['title']}")
    return {name: standalone(drawing, FIGURE_STYLE) for name, drawing in figures.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        wanted_help = arguments in (["-h"], ["--help"])
        usage = (
            "Usage: python -m evaluation.page FOLDER/results.json\n\nMakes index.html, results.md and figures again."
        )
        print(usage, file=sys.stdout if wanted_help else sys.stderr)
        return 0 if wanted_help else 2
    try:
        written = write_pages(arguments[0])
    except (ResultsError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for path in written[:2]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["ResultsError", "main", "write_pages"]
