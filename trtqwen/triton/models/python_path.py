"""The first lines of every `model.py`, with which trtqwen runs in the python backend's interpreter.

Stubs that are built with pybind11 2.10 (Triton 2.51 for one) start an isolated interpreter. It ignores PYTHONPATH,
looks for modules in the working directory first, and crashes on BYTES tensors of numpy 2.
"""

import os
import sys

import numpy

if sys.flags.isolated:
    if int(numpy.__version__.partition(".")[0]) >= 2:
        raise ImportError(
            f"Triton's python backend here needs numpy 1, but {sys.prefix} has numpy {numpy.__version__}: "
            f"run `{sys.executable} -m pip install 'numpy<2'`"
        )
    found = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*found, *(path for path in sys.path if path and path not in found)]
