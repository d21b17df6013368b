"""torchrun for dist_train.sh and dist_test.sh, without its error report: the failing process prints its own error."""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    verbose = os.environ.get("ENC_VERBOSE", "0") not in ("", "0")
    if not verbose:
        logging.disable(logging.ERROR)
    try:
        main()
    except (KeyboardInterrupt, SignalException):  # rank 0 prints the advice
        sys.exit(130)
    except ChildFailedError as error:
        if verbose:
            raise
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed by a signal, so it could print nothing
            print(f"process {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        sys.exit(1)
