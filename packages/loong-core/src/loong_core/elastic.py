"""torch.distributed.run with a quiet end: `python -m loong_core.elastic <torchrun's arguments>`.

Workers explain their own failures. torchrun would add its own traceback to every one of them, and to every Ctrl-C;
this says only what no worker could say: that one of them was ended by a signal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the workers; 0, or 1 when one of them failed or a signal came."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except SignalException:
        return 1
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:
                name = failure.signal_name()
                hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
                sys.stderr.write(f"error: the worker of rank {rank} was ended by {name}{hint}.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
