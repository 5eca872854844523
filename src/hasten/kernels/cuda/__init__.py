"""Kernels for NVIDIA GPUs; a module here is imported only once a CUDA device is used."""
