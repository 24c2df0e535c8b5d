"""Benchmarks: the ops against the usual formulas, and training from end to end. `make bench`, `bash bench/gpu.sh`."""
