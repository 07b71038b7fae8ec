"""One program at a time in a run's folder: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from nextvid_mcore.training.manifest import CheckpointError

PATIENCE = 60.0  # seconds: a run whose launcher was killed still saves


def hold(out: Path, say: Callable[[str], None]) -> TextIO:
    """Lock `out`; closing the file frees it. A file system without locks is passed over, and it is said.

    Raises:
        CheckpointError: another program keeps it.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "a+")
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another program"
            if time.monotonic() > deadline:
                file.close()
                raise CheckpointError(
                    f"{out} is in use by {holder}; end that program, or choose another --out"
                ) from None
            if not told:
                say(f"waiting for {holder} to leave {out}")
                told = True
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            say(f"note: no lock on {out} ({error.strerror}); start only one run in it")
            return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file
