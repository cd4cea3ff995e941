"""Every configuration composes and builds, and `+influence=capture` works in somebody else's Hydra program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
GROUPS = ("data", "model", "trainer", "callbacks", "curvature", "estimator", "images", "classifier", "training")
PROGRAMS = {"estimator": "query", "images": "class_removal", "classifier": "class_removal", "training": "class_removal"}
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]

PROGRAM = """
import json, sys
import hydra
from hydra.utils import instantiate

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config):
    callbacks = [instantiate(c) for c in config.callbacks.values()]
    print(json.dumps([[type(c).__name__, str(getattr(c, "store", ""))] for c in callbacks]))

main()
"""


def composed(name: str, *overrides: str) -> DictConfig:
    """The configuration of a recipe as Hydra would give it, with what only a running program knows filled in."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, list(overrides), return_hydra_config=True)
    OmegaConf.update(config, "hydra.runtime.output_dir", "/nowhere", force_add=True)
    HydraConfig.instance().set_config(config)
    return config


def targets(config: object) -> list[str]:
    """Every `_target_` in a configuration."""
    if isinstance(config, dict):
        own = [config["_target_"]] if "_target_" in config else []
        return own + [t for value in config.values() for t in targets(value)]
    return [t for value in config for t in targets(value)] if isinstance(config, list) else []


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: str(value))
def test_every_choice_composes_and_its_targets_exist(group: str, choice: str) -> None:
    recipe = PROGRAMS.get(group, "fit")
    config = OmegaConf.to_container(composed(recipe, f"{group}={choice}")[group], resolve=False)
    for target in targets(config):
        assert callable(get_object(target))
    assert config == {} or targets(config)


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_composes(path: Path) -> None:
    config = composed("fit", f"experiment={path.stem}")
    assert config.callbacks.influence.store == "/nowhere/influence"


@pytest.mark.parametrize("path", sorted((CONFIGS / "setting").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_setting_composes_and_names_its_own_command(path: Path) -> None:
    program = max((main.stem for main in CONFIGS.glob("*.yaml") if path.stem.startswith(f"{main.stem}_")), key=len)
    config = composed(program, f"setting={path.stem}", "data_root=/some/data")
    assert f"recipes/{program}.py setting={path.stem} " in config.command
    used = [OmegaConf.select(config, f"{group}.data_root") for group in ("images", "passages", "data.source")]
    assert config.data_root in used
    assert "when_quick" not in config or len(config.seeds) >= 2 > len(config.when_quick.seeds)
    assert config.title != composed(program).title  # it comes after the program's own values


@pytest.mark.parametrize("name", ["fit", "query", "demo", "compare_layers"])
def test_every_main_configuration_composes(name: str) -> None:
    overrides = ["store=/some/store"] if name == "query" else []
    assert composed(name, *overrides).data._target_ == "recipes.data.TextDataModule"


@pytest.mark.parametrize("choice", ["tracin_we", "tracin_we_top_words", "tracin_we_synonyms", "tracin", "tracin_last"])
def test_estimators_are_built(choice: str) -> None:
    estimator = instantiate(composed("query", "store=x", f"estimator={choice}").estimator)
    assert type(estimator).__name__.lower().startswith(choice.split("_")[0])


@pytest.mark.parametrize("choice", ["tracin_we", "tracin_we_top_words", "in_flight", "last_layer", "demo"])
def test_callbacks_are_built_with_a_store_of_the_job(choice: str) -> None:
    callback = instantiate(composed("fit", f"callbacks={choice}").callbacks.influence)
    assert callback.store == "/nowhere/influence"


def test_a_fit_with_curvature_shares_one_store() -> None:
    callbacks = instantiate(composed("fit", "callbacks=influence_function", "curvature=kfac").callbacks)
    assert {callback.store for callback in callbacks.values()} == {"/nowhere/influence"}
    assert callbacks.curvature.statistics.name == "kfac"


def foreign_program(folder: Path) -> Path:
    """A Hydra program that has callbacks of its own and has never heard of this library."""
    (folder / "conf").mkdir(parents=True)
    (folder / "conf" / "train.yaml").write_text(
        "callbacks:\n  timer:\n    _target_: lightning.pytorch.callbacks.Timer\n"
    )
    program = folder / "train.py"
    program.write_text(PROGRAM)
    return program


def run(program: Path, *overrides: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run it with nothing of this repository but what lies at `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(program), *overrides],
        cwd=program.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_capture_in_a_foreign_program_from_the_source_tree(tmp_path: Path) -> None:
    done = run(foreign_program(tmp_path / "app"), "+influence=capture", path=ROOT)
    assert done.returncode == 0, done.stderr
    names = dict(json.loads(done.stdout.strip().splitlines()[-1]))
    assert set(names) == {"Timer", "GradientSnapshot"}
    assert names["GradientSnapshot"].endswith("/influence")


def test_capture_in_a_foreign_program_from_the_wheel(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "lightning_influence" / "configs" / "influence" / "capture.yaml").is_file()
    assert not (tmp_path / "site" / "hydra_plugins" / "__init__.py").exists()
    done = run(foreign_program(tmp_path / "app"), "+influence=capture", path=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "GradientSnapshot" in done.stdout


def test_a_wrong_option_is_refused(tmp_path: Path) -> None:
    done = run(foreign_program(tmp_path / "app"), "+influence=nonsense", path=ROOT)
    assert done.returncode != 0
    assert "capture" in done.stderr  # Hydra lists what there is
