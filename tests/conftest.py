"""One thread for every test and every process that a test starts: small tensors want no more, and cores are shared."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
