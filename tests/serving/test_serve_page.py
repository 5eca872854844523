"""The page of a real server in Chromium, as its users have it."""

import json
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from absent import absent
from playwright.sync_api import Browser, Error, Page, Route, expect, sync_playwright
from serve_process import ServeProcess

from hasten.serve.page_route import FOLDER, PAGE_FILES

# no sandbox: containers run as root; the rest keeps the browser itself off the network
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
expect.set_options(timeout=60_000)  # ms: what does not come fails, however busy the machine is
HOSTILE = "<img src=x onerror='hacked=1'><script>hacked=1</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, else Playwright's own."""
    with sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(
                executable_path=shutil.which("chromium") or shutil.which("chromium-browser"), args=FLAGS
            )
        except Error as error:
            absent(
                f"no Chromium: apt-get install chromium, or playwright install chromium ({str(error).splitlines()[0]})"
            )
        yield started
        started.close()


class Visit:
    """One tab.

    Attributes:
        requested: addresses of all requests.
        complaints: what the browser's console says of errors, and exceptions of the page's scripts.
    """

    def __init__(self, browser: Browser, **context: Any) -> None:
        self.tab: Page = browser.new_context(**context).new_page()
        self.requested: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self.requested.append(request.url))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)

    def open(self, server: ServeProcess) -> Page:
        self.tab.goto(server.url)
        return self.tab


@pytest.fixture
def visit(browser: Browser, server: ServeProcess) -> Iterator[Visit]:
    """A tab that asks no other server for anything, in whatever test uses it."""
    visit = Visit(browser)
    yield visit
    visit.tab.context.close()
    hosts = {re.sub(r"^(https?://[^/]+)/.*$", r"\1", url) for url in visit.requested}
    assert len(hosts) == 1, hosts
    assert not visit.complaints


def amend_requests(tab: Page, **fields: Any) -> list[dict[str, Any]]:
    """Adds fields that the page has no control for. The list fills with what the page itself asked."""
    asked: list[dict[str, Any]] = []

    def amend(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.continue_(post_data=json.dumps(asked[-1] | fields))

    tab.route("**/completions", amend)
    return asked


def set_options(tab: Page, **options: object) -> None:
    tab.get_by_text("Sampling", exact=True).click()
    for name, value in options.items():
        tab.fill(f"[name={name}]", str(value))


def send(tab: Page, prompt: str, kind: str = "Completion") -> None:
    tab.get_by_label(kind).check()
    tab.get_by_label("Prompt", exact=True).fill(prompt)
    tab.get_by_role("button", name="Send").click()


def until_ended(tab: Page) -> None:
    expect(tab.get_by_role("button", name="Send")).to_be_enabled()


def figures(server: ServeProcess) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/page/figures") as answer:
        values: dict[str, Any] = json.load(answer)
        return values


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s, "it took too long"
        time.sleep(0.05)


def test_an_answer_grows_and_stop_ends_it(visit: Visit, server: ServeProcess) -> None:
    tab = visit.open(server)
    amend_requests(tab, ignore_eos=True)
    set_options(tab, max_tokens=1900)
    send(tab, "The model reads")
    answer = tab.locator(".answer")
    lengths: list[int] = []
    for _ in range(5):
        wait_for(lambda: len(answer.inner_text()) > max(lengths, default=0))
        lengths.append(len(answer.inner_text()))
    assert figures(server)["num_running"] == 1
    stop = tab.get_by_role("button", name="Stop")
    assert stop.is_enabled(), "it ended before it could be stopped"
    stop.click()
    expect(tab.locator(".facts")).to_contain_text("stopped")
    expect(tab.locator(".facts")).to_have_text(
        re.compile(r"TTFT [\d.]+ m?s · ≈ [\d.]+ tokens/s after it · ≈ \d+ tokens")
    )
    wait_for(lambda: figures(server)["num_running"] == 0 == figures(server)["num_used_kv_blocks"])
    text = answer.inner_text()
    send(tab, "and then")  # the page works on
    tab.keyboard.press("Escape")
    until_ended(tab)
    assert answer.first.inner_text() == text


def test_a_long_fast_answer_is_shown_as_it_comes(visit: Visit, server: ServeProcess) -> None:
    words = [f"word{number} " for number in range(8000)]
    events = [{"choices": [{"index": 0, "text": word, "finish_reason": None}]} for word in words]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    visit.tab.route("**/completions", lambda route: route.fulfill(body=body))
    tab = visit.open(server)
    send(tab, "x")
    expect(tab.locator(".facts")).to_contain_text("8000 tokens")
    until_ended(tab)
    assert tab.locator(".answer").evaluate("node => node.textContent") == "".join(words)


def test_what_is_said_of_an_answer_is_the_servers_count(visit: Visit, server: ServeProcess) -> None:
    tab = visit.open(server)
    asked = amend_requests(tab, ignore_eos=True)
    set_options(tab, max_tokens=21, temperature=0, top_k=5, seed=3, stop="\0")
    send(tab, "The model")
    until_ended(tab)
    # where all tokens but the first come in one read, there is no rate
    facts = re.compile(r"^TTFT .* ms · (.* tokens/s after it · )?21 tokens · max tokens reached$")
    expect(tab.locator(".facts")).to_have_text(facts)
    assert asked == [
        {
            "prompt": "The model",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 21,
            "temperature": 0,
            "top_k": 5,
            "seed": 3,
            "stop": "\0",
        }
    ]


def test_a_conversation_is_sent_whole_and_can_be_cleared(visit: Visit, server: ServeProcess) -> None:
    tab = visit.open(server)
    asked = amend_requests(tab, ignore_eos=True)
    set_options(tab, max_tokens=8)
    tab.get_by_label("System message").fill("Be brief.")
    for prompt in ("Hello", "Again"):
        send(tab, prompt, "Chat")
        until_ended(tab)
    answer = tab.locator(".answer").first.evaluate("node => node.textContent")
    assert asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Again"},
    ]
    tab.get_by_role("button", name="Clear").click()
    expect(tab.locator("article")).to_have_count(0)
    send(tab, "Hello", "Chat")
    until_ended(tab)
    assert [message["content"] for message in asked[2]["messages"]] == ["Be brief.", "Hello"]


def test_charts_follow_the_server(visit: Visit, server: ServeProcess) -> None:
    tab = visit.open(server)
    amend_requests(tab, ignore_eos=True)
    set_options(tab, max_tokens=1900)
    send(tab, "The model reads")
    speed = tab.get_by_role("img", name="Output tokens/s")
    expect(tab.get_by_role("img", name="Requests")).to_have_attribute("aria-label", re.compile("now: running 1"))
    expect(speed).to_have_attribute("aria-label", re.compile("now: [1-9]"))
    expect(tab.locator("figure .plot path")).to_have_count(5)
    for title in ("Output tokens/s", "TTFT", "Requests", "KV cache"):
        chart = tab.locator("figure", has_text=title)
        heights = chart.locator(".plot path").first
        # 100 is the axis, 0 the top; the request goes on, as its first blocks are too small a share to be seen
        expect(heights, f"{title} leaves 0").to_have_attribute("d", re.compile(r"[ML][\d.]+ \d\d?\.\d"))
        drawn = [float(y) for y in re.findall(r"[ML][\d.]+ ([-\d.]+)", heights.get_attribute("d") or "")]
        assert all(0 <= y <= 100 for y in drawn), f"{title} leaves its plot"
    tab.keyboard.press("Escape")
    expect(speed).to_have_attribute("aria-label", re.compile("now: 0$"))
    speed.focus()
    for _ in range(40):
        tab.keyboard.press("ArrowLeft")
        if re.search(r"\d s ago: [1-9]", speed.get_attribute("aria-label") or ""):
            break
    else:
        pytest.fail("no earlier value was read")
    tab.keyboard.press("Tab")
    expect(speed).to_have_attribute("aria-label", re.compile("now: 0$"))


@pytest.mark.parametrize("kind", ["Chat", "Completion"])
def test_markup_of_a_model_or_a_user_is_text(visit: Visit, server: ServeProcess, kind: str) -> None:
    tab = visit.open(server)
    amend_requests(tab, structured_outputs={"regex": re.escape(HOSTILE)})
    send(tab, HOSTILE, kind)
    until_ended(tab)
    assert tab.locator(".answer").inner_text() == HOSTILE
    assert tab.locator(".prompt").inner_text() == HOSTILE
    assert tab.locator("#answers img, #answers script").count() == 0
    assert tab.evaluate("typeof hacked") == "undefined"


def test_the_browser_reaches_no_other_server_and_runs_no_other_script(browser: Browser, server: ServeProcess) -> None:
    tab = Visit(browser).open(server)
    with socket.create_server(("127.0.0.1", 0)) as other:
        blocked = tab.evaluate(
            """async (url) => {
                const blocked = [];
                document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
                await fetch(url, { signal: AbortSignal.timeout(1000) }).catch(() => {});
                document.body.append(Object.assign(document.createElement("script"), { textContent: "hacked = 1" }));
                document.body.append(Object.assign(document.createElement("img"), { src: url }));
                await new Promise((done) => setTimeout(done, 200));
                return blocked;
            }""",
            f"http://127.0.0.1:{other.getsockname()[1]}/",
        )
        assert sorted(blocked) == ["connect-src", "img-src", "script-src-elem"]
        assert tab.evaluate("typeof hacked") == "undefined"
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.accept()
    tab.context.close()


def test_a_refused_request_says_why_and_gives_the_prompt_back(visit: Visit, server: ServeProcess) -> None:
    tab = visit.open(server)
    set_options(tab, max_tokens=99_999)
    send(tab, "Hello")
    expect(tab.locator("article .error")).to_contain_text("lower max_tokens to")
    expect(tab.get_by_label("Prompt", exact=True)).to_have_value("Hello")
    assert len(visit.complaints) == 1
    assert "400" in visit.complaints.pop()


def test_a_model_without_a_chat_template_is_asked_to_continue(visit: Visit, server: ServeProcess) -> None:
    def without_template(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"has_chat_template": False})

    visit.tab.route("**/page/figures", without_template)
    tab = visit.open(server)
    expect(tab.get_by_label("Chat")).to_be_disabled()
    expect(tab.get_by_label("Completion")).to_be_checked()
    expect(tab.get_by_label("System message")).to_be_hidden()
    tab.unroute_all(behavior="wait")


def test_keys(visit: Visit, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("secret-key\n")
    server = ServeProcess("--api-key-file", str(path), "--served-model-name", HOSTILE).wait_until_ready()
    try:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            figures(server)
        tab = visit.open(server)
        expect(tab.get_by_role("status")).to_have_text("The server asks for an API key.")
        tab.get_by_label("API key").fill("wrong")
        tab.keyboard.press("Enter")
        expect(tab.get_by_role("status")).to_have_text("The server does not know this API key.")
        send(tab, "Hello")
        expect(tab.locator("article .error")).to_contain_text("no valid API key")
        num_refused = visit.requested.count(f"{server.url}/page/figures")
        time.sleep(2.5)
        assert visit.requested.count(f"{server.url}/page/figures") == num_refused  # a refused key is not tried again
        tab.get_by_label("API key").fill("secret-key")
        tab.get_by_role("button", name="Use key").click()
        expect(tab.get_by_role("status")).to_have_text("Ready")
        expect(tab.get_by_label("API key")).to_be_hidden()
        assert tab.get_by_role("heading").inner_text() == HOSTILE
        send(tab, "Hello")
        until_ended(tab)
        assert tab.locator(".answer").last.inner_text()
        tab.reload()
        expect(tab.get_by_role("status")).to_have_text("Ready")
        assert tab.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        assert not any("secret-key" in url for url in visit.requested)
        assert all("401" in line for line in visit.complaints)
        visit.complaints.clear()
    finally:
        server.close()


def test_an_engine_or_a_server_that_is_gone_is_said(visit: Visit) -> None:
    server = ServeProcess().wait_until_ready()
    try:
        tab = visit.open(server)
        status = tab.get_by_role("status")
        amend_requests(tab, ignore_eos=True)
        set_options(tab, max_tokens=1900)
        send(tab, "The model")
        expect(tab.locator(".answer")).not_to_be_empty()
        [engine] = psutil.Process(server.process.pid).children()
        engine.kill()
        expect(tab.locator("article .error")).to_contain_text("the engine process ended")
        expect(status).to_contain_text("No requests now: ")
        expect(status).to_have_text("Ready")
        assert not visit.complaints
    finally:
        server.close()
    expect(status).to_have_text("The server does not answer. It is asked again every second.")
    send(tab, "Hello")
    expect(tab.locator("article .error").last).to_have_text("The server does not answer.")
    assert all("ERR_CONNECTION_REFUSED" in line for line in visit.complaints)
    visit.complaints.clear()


def test_the_keyboard_is_enough(visit: Visit, server: ServeProcess) -> None:
    tab = visit.open(server)
    amend_requests(tab, ignore_eos=True, max_tokens=900)  # twice, with the first answer in the second prompt
    tab.keyboard.type("Hello")  # the prompt has the focus
    tab.keyboard.press("Control+Enter")
    expect(tab.locator("article")).to_have_count(1)
    tab.keyboard.press("Escape")
    until_ended(tab)
    tab.get_by_label("Prompt", exact=True).fill("Hello")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("button", name="Stop")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.get_by_label("Prompt", exact=True)).to_be_focused()


def test_a_phone_needs_no_scrolling_to_the_side(browser: Browser, server: ServeProcess) -> None:
    visit = Visit(browser, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    tab = visit.open(server)
    send(tab, "a" * 300)
    until_ended(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.context.close()


def test_the_page_is_light() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(PAGE_FILES.values())
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 30_000
