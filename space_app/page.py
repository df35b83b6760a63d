"""
The page: a radiograph, questions about it as text or box, a report. Built with Gradio; `app` serves it.

Nothing of PyTorch and Transformers is imported at the top: the page is there before they and the model are.
"""

import base64
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, wraps
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
import PIL.Image


if TYPE_CHECKING:
    from space_app.study import Study, StudyReader


ASSETS = Path(__file__).parent / "assets"
TITLE = "ChEX: ask about a chest radiograph"
NOTICE = (
    "**For research only. Not a medical device; not for clinical use.** Images and DICOM data stay in the memory of "
    "this server while the page is open; an uploaded file is deleted once it is read."
)
IDLE_SECONDS = 3600  # after which the image of a page that was left open is forgotten
NUM_EXAMPLES = 4
MAX_UPLOAD = 64 * 2**20  # bytes


# Fonts of the system: nothing is loaded from elsewhere.
THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue", secondary_hue="blue"
)
CSS = """
#head p { margin: 0; }
#status:not(:has([role=alert])) { display: none; }
#status [role=alert] { color: var(--error-text-color); font-weight: 600; margin: 0; }
#status [role=alert] { padding-left: .6rem; border-left: 4px solid #dc2626; }
.go { align-self: end; max-height: 2.8rem; }
footer { display: none !important; }
#viewer .html-container, #examples .html-container { padding: 0; }
"""
# Not among CSS, as Gradio applies that only within the padding. Leaves a narrow window to the image and the tabs.
NARROW = """
<style>
@media (max-width: 500px) {
    .gradio-container .main.app { padding: .6rem !important; }
    #tabs button[role=tab] { padding-inline: .65rem; }
}
</style>
"""
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css": CSS,
    "head": NARROW,
    "footer_links": [],
    "max_file_size": MAX_UPLOAD,
    "ssr_mode": False,
    "show_error": False,
}


# Functions, not classes: Gradio writes a stub file beside every class that is derived from a component.
def examples_component(**kwargs: Any) -> gr.HTML:
    """Small pictures to choose from, the value, which may come later. Triggers `pick` with their index."""
    return gr.HTML(
        value="",
        html_template="<p>Or take an example (synthetic)</p><div>${value}</div>",
        css_template="""
            p { margin: 0 0 .3rem; font-size: .875rem; }
            div { display: grid; grid-template-columns: repeat(4, minmax(0, 5rem)); gap: .4rem; }
            div { align-items: start; min-height: 5rem; }
            button { padding: 0; border: 2px solid transparent; border-radius: .4rem; line-height: 0; cursor: pointer }
            button:hover, button:focus-visible { border-color: var(--color-accent); outline: none; }
            img { width: 100%; aspect-ratio: 1; border-radius: .3rem; display: block; margin: 0; }
        """,
        js_on_load="""
            element.addEventListener("click", (event) => {
                const button = event.target.closest("[data-index]");
                if (button) trigger("pick", { index: Number(button.dataset.index) });
            });
        """,
        apply_default_css=False,
        **kwargs,
    )


def viewer_component(**kwargs: Any) -> gr.HTML:
    """
    Image and answers, whose values are the messages of `viewer.js`: draws boxes, zooms, filters by score and saves in
    the browser. Triggers `ask_box` with a box, `save_sr` with what a structured report is to hold, and `refuse` with
    name and bytes of a file that is too large to be uploaded.
    """
    parts = {name: (ASSETS / f"viewer.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return gr.HTML(
        html_template=parts["html"],
        css_template=parts["css"],
        js_on_load=parts["js"],
        max_upload=MAX_UPLOAD,
        apply_default_css=False,
        **kwargs,
    )


@lru_cache
def example_images() -> tuple[PIL.Image.Image, ...]:
    """Synthetic radiographs, drawn when they are needed first."""
    from training.data.phantom import render_phantom

    return tuple(PIL.Image.fromarray(render_phantom(7, index, 512).image) for index in (3, 11, 20, 42)[:NUM_EXAMPLES])


@lru_cache
def example_buttons() -> str:
    """The pictures that `examples_component` shows."""
    from space_app.study import data_uri

    buttons = []
    for number, image in enumerate(example_images()):
        source = data_uri(np.asarray(image.resize((160, 160)), dtype=np.float32) / 255)
        label = f"Synthetic radiograph {number + 1}"
        picture = f'<img alt="{label}" src="{source}">'
        buttons.append(f'<button type="button" data-index="{number}" title="{label}">{picture}</button>')
    return "".join(buttons)


def prompt_choices() -> tuple[list[str], list[str]]:
    """Findings and anatomical regions to choose from."""
    from processing_chex.prompt_sets import class_prompts
    from processing_chex.vocabulary import ANATOMY_NAMES

    findings = [class_prompts("chexpert").box[name][0] for name in class_prompts("chexpert").names]
    findings = list(dict.fromkeys([*findings, *(p[0] for p in class_prompts("phantom").box.values())]))
    return findings, [name[0].upper() + name[1:] for name in ANATOMY_NAMES]


def split_prompts(text: str, *chosen: Sequence[str]) -> list[str]:
    """Prompts of a text, which semicolons or line breaks separate, and of lists, each once."""
    typed = [part.strip() for line in text.splitlines() for part in line.split(";")]
    return list(dict.fromkeys(prompt for prompt in (*typed, *(c for part in chosen for c in part or ())) if prompt))


def build_page(
    loading: "Future[StudyReader]", model_name: str, on_gpu: Callable[[Callable], Callable] | None = None
) -> Any:
    """
    The page as `gr.Blocks`; `LAUNCH` has what belongs to its `launch`.

    Args:
        loading: Model and processor, shared by all users. What is asked before they are there waits.
        model_name: Shown on the page.
        on_gpu: Wraps what needs the GPU, such as `spaces.GPU`.
    """
    on_gpu = on_gpu or (lambda function: function)
    # Gradio finds `gr.EventData` among the annotations of an event only if all of them exist: its study is Any.

    @on_gpu
    def open_study(image: Any, name: str | None = None) -> "Study":
        return loading.result().open(image, name)

    @on_gpu
    def answer(study: "Study", prompts: Sequence[str], boxes: Sequence[Sequence[float]]) -> tuple[list[dict], float]:
        return loading.result().ask(study, prompts, boxes)

    @on_gpu
    def report_of(study: "Study", classes: str) -> tuple[list[dict], float]:
        return loading.result().report(study, classes)

    def explained(function: Callable) -> Callable:
        """An event that shows on the page what is wrong with its input."""

        @wraps(function)
        def event(*inputs: Any) -> dict:
            loading.result()
            from processing_chex import ChexInputError

            try:
                return function(*inputs)
            except ChexInputError as error:
                return trouble(str(error))

        return event

    def trouble(text: str) -> dict:
        """The study and what is shown of it stay."""
        return {viewer: message(note=""), status: f'<p role="alert">{escape(text)}</p>'}

    def fill() -> dict:
        writes_sentences = loading.result().writes_sentences
        findings, anatomy = prompt_choices()
        return {
            examples: example_buttons(),
            finding: gr.Dropdown(findings),
            region: gr.Dropdown(anatomy),
            report_tab: gr.Tab(visible=writes_sentences),
            viewer: message(note=""),
        }

    def show(opened: "Study") -> dict:
        image = opened.for_viewer() | {"sr": opened.header is not None and find_spec("highdicom") is not None}
        megapixels = f"{opened.width} x {opened.height} pixels"
        note = f"{opened.name}, {megapixels}: read and encoded in {opened.seconds:.2f} s."
        return {study: opened, viewer: message(image=image, answers=[], note=note), status: ""}

    @explained
    def read(path: str) -> dict:
        return show(open_study(path))

    def upload(path: str) -> dict:
        try:
            return {file: None, **read(path)}
        finally:
            _forget(path)

    def refuse(event: gr.EventData) -> dict:
        name, size = (str((event._data or {}).get(key))[:200] for key in ("name", "bytes"))
        megabytes = f"{int(size) / 2**20:.0f}" if size.isdecimal() else "too many"
        return trouble(f"{name} has {megabytes} MB, of at most {MAX_UPLOAD // 2**20}: scale it down or compress it.")

    @explained
    def choose(event: gr.EventData) -> dict:
        index = (event._data or {}).get("index")
        if index not in range(len(example_images())):
            return trouble("There is no such example.")
        return show(open_study(example_images()[index], f"Synthetic radiograph {index + 1}"))

    def respond(study: Any, prompts: Sequence[str], boxes: Sequence[Sequence[float]], only: bool = False) -> dict:
        if study is None:
            return trouble("Choose an image first: upload one, or take an example.")
        answers, seconds = answer(study, prompts, boxes)
        note = f"{len(answers)} {'answer' if len(answers) == 1 else 'answers'} in {seconds:.2f} s."
        return {viewer: message(study=study.key, answers=answers, keep=True, only=only, note=note), status: ""}

    @explained
    def ask_text(study: Any, text: str, *chosen: Sequence[str]) -> dict:
        return respond(study, split_prompts(text or "", *chosen), [])

    @explained
    def ask_box(study: Any, event: gr.EventData) -> dict:
        box = (event._data or {}).get("box")
        if not isinstance(box, list) or len(box) != 4:
            return trouble("That is no box: drag from one corner to the other.")
        return respond(study, [], [box])

    @explained
    def ask_typed_box(study: Any, text: str) -> dict:
        from space_app.explain import parse_box

        return respond(study, [], [parse_box(text or "", option="")])

    @explained
    def compare(study: Any, first: str, second: str) -> dict:
        prompts = [text.strip() for text in (first or "", second or "") if text.strip()]
        if len(set(prompts)) != 2:
            return trouble("Comparing needs two different prompts.")
        return respond(study, prompts, [], only=True)

    @explained
    def write_report(study: Any, classes: str) -> dict:
        if study is None:
            return trouble("Choose an image first: upload one, or take an example.")
        sentences, seconds = report_of(study, classes)
        count = f"{len(sentences)} {'sentence' if len(sentences) == 1 else 'sentences'}"
        note = f"{count} in {seconds:.2f} s; each can be edited." if sentences else "Nothing is worth a sentence."
        return {viewer: message(study=study.key, answers=sentences, keep=True, only=True, note=note), status: ""}

    @explained
    def save_sr(study: Any, event: gr.EventData) -> dict:
        from space_app.study import write_sr

        if study is None:
            return trouble("Choose an image first: upload a DICOM file.")
        content = write_sr(study, (event._data or {}).get("result"), model_name)
        saved = {"name": "report.dcm", "type": "application/dicom", "base64": base64.b64encode(content).decode()}
        return {viewer: message(study=study.key, file=saved), status: ""}

    def fail() -> dict:
        return trouble("The server could not do this. Try again; if it stays so, reload the page.")

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, IDLE_SECONDS)) as page:
        gr.Markdown(f"# {TITLE}\n{NOTICE}", elem_id="head")
        study = gr.State(None, time_to_live=IDLE_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=300), gr.Row():
                with gr.Column(min_width=200):
                    # Files of any name: those of DICOM often have no ending.
                    file = gr.File(label="PNG, JPEG, TIFF, DICOM", height=140, elem_id="upload")
                with gr.Column(min_width=200):
                    examples = examples_component(elem_id="examples", padding=False)
            with gr.Column(scale=3, min_width=560), gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
                with gr.Tab("Ask"), gr.Row():
                    text = gr.Textbox(
                        label="What to look for (; separates)",
                        placeholder="Pleural effusion; left lung",
                        max_length=2000,
                        scale=3,
                        min_width=240,
                        elem_id="prompt",
                    )
                    finding = gr.Dropdown(
                        [], multiselect=True, label="Findings", scale=2, min_width=200, elem_id="findings"
                    )
                    region = gr.Dropdown(
                        [], multiselect=True, label="Anatomy", scale=2, min_width=200, elem_id="anatomy"
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=100, elem_id="ask", elem_classes="go")
                with gr.Tab("Box"), gr.Row():
                    typed = gr.Textbox(
                        label="Box, if not drawn on the image",
                        placeholder="x0,y0,x1,y1 in pixels",
                        max_length=100,
                        scale=4,
                        min_width=240,
                        elem_id="box",
                    )
                    ask_there = gr.Button(
                        "What is there?", variant="primary", scale=1, min_width=140, elem_classes="go"
                    )
                with gr.Tab("Compare"), gr.Row():
                    first = gr.Textbox(
                        label="One prompt", placeholder="Left pleural effusion", max_length=300, scale=2
                    )
                    second = gr.Textbox(
                        label="The other", placeholder="Right pleural effusion", max_length=300, scale=2
                    )
                    both = gr.Button("Compare", variant="primary", scale=1, min_width=120, elem_classes="go")
                with gr.Tab("Report", visible=False) as report_tab, gr.Row():
                    classes = gr.Dropdown(
                        [("Eight common findings", "phantom"), ("14 findings of CheXpert", "chexpert")],
                        value="phantom",
                        label="Findings that are looked for, besides 15 regions",
                        scale=3,
                        min_width=240,
                    )
                    report = gr.Button(
                        "Write the report",
                        variant="primary",
                        scale=1,
                        min_width=160,
                        elem_id="report",
                        elem_classes="go",
                    )
        status = gr.HTML("", elem_id="status", padding=False)
        viewer = viewer_component(elem_id="viewer", padding=False)
        gr.Markdown(f"Model: `{model_name}`. Boxes are in pixels of the original image.", elem_id="foot")

        shown = {"show_progress": "hidden", "api_visibility": "private"}
        opened, answered = [study, viewer, status], [viewer, status]
        reading, asking = shown | {"js": busy("Reading the image…")}, shown | {"js": busy("Asking…")}
        writing = shown | {"js": busy("Writing the report…")}
        filled = [examples, finding, region, report_tab, viewer]
        events = [
            page.load(fill, None, filled, **shown, js=busy("Loading the model…")),
            file.upload(upload, file, [file, *opened], **reading),
            examples.pick(choose, None, opened, **reading),
            gr.on([text.submit, ask.click], ask_text, [study, text, finding, region], answered, **asking),
            viewer.ask_box(ask_box, study, answered, **shown),
            gr.on([typed.submit, ask_there.click], ask_typed_box, [study, typed], answered, **asking),
            gr.on([first.submit, second.submit, both.click], compare, [study, first, second], answered, **asking),
            report.click(write_report, [study, classes], answered, **writing),
            viewer.save_sr(save_sr, study, answered, **shown),
            viewer.refuse(refuse, None, answered, **shown),
        ]
        for event in events:
            event.failure(fail, None, answered, **shown)
    return page


_serial = itertools.count()


def message(**content: Any) -> dict[str, Any]:
    """What the viewer is told. With a number, as one that equals that before it would not reach the viewer."""
    return {**content, "serial": next(_serial)}


def busy(text: str) -> str:
    """Script that shows in the viewer that an answer is waited for, and hands the inputs on."""
    event = f'new CustomEvent("busy", {{ detail: {json.dumps(text)} }})'
    return f"(...values) => {{ document.querySelector('#viewer .viewer')?.dispatchEvent({event}); return values; }}"


def _forget(path: str) -> None:
    """Deletes an uploaded file with the folder that Gradio made for it."""
    with contextlib.suppress(OSError):
        os.remove(path)
        os.rmdir(os.path.dirname(path))


__all__ = ["LAUNCH", "build_page", "example_images", "prompt_choices", "split_prompts"]
