"""`python app.py` in a real browser, with what Debian's packages chromium and chromium-driver install.

make browser                                    not part of `make test`
make browser ARGS="--screenshot docs/app.png"   writes README's picture anew
"""

from pathlib import Path

import easy_vqa
import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from hivilt import app

PICTURE = 12  # of easy-VQA's test split: a red triangle


def wait(browser, condition, what: str = ""):
    """What `condition` gives once it is true; the page draws things anew at any time."""
    passing = [NoSuchElementException, StaleElementReferenceException]
    return WebDriverWait(browser, 30, 0.1, passing).until(lambda _: condition(), what)


def one(browser, selector: str):
    return browser.find_element(By.CSS_SELECTOR, selector)


def write(browser, place: str, text: str) -> None:
    field = wait(browser, lambda: one(browser, f"{place} textarea, {place} input"))
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(Keys.DELETE, text)


def upload(browser, place: str, path: Path) -> None:
    wait(browser, lambda: one(browser, f"{place} input[type=file]")).send_keys(str(path))
    wait(browser, lambda: one(browser, f"{place} img").get_attribute("src"))


def width(browser, image) -> int:
    """Pixels that the browser has read of a picture; 0: none, or it is broken."""
    return browser.execute_script("return arguments[0].complete ? arguments[0].naturalWidth : 0", image)


def answer(browser, right: str | None = None) -> int:
    """The probability of the best answer, in percent, as it is to be seen, once there is one, or this one."""

    def shown():
        best = one(browser, "#answers [data-testid=label-output-value]").text
        name, percent = one(browser, "#answers .confidence-set").text.split("\n")
        return name == best and best == (right or best) and percent

    return int(wait(browser, shown, f"the answer {right}").removesuffix("%"))


def looked_at(browser) -> str | None:
    """Where the browser has the picture from that shows where the model looked, if it can show it."""
    overlay = one(browser, "#looked img")
    return overlay.get_attribute("src") if width(browser, overlay) == app.SHOWN[0] else None


def refusal(browser) -> str:
    """The message that pops up. Selenium gives only text that can be seen, and this one fades in."""
    return wait(browser, lambda: one(browser, ".toast-body.error .toast-messages").text)


def found(browser) -> list[str]:
    """The captions below the pictures that a search shows, once all of them are there to be seen."""

    def shown():
        images = browser.find_elements(By.CSS_SELECTOR, "#found .thumbnail-item img")
        return len(images) == app.TOP_PICTURES and all(width(browser, image) > 0 for image in images)

    wait(browser, shown)
    return [caption.text for caption in browser.find_elements(By.CSS_SELECTOR, "#found .caption-label")]


@pytest.fixture(scope="session")
def picture() -> Path:
    return Path(easy_vqa.get_test_image_paths()[PICTURE])


def test_ask_and_see_the_answer(browser, picture, request):
    upload(browser, "#picture", picture)
    overlays = set()
    for question, right in [
        ("what shape is in the image?", "triangle"),
        ("is there a blue shape?", "no"),
        ("what color is the shape?", "red"),
    ]:
        write(browser, "#question", question)
        one(browser, "#ask").click()
        assert 50 < answer(browser, right) <= 100
        overlays.add(wait(browser, lambda: {looked_at(browser)} - {None} - overlays, "another overlay").pop())
    assert "Picture encoded before" in one(browser, "#note").text
    # All of it on one screen.
    bottom = browser.execute_script("return document.documentElement.scrollHeight")
    assert bottom <= browser.execute_script("return innerHeight")
    if path := request.config.getoption("--screenshot"):
        assert browser.save_screenshot(path)


def test_an_example_is_two_clicks(browser):
    wait(browser, lambda: one(browser, "#examples tbody tr")).click()
    wait(browser, lambda: width(browser, one(browser, "#picture img")) > 0)
    one(browser, "#ask").click()
    assert answer(browser) > 50
    wait(browser, lambda: looked_at(browser))


def test_enter_asks_too_and_another_picture_clears_the_answer(browser, picture, pictures):
    upload(browser, "#picture", picture)
    write(browser, "#question", "what color is the shape?\n")
    answer(browser, "red")
    one(browser, "#picture button[aria-label*=Remove], #picture button[aria-label*=Clear]").click()
    wait(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, "#answers [data-testid=label-output-value]"))


def test_what_cannot_be_answered_is_said_and_the_next_is_answered(browser, picture, tmp_path):
    wait(browser, lambda: one(browser, "#ask")).click()
    assert "There is no picture yet" in refusal(browser)
    browser.refresh()

    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    upload(browser, "#picture", broken)
    write(browser, "#question", "is it red?\n")
    assert "'broken.png' is not a readable picture" in refusal(browser)
    browser.refresh()

    upload(browser, "#picture", picture)
    one(browser, "#ask").click()
    assert "There is no question yet" in refusal(browser)
    write(browser, "#question", "what color is the shape?\n")
    answer(browser, "red")


def test_search_and_see_the_pictures(browser, pictures):
    wait(browser, lambda: one(browser, "#ask").is_displayed())
    tabs = browser.find_elements(By.CSS_SELECTOR, "[role=tab]")
    next(tab for tab in tabs if tab.text == "Search").click()
    wait(browser, lambda: one(browser, "#search")).click()
    assert "one of the two" in refusal(browser)

    write(browser, "#words", "red heart\n")
    first = found(browser)
    assert first[0].endswith("heart")
    scores = [float(caption.split()[0]) for caption in first]
    assert scores == sorted(scores, reverse=True)

    one(browser, "#rerank input").click()
    one(browser, "#search").click()
    wait(browser, lambda: found(browser) != first)

    write(browser, "#words", "")
    upload(browser, "#like", pictures / "red heart.png")
    one(browser, "#search").click()
    wait(browser, lambda: found(browser)[0] == "1.000 red heart")


def test_the_server_asked_nobody_else(address, proxy):
    with pytest.raises(BlockingIOError):
        proxy.accept()
