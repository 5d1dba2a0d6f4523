"""building.py: compiles the C++ files into libraries in the user's cache, once per machine.

    complete, quick = Build.of("avx512"), Build.of("avx512", quick=True)
    quick.make()  # four seconds, and all operators are there
    complete.begin("avx512")  # twenty, in another process, which goes on when this one ends

The one idea: the first token does not wait for the last kernel. A row of a result does not depend on the rows
beside it, so bodies that take one row at a time give the same bits, and they compile in a quarter of the
time. They do until the complete library is there. This file imports no PyTorch: that takes a second.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

FLAGS = {  # what the files of every path are compiled with
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16",
               "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}  # fmt: skip
BODIES = ("kernels.cpp", "attention.cpp", "sampling.cpp")
QUICK_PARTS = (("kernels.cpp", "direct.cpp"), ("attention.cpp", "sampling.cpp"))  # for two cores
HEADERS = ("operators.h", "vectors.h", "team.h")
SOURCES = ("tape.cpp", "direct.cpp", *BODIES, *HEADERS)
USUAL = ["-std=c++20", "-fPIC", "-pthread", "-ffp-contract=off", "-w", "-D_GLIBCXX_USE_CXX11_ABI=1"]
USUAL += ["-fno-trapping-math"]  # or comparisons would keep loops from becoming vectors


@dataclass(frozen=True)
class Build:
    """A library: what it is made of, and where it will be."""

    compiler: tuple[str, ...]  # with all options
    parts: tuple[tuple[str, ...], ...]  # sources that are compiled as one: headers are then read once
    torch_directory: Path
    library: Path

    @staticmethod
    def of(path: str, quick: bool = False, cache: Path | None = None) -> Build:
        """The library for one of FLAGS. OSError where there is no compiler."""
        compiler = shlex.split(os.environ.get("CXX") or "g++")
        if shutil.which(compiler[0]) is None:
            raise OSError(f"there is no C++ compiler {compiler[0]}; install g++")
        compiler += [*USUAL, *FLAGS[path], *(["-O1", "-DQUICK"] if quick else ["-O3"])]
        parts = QUICK_PARTS if quick else tuple((name,) for name in ("tape.cpp", *BODIES))
        torch_directory = Path(importlib.util.find_spec("torch").origin).parent
        version = (torch_directory / "version.py").read_bytes()
        files = (*chain(*parts), *HEADERS, "building.py")
        content = b"".join(Path(__file__).with_name(name).read_bytes() for name in files)
        key = " ".join([*compiler, str(torch_directory)]).encode() + version + content
        name = f"{'quick' if quick else 'kernels'}-{path}-{hashlib.sha256(key).hexdigest()[:16]}.so"
        return Build(tuple(compiler), parts, torch_directory, (cache or cache_directory()) / name)

    def is_made(self) -> bool:
        """Is the file there, as it was sealed? Loading a library that was cut off can kill the process."""
        try:
            content = self.library.read_bytes()
        except OSError:
            return False
        return hashlib.sha256(content[:-32]).digest() == content[-32:]

    def make(self) -> Build:
        """Compile the library, unless it is there -> self. CalledProcessError or OSError if that fails."""
        if self.is_made():
            return self
        folder, name = self.library.parent, self.library.name
        with self.library.with_suffix(".lock").open("w") as lock:  # another process may be at it
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.is_made():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    self.link(Path(scratch, name))
                    seal(Path(scratch, name))
                    os.replace(f"{scratch}/{name}", self.library)
        return self

    def link(self, library: Path) -> None:
        """Compile all sources side by side, and make a library of them."""
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        headers = self.torch_directory / "include"

        def compile_one(part: tuple[str, ...]) -> str:
            output = str(library.with_name(f"{part[0]}.o"))
            *before, last = (Path(__file__).with_name(name) for name in part)
            included = [f"-include{file}" for file in before]
            run([*self.compiler, f"-isystem{headers}", *included, "-c", last, "-o", output])
            return output

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_one, self.parts))
        links = [f"-L{self.torch_directory / 'lib'}", "-lc10", "-ltorch_cpu"]
        run([*self.compiler, "-shared", *objects, "-o", library, *links])

    def begin(self, path: str) -> subprocess.Popen:
        """Have another process make the library of `path`. It goes on when this one ends, by Ctrl-C, too."""
        command = [sys.executable, __file__, path, str(self.library.parent)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, process_group=0, **streams)


def seal(file: Path) -> None:
    """Append the hash of what is in the file, which a loader does not look at."""
    digest = hashlib.sha256(file.read_bytes()).digest()
    with file.open("ab") as end:
        end.write(digest)


def cache_directory() -> Path:
    """Where compiled libraries are kept: the user's cache, or a directory that goes with the process."""
    return user_cache() or scratch_directory()


def user_cache() -> Path | None:
    """None where there is no home directory, or one that cannot be written to."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_spec"
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cache if os.access(cache, os.W_OK) else None
    except (OSError, RuntimeError):
        return None


@functools.cache
def scratch_directory() -> Path:
    scratch = Path(tempfile.mkdtemp(prefix="gpt_spec"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def reason_of(error: Exception) -> str:
    """Why compiling failed, in a line."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or ["no reason given"]
    return next((line for line in lines if "error" in line), lines[-1])


if __name__ == "__main__":
    try:  # at the usual priority: at a lower one, beside two decoding threads, it takes minutes
        Build.of(sys.argv[1], cache=Path(sys.argv[2])).make()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(reason_of(error))
