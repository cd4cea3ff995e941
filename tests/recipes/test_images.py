"""The image experiments' parts: splits, backdoor, networks, cached training, judging, and their configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from lightning_influence.edits import removal_f1
from recipes.images import training
from recipes.images.backdoor import patch_size, poisoned, triggered
from recipes.images.data import ImageSplits, cifar10, digits, loader, mnist
from recipes.images.judging import (
    accuracy,
    distance,
    judge_backdoor,
    judge_removal,
    predicted_as,
    probabilities,
)
from recipes.images.models import ImageClassifier, resnet_style, small_cnn, vgg_style
from recipes.images.training import trained
from recipes.truths.retraining import Samples

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
ARCHITECTURES: list[Callable[..., nn.Module]] = [small_cnn, resnet_style, vgg_style]
PARTS = ("train", "validation", "test")


def build(**changes: Any) -> ImageClassifier:
    settings: dict[str, Any] = {"channels": 1, "size": 8, "classes": 10, "learning_rate": 0.1}
    return ImageClassifier(small_cnn, **(settings | changes))


def few(count: int = 120) -> Samples:
    data = digits().train
    return Samples(data.inputs[:count], data.labels[:count])


def archive(path: Path, shape: tuple[int, ...], train: int, test: int) -> None:
    """A file such as those of the data root, with made-up bytes; every pixel of image i begins with i."""
    path.parent.mkdir(parents=True)
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        images = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
        images[:, 0, 0, ...] = np.arange(count).reshape(-1, *(1,) * (len(shape) - 2))
        arrays |= {f"x_{part}": images, f"y_{part}": np.arange(count, dtype=np.uint8) % 10}
    np.savez(path, label_names=np.array([f"class {i}" for i in range(10)]), **arrays)


def test_the_digits_are_three_stratified_normalised_parts() -> None:
    data = digits()
    assert [len(getattr(data, part)) for part in PARTS] == [1200, 300, 297]
    assert (data.channels, data.size, data.classes) == (1, 8, 10)
    assert data.train.inputs.dtype == torch.float32 and data.train.labels.dtype == torch.int64
    assert data.train.inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train.inputs.std().item() == pytest.approx(1, abs=1e-4)
    for part in PARTS:
        assert getattr(data, part).inputs.shape[1:] == (1, 8, 8)
        shares = getattr(data, part).labels.bincount(minlength=10) / len(getattr(data, part))
        assert torch.allclose(shares, torch.full((10,), 0.1), atol=0.02)
    rows = torch.cat([getattr(data, part).inputs.flatten(1) for part in PARTS])
    assert len(rows.unique(dim=0)) == 1797  # no image is in two parts
    assert torch.equal(digits().test.inputs, data.test.inputs)
    assert not torch.equal(digits(seed=1).test.inputs, data.test.inputs)


def first_pixels(samples: Samples, reference: Samples, data: ImageSplits) -> list[int]:
    """Which images of the file these are, read back from their first pixel."""
    scale = 255 / (reference.inputs[:, 0].max() - reference.inputs[:, 0].min())
    values = (samples.inputs[:, 0, 0, 0] - reference.inputs[:, 0].min()) * scale
    return [round(value) for value in values.tolist()]


def test_mnist_draws_training_and_validation_from_the_training_file(tmp_path: Path) -> None:
    archive(tmp_path / "mnist" / "mnist.npz", (28, 28), train=60, test=20)
    data = mnist(tmp_path, train_size=40, validation_size=10)
    assert [len(getattr(data, part)) for part in PARTS] == [40, 10, 20]
    assert data.train.inputs.shape == (40, 1, 28, 28) and data.label_names[3] == "class 3"
    train, validation, test = (first_pixels(getattr(data, part), data.train, data) for part in PARTS)
    assert len({*train, *validation}) == 50 and test == list(range(20))
    assert data.train.labels.tolist() == [image % 10 for image in train]
    smaller = mnist(tmp_path, train_size=40, validation_size=5)
    assert torch.equal(smaller.train.inputs, data.train.inputs)
    with pytest.raises(ValueError, match="60 at most together"):
        mnist(tmp_path, train_size=55, validation_size=10)


def test_cifar_keeps_the_last_training_images_for_validation(tmp_path: Path) -> None:
    archive(tmp_path / "cifar10_5k" / "cifar10_5k.npz", (32, 32, 3), train=40, test=10)
    data = cifar10(tmp_path, validation_size=15)
    assert data.train.inputs.shape == (25, 3, 32, 32) and (data.channels, data.size) == (3, 32)
    train, validation, test = (first_pixels(getattr(data, part), data.train, data) for part in PARTS)
    assert (train, validation, test) == (list(range(25)), list(range(25, 40)), list(range(10)))
    with pytest.raises(ValueError, match="validation_size"):
        cifar10(tmp_path, validation_size=40)


@pytest.mark.parametrize(("load", "name"), [(mnist, "mnist.npz"), (cifar10, "cifar10_5k.npz")])
def test_a_missing_data_root_says_what_to_do(load: Callable[..., ImageSplits], name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{name}.*HINT: data_root=/path/to/data"):
        load(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}.*HINT: data_root=/path/to/data"):
        load(None)


def test_a_loader_shuffles_by_its_seed_alone() -> None:
    samples = few(30)

    def order(shuffle: bool, seed: int) -> list[Tensor]:
        torch.rand(1)  # a global state that moves on
        return [inputs for inputs, _ in loader(samples, 8, shuffle, seed)]

    assert torch.equal(torch.cat(order(False, 0)), samples.inputs)
    assert torch.equal(torch.cat(order(True, 1)), torch.cat(order(True, 1)))
    assert not torch.equal(torch.cat(order(True, 1)), torch.cat(order(True, 2)))
    assert [len(batch) for batch in order(True, 0)] == [8, 8, 8, 6]


@pytest.mark.parametrize("size", [8, 28])
def test_a_backdoor_stamps_only_what_it_should(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(100, 3, size, size, generator=generator)
    images[0, :, 0, 0] = torch.tensor([1.5, 2.0, 2.5])  # white
    samples = Samples(images.clone(), torch.arange(100) % 10)
    stamped, ids = poisoned(samples, 0.2, target_label=3, seed=1)
    side = patch_size(size)
    assert side == (2 if size == 8 else 3)
    assert len(ids) == 18 and torch.equal(ids, ids.unique()) and 3 not in samples.labels[ids]
    assert torch.equal(samples.inputs, images)  # the originals stay as they are
    assert (stamped.labels[ids] == 3).all()
    patch = torch.tensor([1.5, 2.0, 2.5]).view(3, 1, 1)
    assert (stamped.inputs[ids][..., -side:, -side:] == patch).all()
    changed = (stamped.inputs != samples.inputs).any(1)  # (N, H, W)
    assert changed.flatten(1).sum(1)[ids].eq(side * side).all()
    untouched = torch.ones(100, dtype=torch.bool)
    untouched[ids] = False
    assert not changed[untouched].any() and torch.equal(stamped.labels[untouched], samples.labels[untouched])
    assert torch.equal(poisoned(samples, 0.2, 3, seed=1)[1], ids)
    assert not torch.equal(poisoned(samples, 0.2, 3, seed=2)[1], ids)


def test_triggered_images_keep_their_labels() -> None:
    samples = digits().test
    stamped = triggered(samples, target_label=0)
    others = samples.labels != 0
    assert torch.equal(stamped.labels, samples.labels[others])
    white = samples.inputs.max()
    assert (stamped.inputs[..., -2:, -2:] == white).all()
    assert torch.equal(stamped.inputs[..., :-2, :], samples.inputs[others][..., :-2, :])
    assert white == digits().train.inputs.max()  # the same white as in the training images


def test_what_cannot_be_poisoned_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        poisoned(few(), 1.5, 0)
    with pytest.raises(ValueError, match="class 11"):
        triggered(few(), 11)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
def test_networks_are_fixed_functions_of_single_images(
    architecture: Callable[..., nn.Module], channels: int, size: int
) -> None:
    module = ImageClassifier(architecture, channels=channels, size=size, classes=7, learning_rate=0.1)
    images = torch.randn(5, channels, size, size)
    logits = module.train()(images)
    assert logits.shape == (5, 7)
    assert torch.equal(module.eval()(images), logits)
    torch.testing.assert_close(torch.cat([module(image[None]) for image in images]), logits)
    state_dependent = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    assert not any(isinstance(layer, state_dependent) for layer in module.modules())
    assert not list(module.buffers())
    loss = module.training_step((images, torch.arange(5)), 0)
    torch.testing.assert_close(loss, -logits.log_softmax(1)[torch.arange(5), torch.arange(5)].mean())
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, list(module.parameters())))


def test_networks_have_the_sizes_that_are_stated() -> None:
    def count(architecture: Callable[..., nn.Module], channels: int, size: int) -> int:
        return sum(p.numel() for p in architecture(channels=channels, size=size, classes=10).parameters())

    assert 10_000 <= count(small_cnn, 1, 28) <= 20_000
    assert 30_000 <= count(resnet_style, 1, 28) <= 80_000
    assert 60_000 <= count(vgg_style, 3, 32) <= 150_000


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values()])


def test_training_is_deterministic_by_its_seed_and_leaves_no_trace() -> None:
    samples = few()
    before = torch.random.get_rng_state()
    module = trained(build, samples, seed=1, epochs=2, batch_size=50)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not module.training and module._trainer is None
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    torch.rand(3)
    assert torch.equal(weights(trained(build, samples, seed=1, epochs=2, batch_size=50)), weights(module))
    assert not torch.equal(weights(trained(build, samples, seed=2, epochs=2, batch_size=50)), weights(module))


def test_a_second_training_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = dict(seed=1, epochs=1, batch_size=50, cache=tmp_path / "weights")
    first = trained(build, few(), **settings)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_fitted", lambda *_: pytest.fail("trained again"))
        again = trained(build, few(), **settings)
    assert torch.equal(weights(first), weights(again)) and not again.training
    assert [path.suffix for path in (tmp_path / "weights").iterdir()] == [".safetensors"]


def test_anything_that_differs_gets_its_own_weights(tmp_path: Path) -> None:
    samples, own = few(), dict(seed=1, epochs=1, batch_size=50)
    relabelled = Samples(samples.inputs, samples.labels.flip(0))
    wide: Any = partial(small_cnn, hidden=17)
    runs: list[tuple[Callable[[], ImageClassifier], Samples, dict[str, int]]] = [
        (build, samples, own),
        (partial(build, weight_decay=0.1), samples, own),
        (lambda: ImageClassifier(wide, channels=1, size=8, classes=10, learning_rate=0.1), samples, own),
        (build, relabelled, own),
        (build, few(100), own),
        *((build, samples, own | {name: 2}) for name in own),
    ]
    for make, data, settings in runs:
        trained(make, data, **settings, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(runs)


def test_training_learns_and_ends_with_a_learning_rate_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = []
    real = ImageClassifier.configure_optimizers

    def watched(module: ImageClassifier) -> Any:
        found = real(module)
        optimizers.append(found)
        return found

    monkeypatch.setattr(ImageClassifier, "configure_optimizers", watched)
    samples = few(600)
    module = trained(build, samples, seed=0, epochs=15, batch_size=50)
    assert accuracy(module, samples) > 0.9
    assert optimizers[0]["optimizer"].param_groups[0]["lr"] < 1e-3 * 0.1


class Fixed(nn.Module):
    """Answers with the logits that it is given as inputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def test_accuracies_and_probabilities() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2]])
    samples = Samples(logits, torch.tensor([0, 0, 1, 2]))
    module = Fixed().train()
    assert accuracy(module, samples) == 0.75
    assert predicted_as(module, samples, 1) == 0.5
    torch.testing.assert_close(probabilities(module, samples), logits.softmax(1))
    assert module.training

    removal = judge_removal(module, samples, 0, logits.softmax(1))
    assert (removal.retained_accuracy, removal.target_accuracy, removal.distance) == (1.0, 0.5, 0.0)
    assert removal.f1 == pytest.approx(2 * 0.5 * 1 / 1.5)
    backdoor = judge_backdoor(module, samples, samples, 1, (logits.softmax(1), logits.softmax(1)))
    assert (backdoor.clean_accuracy, backdoor.relabelled_accuracy, backdoor.backdoored) == (0.75, 0.75, 0.5)


def test_removal_f1_is_a_harmonic_mean() -> None:
    assert removal_f1(0.0, 1.0) == 1
    assert removal_f1(1.0, 0.9) == 0  # nothing was removed
    assert removal_f1(0.0, 0.0) == 0  # nothing was kept
    assert removal_f1(1.0, 0.0) == 0
    assert removal_f1(0.2, 0.6) == pytest.approx(2 * 0.8 * 0.6 / 1.4)


def test_distance_is_the_total_variation() -> None:
    p, q = torch.tensor([[1.0, 0], [0.5, 0.5]]), torch.tensor([[0, 1.0], [0.25, 0.75]])
    assert distance(p, p) == 0
    assert distance(p[:1], q[:1]) == 1
    assert distance(p, q) == pytest.approx((1 + 0.25) / 2)
    with pytest.raises(ValueError, match="one shape"):
        distance(p, q[:1])


def composed(group: str, choice: str) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(overrides=[f"+{group}={choice}", "+data_root=/nowhere"])[group]


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIGS / "images").glob("*.yaml")))
def test_image_configurations_are_built(choice: str) -> None:
    config = composed("images", choice)
    if choice == "digits":
        assert len(instantiate(config).train) == 1200
    else:
        with pytest.raises(Exception, match="/nowhere"):
            instantiate(config)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIGS / "classifier").glob("*.yaml")))
def test_classifier_configurations_build_a_new_network_each_time(choice: str) -> None:
    make = instantiate(composed("classifier", choice))
    first, second = (make(channels=1, size=28, classes=10) for _ in range(2))
    assert isinstance(first, ImageClassifier) and choice in str(composed("classifier", choice).architecture)
    assert {id(p) for p in first.parameters()}.isdisjoint(id(p) for p in second.parameters())


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIGS / "training").glob("*.yaml")))
def test_training_configurations_are_built(choice: str) -> None:
    assert (CONFIGS / "images" / f"{choice}.yaml").is_file()
    train = instantiate(composed("training", choice), epochs=1)
    assert isinstance(train(build, few(60), seed=0), ImageClassifier)
