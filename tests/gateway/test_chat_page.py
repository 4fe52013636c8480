"""The chat page in a real Chromium: two answers at once, stopping, keys, a phone's width, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.stand_in_engine import write_stand_in_repository
from tests.gateway.conftest import Running, quick_gateway, quick_triton
from tests.waiting import wait_for

webdriver: Any = pytest.importorskip("selenium.webdriver")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [pytest.mark.triton, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here")]
LONG = "/again 400 sheep "


class Page:
    """The page in a browser, as a person sees it."""

    def __init__(self, driver: Any, running: Running) -> None:
        self.driver, self.running = driver, running
        driver.get(running.gateway.url)
        assert wait_for(lambda: self.text("#model") == running.model)

    def text(self, selector: str) -> str:
        # In one step: the page draws its elements anew while an answer comes.
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).innerText", selector))

    def choose(self, number: int) -> None:
        """Click on a conversation, in one step: the list is drawn again while answers come."""
        self.driver.execute_script("document.querySelectorAll('#list button')[arguments[0]].click()", number)

    def shown(self, selector: str) -> bool:
        return bool(self.driver.find_element(By.CSS_SELECTOR, selector).is_displayed())

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def send(self, text: str) -> None:
        self.press(text, Keys.ENTER)

    @property
    def busy(self) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, "#list .busy"))

    @property
    def answer(self) -> str:
        return str(self.driver.execute_script("return [...document.querySelectorAll('.assistant')].at(-1).innerText"))

    def style(self, selector: str, name: str) -> str:
        return str(self.driver.find_element(By.CSS_SELECTOR, selector).value_of_css_property(name))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,760", *quiet):
        options.add_argument(argument)
    options.binary_location = CHROMIUM
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def unhurried(engine_repository: Path) -> Iterator[Running]:
    """A gateway in front of a stand-in at a pace that one can watch: 50 tokens a second."""
    output = engine_repository.with_name("watched")
    write_stand_in_repository(engine_repository, output, step_ms=20)
    with quick_triton(output) as triton, quick_gateway(triton, output) as running:
        yield running


@pytest.fixture
def page(driver: Any, unhurried: Running) -> Iterator[Page]:
    yield Page(driver, unhurried)
    assert [entry for entry in driver.get_log("browser") if entry["source"] == "javascript"] == []


def test_two_conversations_answer_at_once_and_each_stops_alone(page: Page) -> None:
    page.send(LONG)
    page.press(Keys.ALT, "n")
    page.press(Keys.NULL)
    page.send("/again 400 goats ")
    assert page.busy == 2
    assert wait_for(lambda: "goats" in page.answer and float(page.text("#rate")) > 0)
    assert wait_for(lambda: int(page.text("#running")) == 2)
    page.press(Keys.ESCAPE)
    assert wait_for(lambda: "Stopped." in page.answer)
    stopped = page.answer
    page.choose(1)
    assert "sheep" in page.answer
    assert page.shown("#stop")
    page.driver.find_element(By.ID, "stop").click()
    assert wait_for(lambda: page.busy == 0)
    assert wait_for(lambda: page.running.metric("trtqwen_gateway_in_flight") == 0)
    page.choose(0)
    assert page.answer == stopped


def test_an_answer_is_shown_as_text_with_its_speed(page: Page) -> None:
    page.send("<b>你好</b> 🙂 <img src=x onerror=alert(1)>")
    assert wait_for(lambda: "tokens/s" in page.answer)
    assert page.answer.startswith("<b>你好</b> 🙂 <img src=x onerror=alert(1)>")
    assert page.driver.find_elements(By.CSS_SELECTOR, "#log img") == []


def test_an_answer_s_markdown_is_drawn(page: Page) -> None:
    answer = "# Title\n\nSome **bold** and `x < 1`,\nstill.\n- one\n  2. two\n\n"
    answer += "```python\n# no title\n**code**\n```\nend"
    page.driver.execute_script("document.getElementById('prompt').value = arguments[0]", answer)
    page.press(Keys.ENTER)
    assert wait_for(lambda: "tokens/s" in page.answer)
    drawn = page.driver.execute_script(
        "return [...document.querySelectorAll('.assistant h2, .assistant strong, .assistant code, .assistant .item, "
        ".assistant pre')].map(node => [node.tagName, node.textContent])"
    )
    assert drawn == [
        ["H2", "Title"],
        ["STRONG", "bold"],
        ["CODE", "x < 1"],
        ["P", "one"],
        ["P", "two"],
        ["PRE", "# no title\n**code**\n"],
    ]
    assert "Some bold and x < 1,\nstill." in page.answer
    assert page.shown(".code button")


def test_an_error_is_told_and_the_conversation_goes_on(page: Page) -> None:
    page.send("/fail the engine is out of tea")
    assert wait_for(lambda: page.busy == 0)
    assert "the engine is out of tea" in page.answer
    page.send("still there?")
    assert wait_for(lambda: page.answer.startswith("still there?"))


def test_a_phone_and_the_dark(page: Page) -> None:
    light = page.style("body", "background-color")
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert page.style("body", "background-color") != light
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.send("a word " * 40)
    assert wait_for(lambda: "tokens/s" in page.answer)
    assert page.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert page.shown("#prompt")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_server_with_keys_asks_for_one(
    driver: Any, another_gateway: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text("keys:\n- name: me\n  key: a-key-of-sixteen-letters\n")
    running = another_gateway(api_keys=keys)
    driver.get(running.gateway.url)
    dialog = driver.find_element(By.ID, "ask")
    assert wait_for(dialog.is_displayed)
    driver.switch_to.active_element.send_keys("a-key-of-sixteen-letters", Keys.ENTER)
    assert wait_for(lambda: driver.find_element(By.ID, "model").text == "qwen")
    driver.execute_script("sessionStorage.clear()")
    driver.get_log("browser")  # the refused requests
