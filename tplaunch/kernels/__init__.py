"""GPU kernels for element-wise work, in Triton."""
