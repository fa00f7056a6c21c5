"""GR00T N1.7 and N1.6 on one GPU: loong beside LeRobot (which has N1.7), the same batches and weights, in one run.

    python benchmarks/vla_groot.py --rows groot-n17-16,groot-n17-32 --out benchmarks/results/h200

See benchmarks/README.md.
"""

from __future__ import annotations

import sys

from vla import main
from vla_rows import GROOT_ROWS

if __name__ == "__main__":
    sys.exit(main(GROOT_ROWS, __doc__))
