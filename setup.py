"""The configs, which lie beside the package, go into it when it is built. Everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for config in sorted(Path(__file__).parent.glob("configs/**/*.yaml")):
                target = Path(self.build_lib, "hymba_lightning", config.relative_to(Path(__file__).parent))
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(config), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
