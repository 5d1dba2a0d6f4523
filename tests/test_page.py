"""The server's page in headless Chromium (Debian: apt-get install chromium), which is spoken to by its pipe.

python tests/test_page.py docs/serving.png   # the picture in docs/serving.md
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPT = "class Stack:\n    def __init__(self):\n"


class Browser:
    """A page in Chromium. Messages of its DevTools protocol are JSON, and end with a zero byte."""

    def __init__(self, folder):
        (theirs, self.out), (self.incoming, back) = os.pipe(), os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]

        def wire() -> None:  # it reads descriptor 3, and writes descriptor 4
            high = [os.dup2(fd, 100 + i) for i, fd in enumerate((theirs, back))]
            for number, fd in enumerate(high, start=3):
                os.dup2(fd, number)

        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=wire,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(back)
        self.held, self.number, self.session, self.problems = b"", 0, {}, []
        pages = self.send("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in pages if each["type"] == "page")
        self.session = {
            "sessionId": self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        }
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params):
        """The result of a command. Complaints of the page that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.held:
                self.held += os.read(self.incoming, 1 << 20)
            line, _, self.held = self.held.partition(b"\0")
            got = json.loads(line)
            if got.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(got["params"])
            if got.get("id") == self.number:
                assert "error" not in got, got
                return got["result"]

    def run(self, script: str):
        """The value of a script."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> None:
        """Wait until a script is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.problems)
            time.sleep(0.05)

    def ask(self, text: str, answers: int) -> None:
        """Write a message as a user does, and wait for the answer."""
        self.run(f"at('text').focus(); at('text').value = {json.dumps(text)}")
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13
        )
        self.wait(f"document.body.dataset.answers == {answers}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.incoming)


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    browser = Browser(tmp_path)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server():
    from test_serve import Server

    server = Server(
        "--batch_size", "2", *[word for name in ("sequential", "tree", "auto") for word in ("--method", name)]
    )
    yield server
    assert server.end() == 0 and server.lines == []


def test_the_page(browser, server):
    """It streams, colours who proposed what, shows its numbers; the next message may have another method."""
    ask = {"model": "python-7m", "prompt": PROMPT, "max_tokens": 60, "temperature": 0}
    expected = server.client.completions.create(**ask).choices[0].text
    browser.send("Page.navigate", url=server.url)
    browser.wait("document.querySelectorAll('#method option').length == 3")
    browser.run("at('tokens').value = 60")
    browser.ask(PROMPT, 1)
    answer = "[...document.querySelectorAll('.answer')].at(-1)"
    spans = f"[...{answer}.querySelectorAll('span')]"
    assert browser.run(f"{spans}.map(each => each.textContent).join('')") == expected
    assert browser.run(f"{spans}.some(each => each.className == 'drafted')")
    assert browser.run(f"{spans}.some(each => each.className == 'own')")
    assert (
        float(browser.run("at('perstep').textContent")) > 1 and browser.run("at('count').textContent") >= "60"
    )
    assert browser.run("document.querySelectorAll('.bar').length") >= 2
    browser.run("at('anew').click(); at('method').value = 'tree'")
    browser.ask(PROMPT, 2)
    assert browser.run(f"{spans}.map(each => each.textContent).join('')") == expected  # whatever drafts
    assert "tree: 60 tokens" in browser.run(f"{answer}.textContent")
    browser.run("at('tokens').value = 0")
    browser.ask("x", 3)
    assert "max_tokens" in browser.run("document.querySelector('.error').textContent")
    browser.problems = [each for each in browser.problems if "400" not in json.dumps(each)]
    assert browser.problems == []


def test_a_text_that_is_html_stays_text(browser, server):
    browser.send("Page.navigate", url=server.url)
    browser.wait("document.querySelectorAll('#method option').length == 3")
    browser.ask("<img src=x onerror='window.bad = 1'><b>bold</b>", 1)
    assert browser.run("document.querySelector('.user').textContent").startswith("<img")
    assert (
        browser.run("[window.bad || 0, document.querySelectorAll('main img, main b').length].join()") == "0,0"
    )


def picture(file: str) -> None:
    """Draw the page after a short conversation."""
    import tempfile

    from test_serve import Server

    server = Server("--batch_size", "1", "--method", "tree", "--method", "sequential", "--method", "auto")
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(folder)
        size = {"width": 1120, "height": 640, "deviceScaleFactor": 1, "mobile": False}
        browser.send("Emulation.setDeviceMetricsOverride", **size)
        browser.send("Page.navigate", url=server.url)
        browser.wait("document.querySelectorAll('#method option').length == 3")
        browser.run("at('tokens').value = 120; at('temperature').value = 0.7")
        browser.ask(PROMPT, 1)
        with open(file, "wb") as output:
            output.write(base64.b64decode(browser.send("Page.captureScreenshot", format="png")["data"]))
        browser.close()
    server.end()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    picture(sys.argv[1])
