"""Train again on a random part of the training set, an ordinary Trainer fit a job, and keep what the model says.

python recipes/retrain.py -m cache=/folder/of/truths subset='range(0,10)' seed=1,2
python recipes/retrain.py -m cache=/folder/of/truths data=sst2 data.source.data_root=/path/to/data subset='range(0,50)'

Jobs that are known already are not trained again, and several may run at once (hydra/launcher=joblib).
`recipes.truths.trainer_fits.trainer_truth` reads what they found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.truths.trainer_fits import retrain_one


@hydra.main(version_base="1.3", config_path="../configs", config_name="retrain")
def main(config: DictConfig) -> None:
    """Make the truth of one subset and one seed."""
    made = retrain_one(config)
    print(f"subset {config.subset}, seed {config.seed}: {'trained' if made else 'known already'}")


if __name__ == "__main__":
    main()
