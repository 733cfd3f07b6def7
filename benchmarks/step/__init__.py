"""The parts of bench_step.py: nets, contenders, checks, and the race of training steps."""
