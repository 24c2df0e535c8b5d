"""Pure PyTorch, one op per file: what the Triton kernels are held against, and the CPU path."""
