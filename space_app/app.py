"""
The Space: `python -m space_app --model DIR|HUB_ID`, or this file as the `app.py` of a Space, which takes the
model from the variable `CHEX_MODEL`.
"""

import argparse
import gc
import os
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any


# before Gradio is imported: nothing is reported to anyone
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
DEFAULT_MODEL = "runs/demo/model"


def load(model: str) -> Any:
    """The `StudyReader` of a model folder or of a repository on the Hub.

    Raises:
        ChexInputError: There is no such model, or it is damaged.
    """
    from space_app.explain import ChexExplainer
    from space_app.study import StudyReader

    folder = model
    if (
        not Path(model).exists()
        and model.count("/") == 1
        and not model.startswith((".", "/"))
        and model != DEFAULT_MODEL
    ):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(model)
    return StudyReader(ChexExplainer.from_pretrained(folder))


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

    try:
        import spaces  # on ZeroGPU, a GPU is there only while a decorated function runs

        on_gpu = spaces.GPU
    except ImportError:
        on_gpu = None
    shown = "/".join(Path(arguments.model).parts[-2:]) if Path(arguments.model).exists() else arguments.model
    loading: Future = Future()
    # A local model is loaded behind a page that is there already: most of the start is importing its libraries.
    behind = on_gpu is None and (Path(arguments.model) / "config.json").is_file()
    gc.disable()  # searching what imports create for garbage would take a quarter of the start
    try:
        if not behind:
            finish_loading(loading, arguments.model, parser)
        from space_app.page import LAUNCH, build_page

        page = build_page(loading, shown, on_gpu)
        page.queue(default_concurrency_limit=4, max_size=128)
        address = {"server_name": arguments.host, "server_port": arguments.port, "inbrowser": arguments.open}
        page.launch(prevent_thread_lock=True, **address, **LAUNCH)
        if behind:
            finish_loading(loading, arguments.model, parser)
        gc.freeze()  # libraries and model stay until the end
    finally:
        gc.enable()
    page.block_thread()


def finish_loading(loading: Future, model: str, parser: argparse.ArgumentParser) -> None:
    """Loads the model for those who wait for it; without it, the process ends."""
    from processing_chex import ChexInputError

    try:
        loading.set_result(load(model))
    except BaseException as error:
        loading.set_exception(error)  # nobody is to wait for ever
        if not isinstance(error, ChexInputError):
            raise
        parser.exit(2, f"python -m space_app: error: {error}\n")


if __name__ == "__main__":
    main()
