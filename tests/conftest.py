"""No test reaches the network: set before anything imports huggingface_hub; spawned processes inherit it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LANCE_LOG"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
