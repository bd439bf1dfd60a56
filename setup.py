"""Adds the files of `src/` to the wheel as `bitblas/src`; everything else is declared in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCES = Path(__file__).parent.resolve() / "src"


class BuildWithSources(build_py):
    """Copy `src/` into the built package.

    An editable install copies nothing: `bitblas.sources` finds the checkout's own `src/`.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._sources():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = list(super().get_outputs(include_bytecode))
        return outputs if self.editable_mode else outputs + [str(target) for _, target in self._sources()]

    def _sources(self) -> list[tuple[Path, Path]]:
        packaged = Path(self.build_lib) / "bitblas" / "src"
        files = sorted(path for path in SOURCES.rglob("*") if path.is_file())
        return [(path, packaged / path.relative_to(SOURCES)) for path in files]


setup(cmdclass={"build_py": BuildWithSources})
