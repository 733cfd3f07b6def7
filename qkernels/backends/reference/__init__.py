"""The meaning of every op in plain torch. Never tuned; every other row is tested against it."""
