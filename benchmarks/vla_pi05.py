"""Pi0.5 on one GPU: loong beside LeRobot, the same batches and weights, in one run.

    python benchmarks/vla_pi05.py --rows pi05-14,pi05-32 --out benchmarks/results/h200

See benchmarks/README.md.
"""

from __future__ import annotations

import sys

from vla import main
from vla_rows import PI05_ROWS

if __name__ == "__main__":
    sys.exit(main(PI05_ROWS, __doc__))
