"""The page of `omni-video demo` in a browser: all ways to use the model, judged by the pixels of the results."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque

import numpy as np
import pytest
from browser import chromium, screenshot_folder, served_path

from omni_video_hf.media import load_image, load_video, read_media_record
from omni_video_hf.shapes import Scene, read_scene

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")

CIRCLE = ("a large red circle moving left on a black background", Scene("red", "circle", "large", "black", "left"))
TRIANGLE = ("a small blue triangle moving up on a white background", Scene("blue", "triangle", "small", "white", "up"))
SQUARE = ("a small yellow square on a grey background", Scene("yellow", "square", "small", "grey"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Shells let what they start in the background ignore Ctrl-C, and so would the page.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from omni_video_hf.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def address():
    """The page, served by the command. An address of the environment is one that a developer serves already."""
    if "OMNI_VIDEO_DEMO_ADDRESS" in os.environ:
        yield os.environ["OMNI_VIDEO_DEMO_ADDRESS"]
        return
    command = [sys.executable, "-c", COMMAND, "demo", "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        last = deque(maxlen=20)
        for line in server.stdout:
            last.append(line)
            if found := re.search(r"The page is at (\S+)", line):
                break
        else:
            raise AssertionError("".join(last))
        reader = threading.Thread(target=last.extend, args=(server.stdout,))  # a full pipe would stop the server
        reader.start()
        try:
            yield found[1]
        finally:
            server.send_signal(signal.SIGINT)
            try:
                stopped = server.wait(timeout=120)
            except subprocess.TimeoutExpired:
                server.kill()
                stopped = None
            reader.join()
        assert stopped == 130, "".join(last)
        assert "Traceback" not in "".join(last)


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    """A fresh session, with fixed seeds, so that every run of the tests judges the same results."""
    browser.driver.get(address)
    browser.find("#create-go")
    yield browser
    assert browser.hosts() <= {"127.0.0.1"}
    errors = [entry["message"] for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in errors if "favicon" not in message and "manifest" not in message]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return screenshot_folder(tmp_path_factory.mktemp("screenshots"))


def tab(page, name):
    (button,) = [each for each in page.all("button[role=tab]") if each.text.strip() == name and each.is_displayed()]
    button.click()


def setting(page, selector, value=None):
    """Open the drawer, write a number or press a switch, and close it."""
    page.click("#settings .toggle-button")
    if value is None:
        page.click(f"{selector} input")
    else:
        page.write(f"{selector} input", str(value))
        page.find(f"{selector} input").send_keys("\t")
    page.click("#settings .toggle-button")


def seeded(page, seed):
    setting(page, "#new-seed")
    setting(page, "#seed", seed)


def create(page, prompt, kind="Video"):
    page.write("#create-prompt textarea", prompt)
    page.click(f"#create-kind input[value='{kind}']")
    page.click("#create-go")


def wrong(reading, scene, but=()):
    return [name for name, right in reading.right(scene).items() if not right and name not in but]


def test_create_edit_and_ask(page, pictures):
    seeded(page, 0)
    page.watch("#create-stage")
    create(page, CIRCLE[0])
    page.find("#create-stage video")
    clip = page.served_file("#create-stage video")
    assert not wrong(read_scene(clip), CIRCLE[1])
    texts = page.seen()
    assert any(re.search(r"Step 7 of 20, about \d+ \w+ left", text) for text, _ in texts)
    assert any(previews for _, previews in texts)
    assert "seed 0" in page.text("#create-stage")
    record = read_media_record(clip)
    assert (record["prompt"], record["seed"]) == (CIRCLE[0], 0)
    page.screenshot("create", pictures)

    page.click("#create-to-edit")
    page.find("#edit-shown video")
    page.write("#edit-prompt textarea", "make it blue")
    page.click("#edit-go")
    page.find("#edit-stage .ov-beside video")
    edited = page.served_file("#edit-stage .ov-beside figure:nth-of-type(2) video")
    assert not wrong(read_scene(edited), Scene("blue", "circle", "large", "black", "left"))
    shown = page.served_file("#edit-stage .ov-beside figure:nth-of-type(1) video")
    assert np.abs(load_video(shown).frames.astype(int) - load_video(clip).frames).mean() < 3
    page.screenshot("edit", pictures)
    page.click("#edit-stage label[for$=slider]")
    slider = page.find("#edit-stage input[type=range]")
    slider.send_keys(*["\ue012"] * 10)  # the arrow to the left, as without a mouse
    assert "--cut: 40%" in page.find("#edit-stage .ov-wipe").get_attribute("style")
    page.screenshot("edit-slider", pictures)
    page.click("#edit-stage label[for$=difference]")
    difference = load_video(page.served_file("#edit-stage .ov-difference video")).frames
    assert difference.max() > 100
    assert np.median(difference) < 10

    page.click("#edit-to-ask")
    page.find("#ask-shown video")
    page.write("#ask-prompt textarea", "what color is it?")
    page.click("#ask-go")
    assert page.find("#ask-stage .ov-words").text == "blue"
    page.screenshot("ask", pictures)

    tab(page, "Gallery")
    page.until(lambda: len(page.all("#gallery-results .thumbnail-item")) == 2, "two results in the gallery")
    page.screenshot("gallery", pictures)


def test_chat_generates_edits_what_it_made_and_answers(page, pictures):
    seeded(page, 0)
    tab(page, "Chat")

    def say(message, turn):
        page.write("#chat-message textarea", message)
        page.find("#chat-message textarea").send_keys("\n")
        page.until(
            lambda: (
                len(page.all("#chat-messages .bot"))
                and thoughts(page) == turn
                and not page.all("#chat-stage .ov-busy")
            ),
            f"an answer to {message!r}",
        )

    say(CIRCLE[0], 1)
    assert not wrong(read_scene(record_of_chat(page, 1)), CIRCLE[1])
    say("make it blue", 2)
    assert not wrong(read_scene(record_of_chat(page, 2)), Scene("blue", "circle", "large", "black", "left"))
    say("what color is it?", 3)
    assert page.all("#chat-messages .bot")[-1].text.strip().splitlines()[-1] == "blue"
    page.screenshot("chat", pictures)


def thoughts(page):
    return page.find("#chat-messages").get_attribute("textContent").count("Thought")


def record_of_chat(page, number):
    """The file of the `number`-th clip of a conversation."""
    clips = page.until(
        lambda: (found := page.all("#chat-messages video")) and len(found) >= number and found, "a clip"
    )
    return served_path(clips[number - 1].get_attribute("src"))


def test_cancelling_ends_the_call_of_this_tab(page):
    setting(page, "#num-inference-steps", 5000)
    create(page, CIRCLE[0])
    page.until(lambda: "Step" in page.text("#create-stage"), "a step")
    page.click("#create-cancel")
    page.until(lambda: "Cancelled after step" in page.text("#create-stage"), "the end of the call")
    setting(page, "#num-inference-steps", 2)
    page.click("#create-go")
    page.find("#create-stage video")


def test_two_tabs_at_once_get_their_own_results(page, address):
    seeded(page, 0)
    create(page, CIRCLE[0])
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.driver.get(address)
    page.find("#create-go")
    seeded(page, 0)
    create(page, TRIANGLE[0])
    page.find("#create-stage video")
    assert not wrong(read_scene(page.served_file("#create-stage video")), TRIANGLE[1])
    page.driver.close()
    page.driver.switch_to.window(first)
    page.find("#create-stage video")
    assert not wrong(read_scene(page.served_file("#create-stage video")), CIRCLE[1])


def test_a_seed_repeats_an_image_and_errors_are_sentences(page):
    page.click("#create-go")
    page.until(lambda: "The prompt is empty" in page.text("#create-stage [role=alert]"), "an error")
    assert "Traceback" not in page.text("body")
    create(page, SQUARE[0], "Image")
    first = page.served_file("#create-stage img:not(.ov-preview)")
    setting(page, "#new-seed")  # the field of the seed has the one that was used
    page.click("#create-go")
    page.until(lambda: page.served_file("#create-stage img") != first, "another result")
    second = page.served_file("#create-stage img:not(.ov-preview)")
    assert first != second
    assert np.array_equal(load_image(first), load_image(second))
    assert read_media_record(first)["seed"] == read_media_record(second)["seed"]


def nameless(page):
    """What a person can reach or see that has no name; gradio measures its tabs with buttons that nobody can reach."""
    parts = page.all("button:not([tabindex='-1']), input, textarea, select, video, img, progress")
    return [p.get_attribute("outerHTML")[:160] for p in parts if p.is_displayed() and not p.accessible_name.strip()]


def test_the_keyboard_and_screen_readers_reach_everything(page):
    page.click("#settings .toggle-button")
    for name in ("Create", "Edit", "Ask", "Chat", "Gallery"):
        tab(page, name)
        found = page.until(lambda: {"nameless": nameless(page)}, "a page that stays")
        assert not found["nameless"], name
    tab(page, "Create")
    page.write("#create-prompt textarea", SQUARE[0])
    page.find("#create-prompt textarea").send_keys("\t")
    assert page.driver.switch_to.active_element.get_attribute("type") == "radio"
