"""Settings of every test: no hub, and helper modules of this folder (`tiny_models`, `nano_runs`) can be imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
