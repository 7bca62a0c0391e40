"""CPU kernels, compiled by numba: what the model and the embedded engine use in float32 without a gradient."""
