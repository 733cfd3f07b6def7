.PHONY: build test lint format bench

# an incremental build in place: one changed .cpp takes seconds
build:
	cmake -S . -B build/dev -G Ninja -Dpybind11_DIR=$$(python -m pybind11 --cmakedir) $(if $(QKERNELS_CUDA),-DQKERNELS_CUDA=$(QKERNELS_CUDA))
	cmake --build build/dev
	cmake --install build/dev --prefix .

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror
	mypy

format:
	ruff check --fix .
	ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs clang-format -i

bench:
	pytest benchmarks/
