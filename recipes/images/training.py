"""An image classifier trained by Lightning, once: its weights are kept by a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from recipes.images.data import loader
from recipes.images.models import ImageClassifier
from recipes.truths.fitting import quiet_lightning
from recipes.truths.retraining import Samples

_VERSION = 1  # raise it when the training changes: it is part of every cache's key


def trained(
    build: Callable[[], ImageClassifier],
    samples: Samples,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    cache: str | os.PathLike[str] | None = None,
) -> ImageClassifier:
    """A classifier trained on the samples, in eval mode; the global random state is left as it was.

    Args:
        build: makes the classifier; its randomness is that of the seed.
        samples: what it is trained on.
        seed: of the initial weights and the order of the batches.
        epochs: passes over the samples.
        batch_size: samples of a batch; the last one of an epoch may be smaller.
        cache: folder of the weights, which are then computed once; None trains anew.
    """
    module = _initial(build, seed)
    path = Path(cache) / f"{_key(module, samples, seed, epochs, batch_size)}.safetensors" if cache is not None else None
    if path is not None and path.is_file():
        weights = load_file(path)
    else:
        weights = _fitted(module, samples, seed, epochs, batch_size)
        if path is not None:
            _write(path, weights)
    module = _initial(build, seed)  # one that no Trainer has held, whether or not there was one
    module.load_state_dict(weights)
    return module.eval()


def _initial(build: Callable[[], ImageClassifier], seed: int) -> ImageClassifier:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return build()


def _fitted(module: ImageClassifier, samples: Samples, seed: int, epochs: int, batch_size: int) -> dict[str, Tensor]:
    """The weights after a fit; a bar counts the epochs where they take longer than some seconds."""
    batches = loader(samples, batch_size, shuffle=True, seed=seed)
    progress = tqdm(total=epochs, unit="epoch", desc="training", dynamic_ncols=True, leave=False, delay=5)
    with progress as bar, quiet_lightning():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[LambdaCallback(on_train_epoch_end=lambda *_: bar.update())],
        )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            trainer.fit(module.train(), batches)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _key(module: ImageClassifier, samples: Samples, seed: int, epochs: int, batch_size: int) -> str:
    """A hash of everything that the weights depend on, by content: the initial weights stand for what made them."""
    kind = f"{type(module).__module__}.{type(module).__qualname__} {sorted(module.hparams.items())} {module}"
    digest = hashlib.sha256(f"{_VERSION} {torch.__version__} {kind} {seed} {epochs} {batch_size}".encode())
    for value in (samples.inputs, samples.labels, *module.state_dict().values()):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    """Write the file under another name and rename it: it is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(weights, temporary)
    os.replace(temporary, path)
