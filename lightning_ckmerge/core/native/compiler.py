"""C code of this directory as a library for this process: compiled in a moment, kept nowhere."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-std=gnu11", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 120


# Set to 0, nothing is compiled; the bits stay the same.
SWITCH = "CKMERGE_NATIVE"


class NoCompilerError(Exception):
    """There is no C compiler, it refused, or its output cannot be loaded; gives the reason in a line."""


def is_wanted() -> bool:
    """Whether C code may be compiled: unless the environment variable ``CKMERGE_NATIVE`` is 0."""
    return os.environ.get(SWITCH) != "0"


def compile_library(name: str) -> ctypes.CDLL:
    """Return the functions of one of the C files beside this one.

    Args:
        name: The file's name. The compiler is ``cc``, or the environment variable ``CC``.

    Raises:
        NoCompilerError: It cannot be had.
    """
    source = Path(__file__).with_name(name)
    try:
        with tempfile.TemporaryDirectory(prefix="ckmerge-") as dirpath:
            library = Path(dirpath) / "library.so"
            command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(source), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
            return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise NoCompilerError(lines[0] if lines else str(error)) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NoCompilerError(str(error)) from error
