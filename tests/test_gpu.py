"""With `python -m pytest --device cuda`: what only a GPU can answer."""

import subprocess
import sys

import pytest
from conftest import ROOT, WITH_GPU


@pytest.mark.parametrize("part", ["right", "waits"])
def test_a_gpu_computes_as_a_cpu_and_is_not_waited_for(part, request, tmp_path):
    if request.config.getoption("--device") == "cpu":
        pytest.skip("needs a GPU: python -m pytest --device cuda")
    command = [sys.executable, ROOT / "tests" / "gpu.py", part, "--to", tmp_path / "gpu.json"]
    done = subprocess.run(command, env=WITH_GPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
