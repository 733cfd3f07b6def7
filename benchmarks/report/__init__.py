"""`python -m benchmarks.report`: tables, plots and comparisons of benchmark results."""
