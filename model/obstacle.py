"""Why a kernel or an attention back end does not run: the original error, its cause if known, and the fix."""

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
"""Import name -> pip name. The gpu extra installs all of them except flash-attn 2."""

_MOST_WORDS = 400
"""Characters of an error that are shown in one line (compilers print pages). model.doctor prints more."""


@dataclass(frozen=True)
class Obstacle:
    """kind: the machine does not support it, a package is missing, or an installed one fails or gives wrong results."""

    kind: Literal["unfit", "missing", "broken"]
    words: str
    cause: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        words = " ".join(self.words.split())
        words = words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]} ..."
        return "; ".join(part for part in (words, self.cause, self.remedy) if part)


def import_obstacle(module: str, install: str = INSTALL_GPU) -> Obstacle | None:
    """Why `module` cannot be imported (any exception), or None. install: the command that installs it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            package = next((pip for name, pip in _DISTRIBUTIONS.items() if module.startswith(name)), module)
            return Obstacle("missing", f"import {module}: {error}", f"{package} is not installed", install)
        return failure(error, f"import {module}: ", install)
    except Exception as error:  # an import may load libraries and query drivers
        return failure(error, f"import {module}: ", install)
    return None


def failure(error: BaseException, doing: str = "", install: str = INSTALL_GPU) -> Obstacle:
    """An exception's message, with its cause and fix if they are known."""
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
        return Obstacle("broken", words, "probably package versions that are incompatible with each other", install)
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
"""(pattern of the message, cause, remedy); the first match applies."""


def _outside_site_packages() -> str:
    """The cause of quack's error: it fingerprints functions that kernels use, except those of installed packages."""
    folders = []
    for module in ("quack", "cutlass", "torch"):
        spec = find_spec(module)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if places and not {"site-packages", "dist-packages"} & set(Path(places[0]).parts):
            folders.append(f"{module} is in {places[0]}")
    where = ", ".join(folders) or "some of them are elsewhere"
    return f"quack recognizes installed packages by a folder called site-packages or dist-packages: {where}"
