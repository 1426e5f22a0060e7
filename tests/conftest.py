"""Settings of every test. Modules beside this file (`tiny_models`, `nano_runs`) can be imported from all of them."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: each has a core, more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A loaded machine is no reason to fail, nor an example that the change under test has nothing to do with: the same are tried
# every time. Others, and more of them, by `pytest --hypothesis-profile=search`.
settings.register_profile("search", deadline=None, max_examples=500)
settings.register_profile("mmgpt", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("mmgpt")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """What a converter reads and what it writes into, both empty."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target
