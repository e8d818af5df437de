"""No test reaches the network or a user's cache: set before anything is imported; spawned processes inherit it."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LANCE_LOG"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models gain nothing from threads, and threads that wait for each other on a busy machine lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_cache = tempfile.mkdtemp(prefix="memdb-tests-")
os.environ["MEMDB_CACHE_DIR"] = _cache
atexit.register(shutil.rmtree, _cache, ignore_errors=True)

pytest_plugins = ["tests.question_cases", "tests.repair_cases"]
