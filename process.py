"""process.py: what a program does before its imports and after its end: standard streams, and Ctrl-C.

    import process  # the first import of a program, since the others take seconds

    if __name__ == "__main__":
        process.begin()
    ...
    if __name__ == "__main__":
        sys.exit(process.run(main))

The one idea: whatever a shell does to a program, its user sees at most one line, and never a traceback. It is
for programs alone: who imports gpt-spec as a library keeps the streams and the signals as they are.
"""

from __future__ import annotations

import _signal as signal  # all of it that is needed here: importing the rest takes as long as Python to start
import atexit
import io
import os
import sys

TYPE_CHECKING = False  # as in `typing`, whose import would take as long again
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

INTERRUPTED = 130  # exit status after Ctrl-C
UNREAD = 141  # where the reader of standard output has left


def begin() -> None:
    """Before the imports: streams that can be used, and Ctrl-C that ends the program at once."""
    heed_ctrl_c(leave)
    atexit.register(heed_ctrl_c, signal.SIG_IGN)  # Python would put back the default, which kills
    sys.unraisablehook = ignore_or_leave
    open_closed_streams()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all characters
    forgiving = io.BufferedWriter(Forgiving(sys.stderr.fileno(), "w", closefd=False))
    sys.stderr = io.TextIOWrapper(forgiving, sys.stderr.encoding, "backslashreplace", line_buffering=True)


def heed_ctrl_c(handler: Callable | int) -> None:
    """Have Ctrl-C call this. Not where it is ignored, as a shell wants of what runs in the background."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def leave(*_: Any) -> None:
    """Ctrl-C while modules are imported, where an exception would be a traceback, and after the end."""
    try:
        os.write(2, b"\ninterrupted\n")
    finally:
        os._exit(INTERRUPTED)


def ignore_or_leave(what: Any) -> None:
    """Ctrl-C may come where Python drops exceptions, as in `__del__`: there, it ends the program at once."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(what)


def open_closed_streams() -> None:
    """Open what is closed of descriptors 0 to 2 on /dev/null. Otherwise the next file that is opened would
    get the number, and messages would go to stdout: that is what `print` does where `sys.stderr` is None."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115  it is never closed
            setattr(sys, name, stream)


class Forgiving(io.FileIO):
    """A file whose writes never fail: what cannot be written is lost. A message is not worth a run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def run(main: Callable[[], int]) -> int:
    """Run a program that has begun -> its exit status."""
    try:
        heed_ctrl_c(signal.default_int_handler)
        status = run_and_flush(main)
        heed_ctrl_c(leave)
        return status
    except KeyboardInterrupt:
        heed_ctrl_c(leave)
        return report("\ninterrupted", INTERRUPTED)


def run_and_flush(main: Callable[[], int]) -> int:
    """-> the exit status. What was printed has been written then, or it never will be."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our text, like head, has left
        silence_stdout()
        return UNREAD
    except OSError as error:  # above all, a disk that is full
        silence_stdout()
        return report(f"error: {error}", 1)


def silence_stdout() -> None:
    """What is still to be written is lost, and no error when the interpreter ends."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def exit_status(command: Callable[[], int | None], mistake: type[Exception]) -> int:
    """Run a command -> its exit status. A mistake of the user's is one line on standard error, Ctrl-C too."""
    try:
        return command() or 0
    except mistake as error:
        return report("error: " + " ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return report("\ninterrupted", INTERRUPTED)


def report(line: str, status: int) -> int:
    """Print a line for people -> the status."""
    print(line, file=sys.stderr)
    return status


def need(requirements: str) -> None:
    """End the program with a line where packages in a file of requirements are missing or too old."""
    from importlib import metadata
    from pathlib import Path

    wrong: list[str] = []
    for line in Path(__file__).with_name(requirements).read_text().split():
        name, least = line.split(">=")
        found = metadata.distributions(name=name)
        have = next((each.version for each in found), "")
        ours, wanted = ([int(n) for n in text.split(".") if n.isdecimal()] for text in (have, least))
        wrong += [line] if ours < wanted else []
    if wrong:
        sys.exit(report(f"error: pip install -r {requirements} (needed: {', '.join(wrong)})", 2))
