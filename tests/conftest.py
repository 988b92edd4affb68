"""Before any test: kernels run in Triton's interpreter where there is no GPU, and PyTorch on one thread."""

import os
import signal

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
