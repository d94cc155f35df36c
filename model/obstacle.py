"""Why a kernel or an attention back end does not run: the original words, their cause where known, what mends it."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

INSTALL_GPU = 'pip install -c constraints-gpu.txt -e ".[gpu]"'
_DISTRIBUTIONS = {
    "flash_attn.cute": "flash-attn-4",
    "flash_attn": "flash-attn",
    "quack": "quack-kernels",
    "cutlass": "nvidia-cutlass-dsl",
    "cuda": "cuda-python",
    "tvm_ffi": "apache-tvm-ffi",
    "torch_c_dlpack_ext": "torch-c-dlpack-ext",
    "einops": "einops",
}
"""What pip calls the packages that the back ends import; the gpu extra brings all but flash-attn 2."""

_MOST_WORDS = 400
"""Characters of an exception in one line: compilers print pages. model.doctor prints more."""


@dataclass(frozen=True)
class Obstacle:
    """`kind`: the machine is unfit for it, a package is missing, or what is installed fails or computes wrongly."""

    kind: Literal["unfit", "missing", "broken"]
    words: str
    cause: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        words = " ".join(self.words.split())
        words = words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]} ..."
        return "; ".join(part for part in (words, self.cause, self.remedy) if part)


def import_obstacle(module: str, install: str = INSTALL_GPU) -> Obstacle | None:
    """Why `module` cannot be imported, whatever its import raises; `install` is the command that brings it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            package = next((pip for name, pip in _DISTRIBUTIONS.items() if module.startswith(name)), module)
            return Obstacle("missing", f"import {module}: {error}", f"{package} is not installed", install)
        return failure(error, f"import {module}: ", install)
    except Exception as error:  # a package's import may load libraries and ask drivers
        return failure(error, f"import {module}: ", install)
    return None


def failure(error: BaseException, doing: str = "", install: str = INSTALL_GPU) -> Obstacle:
    """An exception's own words, with what is known of them."""
    words = f"{doing}{type(error).__name__}: {str(error).strip()}"
    for pattern, cause, remedy in _KNOWN:
        if re.search(pattern, words, re.IGNORECASE):
            return Obstacle("broken", words, cause, remedy)
    if "no fail-closed semantic key" in words or "cannot fingerprint" in words:
        return Obstacle("broken", words, _outside_site_packages(), "install them into a virtual environment")
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = _DISTRIBUTIONS.get(error.name.partition(".")[0], error.name)
        return Obstacle("broken", words, f"it needs {package}, which is not installed", install)
    if isinstance(error, ImportError | AttributeError | TypeError):
        return Obstacle("broken", words, "packages of versions that do not fit each other would say this", install)
    return Obstacle("broken", words)


_KNOWN = [
    (
        r"failed to find C compiler|no such file or directory: '(gcc|cc|clang)'",
        "Triton compiles a launcher with a C compiler, and there is none",
        "apt-get install gcc, or set CC",
    ),
    (
        r"Python\.h",
        "Triton compiles a launcher against Python's headers, which are not installed",
        "apt-get install python3-dev (of this Python's version)",
    ),
    (
        r"No CTK flavor installed|libcute_dsl_runtime|install is incomplete",
        "the CUTLASS DSL lacks its libraries for this version of CUDA",
        INSTALL_GPU,
    ),
    (
        r"driver .*(too old|insufficient)|unsupported PTX|PTX .*unsupported toolchain",
        "the GPU's driver is older than the CUDA that the packages were built with",
        "update the driver, or install a torch that is built with an older CUDA",
    ),
    (
        r"no kernel image is available",
        "it was not built for this GPU's compute capability",
        "install a build of it for this GPU",
    ),
    (
        r"out of memory",
        "the GPU's memory is full",
        "look with nvidia-smi for what holds it, and run again",
    ),
    (
        r"No space left on device|Read-only file system|Permission denied",
        "compiled kernels cannot be stored",
        "point TRITON_CACHE_DIR and TMPDIR to a directory with room",
    ),
]
"""(what the words match, cause, remedy); the first that matches counts."""


def _outside_site_packages() -> str:
    """What quack means: it fingerprints the functions its kernels use, and knows installed ones by their folder."""
    folders = []
    for module in ("quack", "cutlass", "torch"):
        spec = find_spec(module)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if places and not {"site-packages", "dist-packages"} & set(Path(places[0]).parts):
            folders.append(f"{module} lies in {places[0]}")
    where = ", ".join(folders) or "some of them lie elsewhere"
    return f"quack takes only packages below a folder called site-packages or dist-packages for installed: {where}"
