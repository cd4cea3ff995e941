"""TRAK's own library: one checkpoint's projected gradients of the margin, which its scores explain instead of the loss.

The margin of a sample is log p/(1 − p) of its label's probability p (Park et al., 2023, section 3). It rises where the
cross-entropy falls, and TRAK's score is positive where a training sample raises it: a proponent, without a change of
sign.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recipes.benchmarks.peers.asked import Peer, Trained, dataset
from recipes.truths.samples import Samples

DIMENSION = (
    1024  # of the projection, below the number of samples, or XᵀX has no inverse; TRAK's 2048 take twice as long
)
BLOCK = 100  # dimensions drawn at a time
BATCH = 500  # the projection is drawn again for every batch, so that large ones are fast; 1 MB of gradients a sample


def peers() -> list[Peer]:
    """TRAK at the final checkpoint; its interface has no self-influence."""
    return [Peer("TRAK, final checkpoint", _scores, None)]


def _scores(trained: Trained, queries: Samples, folder: Path) -> Tensor:
    """The task is the one for logits of images, which serves any model of one input. The projector is the one that the
    library takes on a CPU, in two blocks at least: with one it fails after `finalize_features`. Half precision is for
    GPUs."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    checkpoint = dict(trained.checkpoints[-1])
    model, size = trained.copy(), dimension(len(trained.train))
    traker = TRAKer(
        model,
        "image_classification",
        len(trained.train),
        save_dir=str(folder),
        device="cpu",
        projector=BasicProjector(
            sum(parameter.numel() for parameter in model.parameters()),
            size,
            seed=0,
            proj_type=ProjectionType.normal,
            device="cpu",
            block_size=min(BLOCK, size // 2),
        ),
        use_half_precision=False,
        logging_level=logging.ERROR,
    )
    traker.load_checkpoint(checkpoint, model_id=0)
    for batch in DataLoader(dataset(trained.train), BATCH):
        traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint("queries", checkpoint, model_id=0, num_targets=len(queries))
    for batch in DataLoader(dataset(queries), BATCH):
        traker.score(batch, num_samples=len(batch[0]))
    found = traker.finalize_scores("queries")  # (N, Q), on disk
    return torch.tensor(found).t().contiguous()


def dimension(samples: int) -> int:
    """Of the projection: DIMENSION, or a quarter of the training samples where these are few."""
    return min(DIMENSION, max(2, math.ceil(samples / 4)))
