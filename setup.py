"""Maps the top-level folder kernels/ to the package fgfast.kernels; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fgfast", "fgfast.*"]), "fgfast.kernels"],
    package_dir={"fgfast": "fgfast", "fgfast.kernels": "kernels"},
)
