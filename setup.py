"""The configs, which lie beside the package, go into it when it is built. Everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "hymba_lightning", "configs")
            target.mkdir(parents=True, exist_ok=True)
            for config in sorted(Path(__file__).parent.glob("configs/*.yaml")):
                self.copy_file(str(config), str(target / config.name))


setup(cmdclass={"build_py": BuildWithConfigs})
