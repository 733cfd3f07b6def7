"""The samples of README run, in their order, as one program."""

from __future__ import annotations

import re
from pathlib import Path


def test_samples_run() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"README block {i}", "exec"), names)
