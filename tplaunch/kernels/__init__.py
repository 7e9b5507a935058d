"""Kernels that torch would not choose by itself: element-wise work of a GPU in Triton, matmuls of a CPU."""
