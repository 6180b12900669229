"""No test reaches the Hub, and none starts Ray without saying so."""

import os

# read once, when Ray is imported: without it whatever calls Ray by mistake starts one, which stays for later tests
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
import ray  # noqa: E402, F401

del os.environ["RAY_ENABLE_AUTO_CONNECT"]  # the command's own processes are a user's
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
