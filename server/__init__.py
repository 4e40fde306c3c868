"""The server that trains and serves policies over HTTP."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("pgengine")
