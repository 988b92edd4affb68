"""Before any test: kernels run in Triton's interpreter where there is no GPU, and PyTorch on one thread."""

import inspect
import os
import signal
import sys

import pytest
import torch

try:
    import hypothesis
except ImportError:
    pass
else:
    # The same examples in every run.
    hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("fixed")

if not torch.cuda.is_available():
    # Triton reads it once, when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"
# Small tensors gain nothing from threads, and tests run side by side.
torch.set_num_threads(1)
# A shell's background job starts with Ctrl-C ignored, and so would everything the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def patch_once(interpreter, tl):
    """Let Triton's interpreter replace the language's functions once a launch.

    It does so anew at every call of a device function, which takes longer than all the arithmetic of the kernels here.
    """
    replace = interpreter._patch_lang
    languages = {}  # function -> the language's modules that it sees

    def patch(fn):
        if fn not in languages:
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            languages[fn] = [module for module in modules if module is tl or module is tl.core]
        if any(tl.core.is_builtin(module.load) for module in (tl, *languages[fn])):
            return replace(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch


def pytest_collection_finish():
    """Where a test has imported Triton, and it interprets."""
    if "triton.runtime.interpreter" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        import triton.language
        from triton.runtime import interpreter

        patch_once(interpreter, triton.language)


@pytest.fixture(autouse=True)
def exact_products():
    """On a GPU too, float32 products of the kernels are exact: what tf32 costs has tests of its own."""
    if not torch.cuda.is_available():
        yield
        return
    from vgf_fast.kernels import launch

    launch.set_float32_precision("ieee")
    yield
    launch.set_float32_precision(None)


@pytest.fixture
def device():
    """Where kernels are tested: the GPU, else the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
