"""Triton kernels, one op per file; imported on first use by `pcpo_fast.ops`."""
