"""Shared by all tests: two threads at most, and the folder of helper modules on the path."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
