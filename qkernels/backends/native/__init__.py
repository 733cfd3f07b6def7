"""Rows that call the compiled module: C++ on the CPU, CUDA on NVIDIA GPUs."""
