"""No test reaches the Hub; every test has a cache folder that outlives it only where that saves a download."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
