"""How the benchmarks time, what they record, and whom they race against."""
