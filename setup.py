"""Builds what the machine can (CPU library with g++, CUDA library with nvcc, pybind11 facts) and warns for the rest."""

import importlib.util
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_module():
    # Importing the package would import torch, which an isolated build environment does not have.
    spec = importlib.util.spec_from_file_location("ras_fast_build", ROOT / "ras_fast/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


class BuildNative(build_py):
    """build_py, and the native libraries: into the wheel, or into the source tree for an editable install."""

    def run(self):
        super().run()
        build = load_build_module()
        package = ROOT / "ras_fast" if self.editable_mode else Path(self.build_lib).resolve() / "ras_fast"
        for name, result in build.build_all(package, ROOT / "build").items():
            if result != "built":
                warnings.warn(f"ras_fast: {name} was not built ({result})", stacklevel=1)
        if not self.editable_mode:
            # `ras-fast build` on the user's machine needs the sources.
            shutil.copytree(ROOT / "csrc", package / "csrc", dirs_exist_ok=True)


class NativeDistribution(Distribution):
    """Marks the wheel as platform-specific: the libraries in it are."""

    def has_ext_modules(self):
        return True


setup(
    packages=[*find_packages(include=["ras_fast", "ras_fast.*"]), "ras_fast.triton_kernels"],
    package_data={"ras_fast": ["assets/**/*"], "ras_fast.triton_kernels": ["configs.json"]},
    cmdclass={"build_py": BuildNative},
    distclass=NativeDistribution,
)
