"""The version of melinoe, written here alone: pyproject.toml and `melinoe.__version__` read it."""

__version__ = "0.1.0"
