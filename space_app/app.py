"""
The Space: `python -m space_app --model DIR|HUB_ID`, or this file as the `app.py` of a Space, which takes the
model from the variable `CHEX_MODEL`.
"""

import argparse
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# before Gradio is imported: nothing is reported to anyone
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
DEFAULT_MODEL = "runs/demo/model"


def build(model: str) -> Any:
    """The page for a model folder or the name of a repository on the Hub.

    Raises:
        ChexInputError: There is no such model, or it is damaged.
    """
    try:
        import spaces  # on ZeroGPU, a GPU is there only while a decorated function runs

        on_gpu = spaces.GPU
    except ImportError:
        on_gpu = None
    from huggingface_hub import snapshot_download

    from space_app.explain import ChexExplainer
    from space_app.page import build_page

    folder = model
    if (
        not Path(model).exists()
        and model.count("/") == 1
        and not model.startswith((".", "/"))
        and model != DEFAULT_MODEL
    ):
        folder = snapshot_download(model)
    shown = "/".join(Path(model).parts[-2:]) if Path(model).exists() else model
    return build_page(ChexExplainer.from_pretrained(folder), shown, on_gpu)


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until it is stopped."""
    parser = argparse.ArgumentParser(prog="python -m space_app", description="The page of ChEX in a browser.")
    parser.add_argument(
        "--model",
        default=os.environ.get("CHEX_MODEL", DEFAULT_MODEL),
        metavar="DIR|HUB_ID",
        help="model folder or repository (default: %(default)s, or the variable CHEX_MODEL)",
    )
    parser.add_argument("--host", default=None, help="address to serve at (default: this machine only)")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--open", action="store_true", help="open a browser")
    arguments = parser.parse_args(argv)

    gc.disable()  # searching what imports create for garbage would take a quarter of the start
    try:
        from processing_chex import ChexInputError

        try:
            page = build(arguments.model)
        except ChexInputError as error:
            parser.exit(2, f"python -m space_app: error: {error}\n")
        from space_app.page import LAUNCH

        gc.freeze()  # libraries and model stay until the end
    finally:
        gc.enable()
    page.queue(default_concurrency_limit=4, max_size=128)
    page.launch(server_name=arguments.host, server_port=arguments.port, inbrowser=arguments.open, **LAUNCH)


if __name__ == "__main__":
    main()
