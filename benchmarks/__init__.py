"""Speed and memory against torch's own ops; `pytest benchmarks/`."""
