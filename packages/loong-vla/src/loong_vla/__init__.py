"""Robot policies on the torch engine: families, LeRobot data, tasks, serving. `plugin.py` is what loong loads."""

from loong_vla.__about__ import __version__

__all__ = ["__version__"]
