"""`python app.py` in a real browser, at the widths of a desktop and a phone, over the photographs of this repository; with
what Debian's packages chromium and chromium-driver install.

make browser                                                 not part of `make test`
make browser ARGS="--screenshot docs/app.png"                writes README's image anew
make browser ARGS="--screenshots outputs/screens"            an image of each step, to be looked at
"""

from pathlib import Path

import pytest
from PIL import Image
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from hivilt import app

DRAWING = app.ROOT / "docs" / "drawing.png"  # a red triangle
THREE = ["what shape is in the image?", "what color is the shape?", "is there a blue shape?"]
# What sticks out of the window at its side.
OUTSIDE = """return [...document.querySelectorAll("body *")].filter(one => {
  const box = one.getBoundingClientRect()
  return box.width && box.height && getComputedStyle(one).visibility != "hidden" && (box.left < -1 || box.right > innerWidth + 1)
}).map(one => one.outerHTML.slice(0, 200))"""
# What a thumb cannot hit; of a checkbox its label counts.
SMALL = """return [...document.querySelectorAll("button, textarea, input, [role=tab]")].filter(one => {
  const box = (one.type == "checkbox" ? one.closest("label") : one).getBoundingClientRect()
  return box.width && box.height && getComputedStyle(one).visibility != "hidden" && (box.width < 40 || box.height < 40)
}).map(one => one.outerHTML.slice(0, 200))"""
IN_SIGHT = """const box = arguments[0].getBoundingClientRect()
return box.height > 0 && box.top >= 0 && box.bottom <= innerHeight"""


def wait(browser, condition, what: str = ""):
    """What `condition` gives once it is true; the page draws things anew at any time."""
    passing = [NoSuchElementException, StaleElementReferenceException]
    return WebDriverWait(browser, 30, 0.1, passing).until(lambda _: condition(), what)


def one(browser, selector: str):
    return browser.find_element(By.CSS_SELECTOR, selector)


def every(browser, selector: str) -> list:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def click(browser, selector: str, place: int = 0) -> None:
    """Clicks on what is to be seen."""
    found = wait(browser, lambda: [one for one in every(browser, selector) if one.is_displayed()][place:], selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found[0])
    found[0].click()


def write(browser, place: str, text: str) -> None:
    field = wait(browser, lambda: one(browser, f"{place} textarea, {place} input"))
    wait(browser, field.is_displayed)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(Keys.DELETE, text)


def tab(browser, name: str) -> None:
    wait(browser, lambda: [one for one in every(browser, "[role=tab]") if one.text == name and one.is_displayed()])
    next(one for one in every(browser, "[role=tab]") if one.text == name and one.is_displayed()).click()


def is_drawn(browser, image) -> bool:
    """Whether the browser has read an image and can show it."""
    return browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", image)


def shown_image(browser) -> str | None:
    """Where the image that is asked comes from, once it is to be seen."""
    image = one(browser, "#image img")
    return image.get_attribute("src") if image.is_displayed() and is_drawn(browser, image) else None


def upload(browser, place: str, path: Path) -> None:
    wait(browser, lambda: one(browser, f"{place} input[type=file]")).send_keys(str(path))


def answers(browser, place: str = "#answers") -> list[tuple[str, str]]:
    """Questions with their best answers, as they are to be seen."""
    return [
        (one(row, ".question").text, one(row, ".best").text.rpartition(" ")[0].rstrip("0123456789 ><"))
        for row in every(browser, f"{place} li")
    ]


def note(browser, text: str, place: str = "#note"):
    """The line that says how it went, once it holds a text."""
    return wait(browser, lambda: text in (line := one(browser, place)).text and line, text)


def found(browser, count: int) -> list[str]:
    """The captions of the images that a search shows, once all of them can be seen."""

    def shown():
        images = every(browser, "#found .thumbnail-item img")
        return len(images) == count and all(is_drawn(browser, image) for image in images)

    wait(browser, shown, f"{count} images")
    return [caption.text for caption in every(browser, "#found .caption-label")]


@pytest.fixture
def look(browser, request, tmp_path):
    """A function that looks at the page: nothing sticks out of the window, and on a phone nothing is too small to hit."""
    folder = Path(request.config.getoption("--screenshots") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def looked(name: str) -> None:
        width = browser.execute_script("return innerWidth")
        assert browser.save_screenshot(str(folder / f"{width}-{name}.png"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(OUTSIDE) == []
        if width < 640:
            assert browser.execute_script(SMALL) == []

    return looked


def test_it_opens_with_photographs_and_finds_them_by_words(browser, look, request):
    assert len(found(browser, 17)) == 17
    assert "was trained on" in one(browser, "#about-search").text
    look("start")
    write(browser, "#words", "a cat\n")
    captions = found(browser, app.TOP_IMAGES)
    scores = [float(caption.split()[-1]) for caption in captions]
    assert scores == sorted(scores, reverse=True)
    look("search")
    if (path := request.config.getoption("--screenshot")) and browser.execute_script("return innerWidth") == 1300:
        assert browser.save_screenshot(path)

    # All within the box that holds them, two beside each other on a phone.
    boxes = [image.rect for image in every(browser, "#found .thumbnail-item")]
    around = one(browser, "#found").rect
    for box in boxes:
        assert around["x"] <= box["x"] and box["x"] + box["width"] <= around["x"] + around["width"]
        assert around["y"] <= box["y"] and box["y"] + box["height"] <= around["y"] + around["height"]
    columns = len({round(box["x"]) for box in boxes})
    assert columns == (5 if browser.execute_script("return innerWidth") == 1300 else 2)

    click(browser, "#more button")
    wait(browser, lambda: one(browser, "#rerank input").is_displayed())
    look("more")
    one(browser, "#rerank input").click()
    click(browser, "#search")
    wait(browser, lambda: found(browser, app.TOP_IMAGES) != captions)


def test_an_image_finds_others_like_it_and_a_folder_can_be_chosen(browser, look):
    found(browser, 17)
    click(browser, "#more button")
    upload(browser, "#like", app.PHOTOGRAPHS / "coffee.jpg")
    wait(browser, lambda: is_drawn(browser, one(browser, "#like img")))
    click(browser, "#search")
    wait(browser, lambda: found(browser, app.TOP_IMAGES)[0] == "coffee 1.00")
    write(browser, "#words", "a cat")
    click(browser, "#search")
    note(browser, "one of the two", "#found-note")
    assert found(browser, app.TOP_IMAGES)[0] == "coffee 1.00"
    look("like")

    write(browser, "#words", "")
    click(browser, "#folder input")
    click(browser, "#folder [role=option], [role=listbox] [role=option]", 1)
    wait(browser, lambda: found(browser, 2) == ["cat", "coffee"])


def test_a_result_opens_large_and_is_asked_several_questions(browser, look):
    captions = found(browser, 17)
    tab(browser, "Search")
    click(browser, "#found .thumbnail-item", captions.index("cat"))
    assert wait(browser, lambda: shown_image(browser))
    wait(browser, lambda: one(browser, "#question textarea").is_displayed())
    assert "answers and no others" in one(browser, "#about-answers").text
    look("opened")
    write(browser, "#question", "\n".join(THREE))
    click(browser, "#ask")
    wait(browser, lambda: [question for question, _ in answers(browser)] == THREE)
    note(browser, "3 questions answered")
    # Directly below the question, in sight.
    wait(browser, lambda: browser.execute_script(IN_SIGHT, every(browser, "#answers li")[0]))
    look("answers")


def test_answers_and_history_stay_through_what_is_refused(browser, look, tmp_path):
    tab(browser, "Ask")
    click(browser, "#ask")
    note(browser, "There is no image yet")
    upload(browser, "#image", DRAWING)
    wait(browser, lambda: shown_image(browser))
    right = list(zip(THREE, ["triangle", "red", "no"], strict=True))
    write(browser, "#question", "\n".join(THREE))
    click(browser, "#ask")
    wait(browser, lambda: answers(browser) == right)

    # What is refused leaves them.
    write(browser, "#question", " ")
    click(browser, "#ask")
    line = note(browser, "There is no question yet")
    wait(browser, lambda: browser.execute_script(IN_SIGHT, line))
    assert answers(browser) == right
    look("refused")

    # Another image clears the answers, not the history; a file that is none shows no broken image.
    click(browser, "#image button[aria-label*=Remove], #image button[aria-label*=Clear]")
    wait(browser, lambda: not answers(browser))
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    upload(browser, "#image", broken)
    line = note(browser, "'broken.png' is not a readable")
    wait(browser, lambda: all(is_drawn(browser, image) for image in every(browser, "#image img")))
    wait(browser, lambda: browser.execute_script(IN_SIGHT, line))
    look("broken")
    Image.new("RGB", (300, 200), "navy").save(tmp_path / "plain.tiff")
    upload(browser, "#image", tmp_path / "plain.tiff")
    wait(browser, lambda: shown_image(browser))
    write(browser, "#question", THREE[1])
    click(browser, "#ask")
    wait(browser, lambda: len(answers(browser)) == 1)
    assert answers(browser, "#history")[1:] == right
    images = every(browser, "#history img")
    assert len(images) == 4 and all(is_drawn(browser, image) for image in images)
    browser.execute_script("document.getElementById('clear').scrollIntoView({block: 'end'})")
    look("history")
    click(browser, "#clear")
    wait(browser, lambda: not every(browser, "#history li"))
    assert len(answers(browser)) == 1


def test_an_example_is_one_click(browser, look):
    tab(browser, "Ask")
    click(browser, "#examples tbody tr", 1)
    wait(browser, lambda: answers(browser) == [("what color is the shape?", "red")])
    assert shown_image(browser)
    look("example")


def test_the_server_asked_nobody_else(address, proxy):
    with pytest.raises(BlockingIOError):
        proxy.accept()
