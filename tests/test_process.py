"""Programs: closed, full and ASCII streams, and Ctrl-C at any moment.

No test waits for a time to pass: a program says where it is, and is then sent the signal.
"""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT

import generate  # noqa: F401  as a library
import process

BEGIN = "import process\nprocess.begin()\nimport atexit, os, sys, time\n"
RUN = "\nsys.exit(process.run(main))\n"
STAY = "print('inside', flush=True)\n{}time.sleep(600)\n"
NEEDS_FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")


def start(*command: str, path=ROOT, sigint=signal.SIG_DFL, **options) -> subprocess.Popen:
    """A Python process that heeds Ctrl-C: a shell ignores it in what it runs in the background."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(path)} | options.pop("env", {})
    options.setdefault("preexec_fn", partial(signal.signal, signal.SIGINT, sigint))
    return subprocess.Popen([sys.executable, *command], env=environment, **(pipes | options))


def finish(running: subprocess.Popen) -> tuple[int, str, str]:
    out, err = running.communicate(timeout=120)
    return running.returncode, (out or b"").decode(), (err or b"").decode()


def interrupt(running: subprocess.Popen) -> tuple[int, str, str]:
    """Ctrl-C, as soon as the program has said that it is there."""
    assert running.stdout.readline() == b"inside\n"
    running.send_signal(signal.SIGINT)
    return finish(running)


def program(body: str) -> str:
    return BEGIN + "def main():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + RUN


def closing(number: int):
    return partial(os.close, number)


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate.py", "bench.py", "quantize.py"])
def test_ctrl_c_while_modules_are_imported(tmp_path, name):
    (tmp_path / "torch.py").write_text("import time\n" + STAY.format(""))
    running = start(str(ROOT / name), path=tmp_path)
    assert interrupt(running) == (130, "", "\ninterrupted\n")


@pytest.mark.parametrize(
    "body",
    [
        STAY.format(""),
        "class Last:\n    def __del__(self):\n" + STAY.format("        ").replace("print", "        print", 1)
        + "Last()\ntime.sleep(600)",
        "atexit.register(lambda: (print('inside', flush=True), time.sleep(600)))\nreturn 0",
    ],
    ids=["running", "where exceptions are ignored", "at the end"],
)  # fmt: skip
def test_ctrl_c_in_a_program(body):
    assert interrupt(start("-c", program(body))) == (130, "", "\ninterrupted\n")


def test_ctrl_c_is_ignored_where_nothing_is_left_to_do():
    """The modules are taken down: what was asked for is done, and Python has no handlers any more."""
    last = "class Last:\n    def __del__(self, read=os.read, write=os.write):\n"
    last += "        write(1, b'inside\\n')\n        read(0, 1)\n"
    body = program("global last\nlast = Last()\nreturn 0").replace("def main", last + "def main")
    assert interrupt(start("-c", body)) == (0, "", "")


def test_ctrl_c_stays_ignored_where_it_was():
    body = "import signal\nprint('inside', flush=True)\nsys.stdin.readline()\n"
    body += "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\nprint('done')\nreturn 0"
    running = start("-c", program(body), sigint=signal.SIG_IGN)
    assert running.stdout.readline() == b"inside\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(b"go on\n", timeout=60)
    assert (running.returncode, out, err) == (0, b"done\n", b"")


def test_a_library_leaves_streams_and_signals_alone():
    assert signal.getsignal(signal.SIGINT) is not process.leave
    assert sys.unraisablehook is not process.ignore_or_leave
    assert not isinstance(getattr(getattr(sys.stderr, "buffer", None), "raw", None), process.Forgiving)


# ---- streams -------------------------------------------------------------------------------------

SPEAKS = """sys.stdin.read()
assert open(os.devnull).fileno() > 2
print('text')
print('message', file=sys.stderr)
return 0"""


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_closed_stream_is_no_error_and_nothing_takes_its_place(number):
    done = finish(start("-c", program(SPEAKS), stdin=subprocess.DEVNULL, preexec_fn=closing(number)))
    assert done == (0, "" if number == 1 else "text\n", "" if number == 2 else "message\n")


@NEEDS_FULL
@pytest.mark.parametrize("unbuffered", ["", "1"])  # does it fail at the end, or in `print`?
def test_a_full_disk_is_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        running = start("-c", program(SPEAKS), stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
        status, _, err = finish(running)
    error = "error: [Errno 28] No space left on device\n"
    assert (status, err) == (1, error if unbuffered else f"message\n{error}")


@NEEDS_FULL
def test_messages_that_cannot_be_written_are_lost():
    with open("/dev/full", "w") as full:
        assert finish(start("-c", program(SPEAKS), stderr=full)) == (0, "text\n", "")


def test_a_reader_that_has_left_is_no_error():
    running = start("-c", program("sys.stdin.readline()\nprint('text')\nreturn 0"))
    running.stdout.close()
    running.stdin.write(b"\n")
    running.stdin.close()
    assert running.stderr.read() == b"" and running.wait(60) == 141


def test_characters_that_the_terminal_lacks_are_spelled_out():
    body = r"print('\xe9 \u2603'); print('\xe9', file=sys.stderr); return 0"
    done = finish(start("-c", program(body), env={"PYTHONIOENCODING": "ascii"}))
    assert done == (0, "\\xe9 \\u2603\n", "\\xe9\n")


def test_a_traceback_of_our_own_stays_one():
    """Only what a user or a shell can do is turned into a line."""
    status, out, err = finish(start("-c", program("print('text')\nreturn 1 / 0")))
    assert (status, out) == (1, "text\n") and "ZeroDivisionError" in err


def test_json_with_stderr_closed_is_json():
    flags = ("--compile", "none", "--max_new_tokens", "3", "--method", "autoregressive", "--json")
    status, out, _ = finish(start(str(ROOT / "generate.py"), *flags, preexec_fn=closing(2)))
    assert status == 0 and len(json.loads(out)["outputs"][0]["token_ids"]) == 3
