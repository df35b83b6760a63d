"""The page in a real browser, served by a real second process; and the parts beneath it."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import pydicom
import pytest
import torch

from processing_chex import ChexInputError
from space_app.explain import ChexExplainer
from space_app.study import MAX_QUERIES, MAX_STATEMENTS, StudyReader, check_pixels, write_sr

from .image_factory import gradient, save_dicom, save_image
from .test_cli import save_tiny_model


ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
browser_test = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), stage=3)


@pytest.fixture(scope="module")
def explainer(model_folder):
    return ChexExplainer.from_pretrained(model_folder)


@pytest.fixture
def reader(explainer):
    return StudyReader(explainer)


# ---------------------------------------------------------------------------------------------------------------------
# a study


def test_a_study_answers_like_the_pipeline(reader, explainer, tmp_path):
    path = save_image(tmp_path / "scan.png", gradient(90, 120))
    study = reader.open(path)
    assert (study.name, study.width, study.height) == ("scan.png", 120, 90)
    prompts, boxes = ["Pleural effusion", "Heart"], [[40.0, 20.0, 80.0, 60.0]]
    answers, _ = reader.ask(study, prompts, boxes)
    expected = explainer.explain(path, prompts, boxes, threshold=0.0).answers
    assert [answer["sentence"] for answer in answers] == [answer.sentence for answer in expected]
    assert [answer["score"] for answer in answers] == [answer.score for answer in expected]
    assert [[tuple(region["box"]) for region in answer["regions"]] for answer in answers] == [
        [region.box for region in answer.regions] for answer in expected
    ]
    assert answers[2]["asked"] == boxes[0]


def test_regions_of_all_scores_hold_those_of_any_threshold(reader, explainer, tmp_path):
    path = save_image(tmp_path / "scan.png", gradient(64, 64))
    answers, _ = reader.ask(reader.open(path), ["Nodule"])
    scores = sorted(region["score"] for region in answers[0]["regions"])
    threshold = (scores[0] + scores[-1]) / 2 if len(scores) > 1 else scores[0] - 0.01
    expected = explainer.explain(path, ["Nodule"], threshold=threshold).answers[0].regions
    shown = [region for region in answers[0]["regions"] if region["score"] > threshold]
    assert [tuple(region["box"]) for region in shown] == [region.box for region in expected]


def test_a_report_of_a_study_is_that_of_the_explainer(reader, explainer, tmp_path):
    path = save_image(tmp_path / "scan.png", gradient(64, 64))
    sentences, _ = reader.report(reader.open(path), "phantom")
    expected = explainer.report(path)
    assert [sentence["sentence"] for sentence in sentences] == [sentence.text for sentence in expected.sentences]
    assert all(sentence["report"] for sentence in sentences)


def test_image_is_encoded_once(reader, tmp_path, monkeypatch):
    study = reader.open(save_image(tmp_path / "scan.png", gradient(64, 64)))
    monkeypatch.setattr(
        type(reader.pipeline.model), "get_image_features", lambda *a, **k: pytest.fail("encoded again")
    )
    reader.ask(study, ["Nodule"])
    reader.ask(study, [], [[1, 1, 30, 30]])
    reader.report(study, "phantom")


@pytest.mark.parametrize(
    ("prompts", "boxes", "message"),
    [
        ([], [], "Nothing is asked"),
        (["x"] * (MAX_QUERIES + 1), [], f"at most {MAX_QUERIES}"),
        (["   "], [], "empty"),
        ([], [[500, 500, 600, 600]], "scan.png"),
    ],
)
def test_unusable_questions(reader, tmp_path, prompts, boxes, message):
    study = reader.open(save_image(tmp_path / "scan.png", gradient(64, 64)))
    with pytest.raises(ChexInputError, match=re.escape(message)):
        reader.ask(study, prompts, boxes)


def test_too_many_pixels_are_refused_from_the_header_alone(tmp_path):
    path = tmp_path / "huge.png"
    PIL.Image.new("1", (10_000, 5_001)).save(path)
    before = time.process_time()
    with pytest.raises(ChexInputError, match="10000 x 5001 pixels"):
        check_pixels(path, "huge.png")
    assert time.process_time() - before < 0.5
    dicom = save_dicom(tmp_path / "scan.dcm", np.zeros((32, 32), dtype=np.uint16))
    check_pixels(dicom, "scan.dcm")


def test_errors_do_not_name_folders_of_the_server(reader, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    with pytest.raises(ChexInputError) as error:
        reader.open(path)
    assert "notes.txt" in str(error.value) and str(tmp_path) not in str(error.value)


ANSWER = {"query": "Nodule", "sentence": "A nodule.", "score": 1, "regions": []}
RESULT = {"image": {"width": 64, "height": 64}, "answers": [ANSWER]}


@pytest.mark.parametrize(
    ("attributes", "result", "message"),
    [
        (None, RESULT, "film is no DICOM file"),
        ({"StudyInstanceUID": None}, RESULT, "film cannot be referred to: it has no StudyInstanceUID"),
        ({}, {"answers": []}, "nothing to write"),
        ({}, ["no", "result"], "nothing to write"),
        ({}, RESULT | {"answers": [ANSWER] * (MAX_STATEMENTS + 1)}, f"at most {MAX_STATEMENTS}"),
        ({}, RESULT | {"answers": ["none"]}, "damaged"),
        ({}, RESULT | {"image": {"width": 65, "height": 64}}, "65 x 64"),
    ],
)
def test_unusable_structured_reports(reader, tmp_path, attributes, result, message):
    pytest.importorskip("highdicom")
    if attributes is None:
        path = save_image(tmp_path / "film.png", gradient(64, 64)).rename(tmp_path / "film")
    else:
        path = save_dicom(tmp_path / "film", gradient(64, 64).astype(np.uint16), **attributes)
    study = reader.open(path)
    assert (study.header is None) == (attributes is None)
    with pytest.raises(ChexInputError, match=message) as error:
        write_sr(study, result, "a model")
    assert str(tmp_path) not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# the page


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    """Address of the page, its process, and the folder for what Gradio stores."""
    folder = tmp_path_factory.mktemp("gradio")
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = folder.with_name("server.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "space_app", "--model", str(model_folder), "--port", str(7900 + os.getpid() % 2000)],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    deadline, address = time.monotonic() + 300, None
    while address is None and time.monotonic() < deadline:
        text = Path(log.name).read_text(encoding="utf-8")
        found = re.search(r"http://127\.0\.0\.1:\d+", text)
        address = found.group() if found else None
        assert process.poll() is None, text
        time.sleep(0.2)
    assert address is not None
    yield address, process, folder
    process.send_signal(signal.SIGTERM)
    process.wait(20)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page of its own session, which must not ask for anything outside nor fail in a script."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    outside, errors = [], []
    page.on("request", lambda r: r.url.startswith((server[0], "data:", "blob:")) or outside.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    open_page(page, server[0])
    yield page
    context.close()
    assert not outside and not errors


def open_page(page, address):
    page.goto(address)
    page.wait_for_selector("#viewer .stage")
    page.wait_for_selector("#examples button")


def take_example(page, index=0):
    page.locator("#examples button").nth(index).click()
    page.wait_for_selector("#viewer .stage.ready")


def ask(page, text):
    box = page.locator("#prompt textarea, #prompt input").first
    box.fill(text)
    before = page.locator("#viewer .row").count()
    box.press("Enter")
    page.wait_for_function(f"document.querySelectorAll('#viewer .row').length > {before}")


def upload(page, path):
    page.locator("#upload input[type=file]").set_input_files(str(path))


def alert(page):
    page.wait_for_selector("#status [role=alert]")
    return page.locator("#status [role=alert]").inner_text()


def saved(page, kind):
    with page.expect_download() as download:
        page.locator(f"#viewer [data-do={kind}]").click()
    return Path(download.value.path())


@browser_test
def test_text_query_with_linked_rows_and_threshold(page):
    take_example(page)
    ask(page, "Pleural effusion; Heart")
    rows = page.locator("#viewer .row")
    assert rows.count() == 2
    page.locator("#viewer [data-set=threshold]").fill("0")
    boxes = page.locator("#viewer .boxes g")
    assert boxes.count() >= 2
    rows.nth(1).click()
    assert "lit" in rows.nth(1).get_attribute("class")
    lit = page.locator("#viewer .boxes g.lit")
    assert lit.count() and set(lit.evaluate_all("all => all.map(g => g.dataset.index)")) == {"1"}
    boxes.first.dispatch_event("click")  # and back: the dimmed one of the first row is drawn first
    assert "lit" in rows.nth(0).get_attribute("class")
    page.locator("#viewer [data-set=threshold]").fill("1")  # filters without asking again
    assert boxes.count() == 0
    assert "not found" in rows.nth(0).inner_text()
    page.locator("#viewer [data-set=threshold]").fill("0")
    rows.nth(0).locator("input").uncheck()
    assert set(boxes.evaluate_all("all => all.map(g => g.dataset.index)")) == {"1"}


@browser_test
def test_box_drawn_with_the_mouse(page):
    take_example(page)
    page.locator("#viewer [data-do=draw]").click()
    area = page.locator("#viewer svg").bounding_box()
    x, y, side = area["x"], area["y"], area["width"]
    page.mouse.move(x + 0.25 * side, y + 0.5 * side)
    page.mouse.down()
    page.mouse.move(x + 0.5 * side, y + 0.75 * side, steps=4)
    page.mouse.up()
    page.wait_for_selector("#viewer .row")
    answer = json.loads(saved(page, "json").read_text())["answers"][0]
    assert answer["kind"] == "box" and answer["sentence"]
    assert answer["box"] == pytest.approx([128, 256, 256, 384], abs=2)  # the example has 512 x 512 pixels


@browser_test
def test_zoom_keeps_boxes_in_pixels_of_the_image(page):
    take_example(page)
    stage = page.locator("#viewer .stage")
    stage.focus()
    for _ in range(3):
        stage.press("+")
    view = page.locator("#viewer svg").get_attribute("viewBox").split()
    assert float(view[2]) == pytest.approx(512 / 1.4**3, rel=1e-3)
    stage.press("b")
    area = page.locator("#viewer svg").bounding_box()
    page.mouse.move(area["x"] + 0.25 * area["width"], area["y"] + 0.25 * area["width"])
    page.mouse.down()
    page.mouse.move(area["x"] + 0.75 * area["width"], area["y"] + 0.75 * area["width"], steps=3)
    page.mouse.up()
    page.wait_for_selector("#viewer .row")
    half = 512 / 1.4**3 / 4
    box = json.loads(saved(page, "json").read_text())["answers"][0]["box"]
    assert box == pytest.approx([256 - half, 256 - half, 256 + half, 256 + half], abs=2)


@browser_test
def test_report_is_edited_and_saved(page):
    take_example(page)
    page.get_by_role("tab", name="Report").click()
    page.locator("#report").click()
    page.wait_for_selector("#viewer .row")
    page.locator("#viewer [data-set=threshold]").fill("0")
    sentence = page.locator("#viewer .sentence").first
    sentence.fill("This was <b>edited</b>.")
    text = saved(page, "text").read_text()
    assert text.startswith("This was <b>edited</b>.\n") and text.endswith("Research use only, not a medical device.\n")
    content = json.loads(saved(page, "json").read_text())
    assert content["answers"][0]["edited"] and "Research use only" in content["notice"]
    assert content["answers"][0]["sentence"] == "This was <b>edited</b>."
    with PIL.Image.open(saved(page, "png")) as picture:
        assert picture.width == 1024 and picture.height > 1024  # sentences stand below


@browser_test
def test_structured_report_of_a_dicom_image(page, tmp_path):
    highdicom = pytest.importorskip("highdicom")
    take_example(page)
    button = page.locator("#viewer [data-do=sr]")
    assert not button.is_visible()  # a picture has no study to refer to
    path = save_dicom(tmp_path / "IM000001", gradient(300, 400).astype(np.uint16) * 16, PatientName="Doe^Jane")
    upload(page, path)
    page.wait_for_function("document.querySelector('#viewer .hint').innerText.includes('400 x 300')")
    button.click()
    assert "nothing to save" in page.locator("#viewer .hint").inner_text()
    ask(page, "Pleural effusion")
    page.get_by_role("tab", name="Box").click()
    page.locator("#box textarea, #box input").first.fill("20,30,220,190")
    page.get_by_role("button", name="What is there?").click()
    page.wait_for_function("document.querySelectorAll('#viewer .row').length == 2")
    page.locator("#viewer [data-set=threshold]").fill("1")  # a given box stays whatever the threshold
    report = highdicom.sr.srread(saved(page, "sr"))
    source = pydicom.dcmread(path)
    assert (report.PatientName, report.StudyInstanceUID) == ("Doe^Jane", source.StudyInstanceUID)
    groups = report.content.get_image_measurement_groups() + report.content.get_planar_roi_measurement_groups()
    assert len(groups) == 2
    (region,) = report.content.get_planar_roi_measurement_groups()
    corners = region.roi.value
    assert corners.min(axis=0).tolist() == [20, 30] and corners.max(axis=0).tolist() == [220, 190]
    assert page.locator("#viewer .row").count() == 2 and page.locator("#viewer .stage.busy").count() == 0


@browser_test
def test_what_is_waited_for_is_shown_and_mistakes_end_it(page):
    stage = page.locator("#viewer .stage")
    seen = "new MutationObserver(() => { window.busy ||= document.querySelector('#viewer .stage.busy') !== null; })"
    page.evaluate(f"{seen}.observe(document.querySelector('#viewer .stage'), {{ attributes: true }})")
    for action in (lambda: take_example(page), lambda: ask(page, "Nodule")):
        page.evaluate("window.busy = false")
        action()
        assert page.evaluate("window.busy") and stage.get_attribute("aria-busy") == "false"
    for _ in range(2):  # the second answer equals the first, and has to reach the viewer all the same
        page.evaluate("window.busy = false")
        page.locator("#prompt textarea, #prompt input").first.fill("")
        page.locator("#ask").click()
        page.wait_for_function("window.busy && !document.querySelector('#viewer .stage.busy')")
    assert "Nothing is asked" in alert(page)


@browser_test
def test_a_bad_upload_leaves_the_image_that_is_shown(page, tmp_path):
    take_example(page)
    (tmp_path / "notes").write_text("this is no image")
    upload(page, tmp_path / "notes")
    assert "notes is not an image" in alert(page)
    ask(page, "Nodule")  # about the example


@browser_test
def test_answers_about_an_earlier_image_are_not_shown(page):
    take_example(page)

    served = []  # the browser may have dropped the body of a stream when one asks it

    def rename_study(route):
        response = route.fetch()
        served.append(re.sub(r'"study": ?"\w+"', '"study": "before"', response.text()))
        route.fulfill(response=response, body=served[-1])

    page.route("**/queue/data**", rename_study)  # as if another image had been opened since the question
    with page.expect_response("**/queue/data**"):
        page.locator("#prompt textarea, #prompt input").first.fill("Heart")
        page.locator("#ask").click()
    assert any('"study": "before"' in body for body in served)
    page.unroute("**/queue/data**")
    ask(page, "Nodule")
    assert page.locator("#viewer .row .query").all_inner_texts() == ["Nodule"]


@browser_test
def test_keyboard_and_clicks_on_a_zoomed_image(page):
    take_example(page)
    ask(page, "Pleural effusion; Heart")
    page.locator("#viewer [data-set=threshold]").fill("0")
    rows = page.locator("#viewer .row")
    mark = rows.first.locator("input")
    mark.press("Space")
    assert not mark.is_checked() and rows.first.get_attribute("aria-current") == "false"
    mark.press("Space")
    rows.first.press("ArrowDown")
    page.keyboard.press("Enter")
    assert rows.nth(1).get_attribute("aria-current") == "true"
    page.keyboard.press("Enter")
    page.locator("#viewer .stage").press("+")
    box = page.locator("#viewer .boxes g rect").last.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator("#viewer .row.lit").count() == 1


@browser_test
def test_captions_lie_apart_and_inside(page):
    take_example(page)
    ask(page, "Pleural effusion; Heart; Right lower lung zone; Nodule")
    page.locator("#viewer [data-set=threshold]").fill("0")
    area = page.locator("#viewer svg").bounding_box()
    captions = [text.bounding_box() for text in page.locator("#viewer .boxes text").all()]
    assert len(captions) >= 4
    for number, one in enumerate(captions):
        assert one["x"] >= area["x"] - 1 and one["x"] + one["width"] <= area["x"] + area["width"] + 1
        for other in captions[number + 1 :] if len(captions) <= 8 else ():
            apart = one["x"] + one["width"] <= other["x"] + 1 or other["x"] + other["width"] <= one["x"] + 1
            assert apart or abs(one["y"] - other["y"]) >= 14  # of letters of 12 pixels; boxes count the outline


@browser_test
def test_a_new_report_is_not_dimmed_by_an_earlier_choice(page):
    take_example(page)
    ask(page, "Nodule")
    page.locator("#viewer .row").first.click()
    page.get_by_role("tab", name="Report").click()
    page.locator("#report").click()
    page.wait_for_function("document.querySelectorAll('#viewer .row').length > 1")
    assert page.locator("#viewer .row.lit, #viewer .boxes g.dim").count() == 0


@browser_test
def test_comparison_of_two_prompts(page):
    take_example(page)
    ask(page, "Nodule")
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("One prompt").fill("Left pleural effusion")
    page.get_by_label("The other").fill("Right pleural effusion")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_function("document.querySelectorAll('#viewer .row').length == 3")
    shown = page.locator("#viewer .row input").evaluate_all("all => all.map(i => i.checked)")
    assert shown == [False, True, True]
    assert "scores" in page.locator("#viewer .comparison").inner_text()


@browser_test
@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_uploads_are_answered_and_deleted(page, server, tmp_path, kind):
    if kind == "png":
        path = save_image(tmp_path / "my scan.png", gradient(300, 400))
    else:
        path = save_dicom(tmp_path / "film.dcm", gradient(300, 400).astype(np.uint16) * 16)
    upload(page, path)
    page.wait_for_selector("#viewer .stage.ready")
    assert "400 x 300 pixels" in page.locator("#viewer .hint").inner_text()
    ask(page, "Nodule")
    assert json.loads(saved(page, "json").read_text())["image"]["width"] == 400
    content = path.read_bytes()  # by content: Gradio may give the copy another name
    assert not [file for file in server[2].rglob("*") if file.is_file() and file.read_bytes() == content]


@browser_test
def test_a_file_is_dropped(page, tmp_path):
    content = base64.b64encode(save_image(tmp_path / "scan.jpg", gradient(200, 260)).read_bytes()).decode()
    script = """content => {
        const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
        transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
        return transfer;
    }"""
    page.dispatch_event("#upload button", "drop", {"dataTransfer": page.evaluate_handle(script, content)})
    page.wait_for_function("document.querySelector('#viewer .hint').innerText.includes('dropped.jpg, 260 x 200')")


def bad_files(folder):
    """File -> what the page says of it."""
    from space_app.page import MAX_UPLOAD

    (folder / "notes.png").write_text("this is no image")
    PIL.Image.new("1", (10_000, 5_100)).save(folder / "huge.png")
    PIL.Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    film = pydicom.dcmread(save_dicom(folder / "frames.dcm", gradient(64, 64).astype(np.uint16)))
    film.NumberOfFrames, film.PixelData = 2, film.PixelData * 2
    film.save_as(folder / "frames.dcm")
    del film.PixelData, film.NumberOfFrames
    film.save_as(folder / "header.dcm")
    (folder / "large.dcm").write_bytes(bytes(MAX_UPLOAD + 2**20))
    return {
        "notes.png": "is not an image",
        "huge.png": "10000 x 5100 pixels, 51 megapixels",
        "bomb.png": "far too many pixels",
        "header.dcm": "without pixel data",
        "frames.dcm": "has 2 frames",
        "large.dcm": "has 65 MB, of at most 64",
    }


@browser_test
def test_bad_uploads_get_a_friendly_message(page, server, tmp_path):
    take_example(page)
    process, files = psutil.Process(server[1].pid), bad_files(tmp_path)
    before = process.memory_info().rss
    for name, message in files.items():
        upload(page, tmp_path / name)
        page.wait_for_function(f"document.querySelector('#status').innerText.includes({name!r})")
        assert message in alert(page)
    assert process.memory_info().rss - before < 200 * 2**20
    assert urllib.request.urlopen(server[0], timeout=10).status == 200
    stored = {file.read_bytes() for file in server[2].rglob("*") if file.is_file()}
    assert not stored & {(tmp_path / name).read_bytes() for name in files}
    ask(page, "Nodule")  # and the page goes on


@browser_test
def test_prompts_that_are_none_or_too_many_or_a_script(page):
    ask_button = page.locator("#ask")
    ask_button.click()
    assert "Choose an image first" in alert(page)
    take_example(page)
    page.wait_for_function("!document.querySelector('#status').innerText.trim()")
    ask_button.click()
    assert "Nothing is asked" in alert(page)
    box = page.locator("#prompt textarea, #prompt input").first
    box.fill("; ".join(f"finding {number}" for number in range(100)))
    box.press("Enter")
    page.wait_for_function(f"document.querySelector('#status').innerText.includes('at most {MAX_QUERIES}')")
    ask(page, "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>")
    assert "<script>" in page.locator("#viewer .row .query").first.inner_text()
    assert page.evaluate("window.hacked") is None


@browser_test
def test_two_users_see_only_their_own_image(browser, server, page, tmp_path):
    other = browser.new_context(viewport={"width": 360, "height": 740}).new_page()
    other.set_default_timeout(60_000)
    open_page(other, server[0])
    upload(page, save_image(tmp_path / "first.png", gradient(100, 200)))
    upload(other, save_image(tmp_path / "second.png", gradient(300, 150)))
    for user in (page, other):
        user.wait_for_selector("#viewer .stage.ready")
    ask(other, "Nodule")
    ask(page, "Heart")
    for user, size, query in ((page, (200, 100), "Heart"), (other, (150, 300), "Nodule")):
        assert user.locator("#viewer .row .query").all_inner_texts() == [query]
        image = user.locator("#viewer .film image")
        assert (image.get_attribute("width"), image.get_attribute("height")) == tuple(map(str, size))
    # a narrow window needs no scrolling to the side, shows all tabs, and the answer after the question
    assert other.evaluate("document.documentElement.scrollWidth") <= 360
    tabs = [tab.bounding_box() for tab in other.get_by_role("tab").all() if tab.is_visible()]
    assert len(tabs) == 4 and all(tab["x"] + tab["width"] <= 360 for tab in tabs)
    other.wait_for_function("document.querySelector('#viewer .stage').getBoundingClientRect().top < 250")
    other.context.close()


@browser_test
@pytest.mark.slow
def test_twenty_users_at_once(browser, server):
    process = psutil.Process(server[1].pid)
    pages = [browser.new_context(viewport={"width": 900, "height": 700}).new_page() for _ in range(20)]
    for page in pages:
        page.set_default_timeout(120_000)
        open_page(page, server[0])
    take_example(pages[0])  # what is loaded only once is loaded
    ask(pages[0], "Heart")
    before = process.memory_info().rss
    for number, page in enumerate(pages):
        page.locator("#examples button").nth(number % 4).click()
    for page in pages:
        page.wait_for_selector("#viewer .stage.ready")
    for number, page in enumerate(pages):
        box = page.locator("#prompt textarea, #prompt input").first
        box.fill(f"Finding number {number}")
        box.press("Enter")
    for number, page in enumerate(pages):
        page.wait_for_function(
            f"document.querySelector('#viewer .rows').innerText.includes('Finding number {number}')"
        )
        other = [n for n in range(20) if n != number]
        shown = page.locator("#viewer .rows").inner_text()
        assert not any(re.search(rf"Finding number {n}\b", shown) for n in other)
    assert process.memory_info().rss - before < 400 * 2**20
    for page in pages:
        page.context.close()


@browser_test
def test_the_page_is_there_before_the_model(browser, explainer, tmp_path, monkeypatch):
    from space_app.page import LAUNCH, build_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    loading = Future()
    blocks = build_page(loading, "a model")
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#viewer .stage.busy")
        assert "Loading the model" in page.locator("#viewer .hint").inner_text()
        upload(page, save_image(tmp_path / "early.png", gradient(90, 120)))
        page.wait_for_timeout(500)
        assert page.locator("#examples button").count() == 0 and not page.locator("#viewer .stage.ready").count()
        loading.set_result(StudyReader(explainer))
        page.wait_for_selector("#viewer .stage.ready")  # the upload has waited
        page.wait_for_selector("#examples button")
        page.get_by_role("tab", name="Report").wait_for()
        page.locator("#findings input").click()
        assert page.get_by_role("option", name="Pleural effusion").count()
        ask(page, "Heart")
    finally:
        context.close()
        blocks.close()


def test_a_damaged_model_is_explained(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    command = [sys.executable, "-m", "space_app", "--model", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "cannot be loaded" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_model_is_explained(tmp_path):
    command = [sys.executable, "-m", "space_app", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr


def test_split_prompts():
    from space_app.page import split_prompts

    assert split_prompts(" a; b\n;a ", ["b", "c"], None) == ["a", "b", "c"]


def test_examples_are_synthetic_films():
    from space_app.page import example_images

    images = example_images()
    assert len(images) == 4 and all(image.size == (512, 512) and image.mode == "L" for image in images)
    assert len({torch.tensor(np.asarray(image)).float().mean().item() for image in images}) == 4
