"""The version of this distribution, in the one place that every tool reads."""

__version__ = "0.1.0"
