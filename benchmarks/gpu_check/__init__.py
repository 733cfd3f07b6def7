"""The parts of gpu_check.sh that are not shell."""
