"""Our Triton kernels, where Triton is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnlib.extras import installed

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not installed("triton"), reason="Triton is not installed: pip install 'attnlib[triton]'")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:]
