"""The GPU backends checked and timed where there is a GPU: `python -m bench.gpu_check`."""
