"""`python -m qkernels`: what a bug report should hold."""

from __future__ import annotations

import json

import qkernels

if __name__ == "__main__":
    print(json.dumps(qkernels.build_info(), indent=2))
