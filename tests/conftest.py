"""Settings of every test. Modules beside this file (`tiny_models`, `nano_runs`) can be imported from all of them."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A loaded machine is no reason to fail.
settings.register_profile("mmgpt", deadline=None, max_examples=50)
settings.load_profile("mmgpt")
