"""The Triton kernels without a GPU: by Triton's own interpreter, which runs them program by program on the processor. It says whether
their results are right, and nothing about their speed."""

import os

import pytest


def interpreted():
    """The module of the kernels. Without the package the test is skipped, or fails where PAIRSCOPE_TRITON is set."""
    if not os.environ.get("TRITON_INTERPRET"):  # tests/conftest.py
        pytest.skip("a GPU is here: tests marked gpu run the kernels on it")
    if not os.environ.get("PAIRSCOPE_TRITON"):
        pytest.importorskip("triton", reason="triton is not installed; make triton installs it")
    from capture import lens_triton

    return lens_triton
