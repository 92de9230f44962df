"""python -m bench kernels: step times of the optimizers, against torch's and the peers'."""

import os

# The profiler writes a line to the terminal whenever it starts and stops, unless told before
# torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
