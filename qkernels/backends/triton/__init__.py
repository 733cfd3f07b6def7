"""Rows written in Triton, for CUDA tensors (and for CPU tensors under TRITON_INTERPRET=1)."""
