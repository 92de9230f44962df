"""python -m bench kernels: step times of the optimizers, against torch's and the peers'."""
