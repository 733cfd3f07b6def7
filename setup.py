"""Builds qkernels._C with CMake; everything else about the package is in pyproject.toml."""

import os

from setuptools import setup

OPTIONS = ("QKERNELS_CUDA", "QKERNELS_CUDA_ARCH")

# scikit-build-core reads these two keywords and runs CMake as a step of setuptools' build
setup(
    cmake_source_dir=".",
    cmake_args=[f"-D{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)],
)
