"""Puts the library's configurations on every Hydra program's search path: `+influence=...` works anywhere."""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningInfluenceSearchPath(SearchPathPlugin):
    """Appends the folder of configurations, whether it came with a wheel or lies beside an editable install.

    Every Hydra program in the environment loads this class: it imports nothing heavy and never raises.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder after the program's own, so the program's configurations win."""
        spec = find_spec("lightning_influence")  # finds, does not import: no torch here
        for package in (spec.submodule_search_locations or ()) if spec else ():
            for folder in (Path(package) / "configs", Path(package).parent / "configs"):
                if (folder / "influence").is_dir():
                    search_path.append("lightning_influence", f"file://{folder}")
                    return
