"""One folder a backend, one file an op; qkernels/_table.py lists them."""
