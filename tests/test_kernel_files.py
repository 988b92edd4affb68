"""The kernels as a reader meets them: short files, few arguments."""

import importlib
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).resolve().parent.parent / "kernels"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_take_few_arguments(path):
    """Pointers, sizes and constants that belong together are one argument."""
    module = importlib.import_module(f"vgf_fast.kernels.{path.stem}")
    for name, value in vars(module).items():
        if name.endswith("_kernel") and hasattr(value, "arg_names") and value.fn.__module__ == module.__name__:
            assert len(value.arg_names) <= 15, f"{name} takes {len(value.arg_names)}"


def test_files_are_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lengths.values()) <= 600, lengths
