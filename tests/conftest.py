"""One thread for every test and every process that a test starts, and no seed that an earlier test left behind."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_seed_of_others() -> None:
    """`seed_everything` leaves its seed in the environment, and Lightning then gives loaders a `worker_init_fn`."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
