"""Pack installed packages, without what they depend on, into one archive for a machine without a network.

    PYTHON tools/pack_packages.py ARCHIVE.tar.gz NAME ...

Run it with the interpreter that has them; unpack the archive there and put the folder on PYTHONPATH. Python's caches
and the packages' own tests stay behind.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

LEFT_OUT = ("__pycache__", "tests", "testing_data")


def files(found: Distribution) -> Iterator[tuple[Path, str]]:
    """Every file of a package below its site folder, and its name there."""
    for item in found.files or []:
        if item.parts[0] != ".." and not set(item.parts) & set(LEFT_OUT):
            yield Path(str(found.locate_file(item))), str(item)


def main() -> int:
    """Write the archive; 1 where a package is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    options = parser.parse_args()
    try:
        packages = [distribution(name) for name in options.names]
    except PackageNotFoundError as error:
        print(f"error: {error.name} is not installed for {sys.executable}", file=sys.stderr)
        return 1
    with tarfile.open(options.archive, "w:gz" if options.archive.suffix == ".gz" else "w:xz") as archive:
        for package in packages:
            for path, name in files(package):
                if path.is_file():
                    archive.add(path, name, recursive=False)
    size = options.archive.stat().st_size / 2**20
    print(f"{options.archive}: {', '.join(f'{p.name} {p.version}' for p in packages)}; {size:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
