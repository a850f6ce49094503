"""Beside what pyproject.toml says: a wheel made where there is a compiler brings the CPU's kernels compiled."""

import platform
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from nai_t5_core.backends.kernels.compilers import BROUGHT, FOLDER, GXX, RECIPES

CAN_BRING = sys.platform.startswith("linux") and platform.machine() == "x86_64" and GXX.is_there


class WithKernels(build_py):
    def run(self) -> None:
        super().run()
        # What is installed in place compiles them when they are first used: they change with their sources.
        if not CAN_BRING or self.editable_mode:
            return
        folder = Path(self.build_lib, "nai_t5_core", "backends", FOLDER.name, BROUGHT.name)
        shutil.rmtree(folder, ignore_errors=True)  # those of an earlier build
        for recipe in RECIPES:
            self.announce(f"compiling the kernels for {recipe.name}", level=2)
            try:
                GXX.build(recipe, folder / GXX.file_name(recipe))
            except RuntimeError as error:  # an older compiler knows fewer processors
                self.warn(f"the wheel goes without the kernels for {recipe.name}: {error}")


class OfAnyPython(bdist_wheel):
    """The kernels are for one system and processor, and for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return ("py3", "none", system) if CAN_BRING else (python, abi, system)


class OfOneSystem(Distribution):
    def has_ext_modules(self) -> bool:
        return CAN_BRING


setup(cmdclass={"build_py": WithKernels, "bdist_wheel": OfAnyPython}, distclass=OfOneSystem)
