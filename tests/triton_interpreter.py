"""Run Triton's kernels on the CPU (TRITON_INTERPRET=1), with the language patched once a launch.

Triton 3's interpreter patches the whole language again for every call of a function inside a kernel, which takes more
than half of a small kernel's time.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from inspect import ismodule
from typing import Any


def patch_once_a_launch() -> None:
    """Skip the patches of a function whose modules this launch has already patched."""
    if not find_spec("triton"):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    patch, launch = interpreter._patch_lang, executor.__call__
    languages: dict[Any, frozenset[int]] = {}  # by function
    patched: set[frozenset[int]] = set()

    def patch_new(function: Any) -> Any:
        key = languages.get(function)
        if key is None:
            modules = (value for value in function.__globals__.values() if ismodule(value))
            key = languages[function] = frozenset(id(module) for module in modules if module in (tl, tl.core))
        if key in patched:
            return interpreter._LangPatchScope()
        patched.add(key)
        return patch(function)

    make_np_dtype = interpreter._get_np_dtype
    known_np_dtype = cache(make_np_dtype)

    def np_dtype(kind: Any) -> Any:
        return make_np_dtype(kind.scalar) if kind.scalar.is_ptr() else known_np_dtype(kind.scalar)

    def launch_afresh(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang = patch_new
    interpreter._get_np_dtype = np_dtype
    executor.__call__ = launch_afresh
