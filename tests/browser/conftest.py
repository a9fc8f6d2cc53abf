"""The page as anyone starts it, with this repository's own weights, and a browser without a screen to look at it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from hivilt import app
from processes import free_port

# Of a desktop and of a phone.
WINDOWS = {
    1300: {"width": 1300, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    390: {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
}


def pytest_addoption(parser):
    parser.addoption(
        "--screenshot", metavar="PATH", help="where to write an image of the page with what a search found"
    )
    parser.addoption("--screenshots", metavar="FOLDER", help="where to write an image of each step at each width")


@pytest.fixture(scope="session")
def others(tmp_path_factory) -> Path:
    """A second folder of images."""
    folder = tmp_path_factory.mktemp("others")
    for name in ("cat", "coffee"):
        shutil.copy(app.PHOTOGRAPHS / f"{name}.jpg", folder)
    return folder


@pytest.fixture(scope="session")
def proxy():
    """A port that everything which would leave this machine is sent to; nothing may ever knock."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.fixture(scope="session")
def address(others, proxy, tmp_path_factory) -> str:
    """Where `python app.py` says that the page is; started from another folder, and free to ask the Hub."""
    folder = tmp_path_factory.mktemp("server")
    away = "http://{}:{}".format(*proxy.getsockname())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), away)
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    flags = ["--port", str(free_port()), "--images", str(app.PHOTOGRAPHS), str(others)]
    with (folder / "errors").open("w+") as errors:
        command = [sys.executable, app.__file__, *flags]
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            line = server.stdout.readline()
            assert "http://" in line, (folder / "errors").read_text()[-3000:]
            yield line.split()[4]
            assert server.poll() is None, (folder / "errors").read_text()[-3000:]
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Chromium without a screen, a profile or a way out of this machine."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(programs.values()):
        raise FileNotFoundError("The browser test needs Debian's packages: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in [
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, Service(programs["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(params=WINDOWS)
def browser(request, chromium, address):
    """The browser, at each width, with the page just opened. In the end it has asked nobody else for anything and met no
    error."""
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", WINDOWS[request.param])
    chromium.get("about:blank")
    for kind in ("performance", "browser"):
        chromium.get_log(kind)
    chromium.get(address)
    yield chromium
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
    assert urls, "no request was logged"
    hosts = {urlsplit(url).hostname for url in urls if urlsplit(url).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {"127.0.0.1"}
    assert not [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
