"""Code of a test module that needs more devices than the tests share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def saved_by(module: str, call: str, file: Path):
    """What `call`, of a function of a test module, saves in `file` with `np.savez`; in
    a process of its own, with eight CPU devices and strict types."""
    settings = {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"from {module} import *; {call}"],
        cwd=Path(__file__).parents[1],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(file)
