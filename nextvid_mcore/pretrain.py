"""Pretraining: `torchrun --nproc-per-node N -m nextvid_mcore.pretrain RECIPE --out DIR [settings]`.

One process needs no torchrun. `--dry-run [--world-size N]` prints the plan and stops; `--help` lists the
recipes and every setting. The same command run again goes on from the newest checkpoint in DIR. Ranks
whose torchrun dies save and end as on SIGTERM.

A process ends with one of these codes (torchrun itself answers 1 when one of its processes fails):

    0    the run is complete
    2    the settings can't work; nothing was started or changed, or a GPU's memory is full
    3    too many non-finite steps in a row (optim.max_skipped)
    4    the data can't be read: too many bad files, or a loader failed
    5    a checkpoint can't be read or written, the disk is full, or another program is in the folder
    6    a rank died or hung, or nothing went on for parallel.timeout seconds (parallel/watchdog.py)
    138  saved and ended because of SIGUSR1, as 143 SIGTERM, 130 Ctrl-C, 129 a terminal that was closed;
         130 too where Ctrl-C came twice, or before the first step: ended at once

Heavy imports stand inside `main`: loader processes import this module again.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from nextvid_mcore import cli
from nextvid_mcore.config import ConfigError, RunConfig
from nextvid_mcore.data.workers import orphaned, signal_at_parents_death

EXIT_NON_FINITE = 3
EXIT_DATA = 4
EXIT_CHECKPOINT = 5
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no room, a quota, read-only: for a line of metrics too


def quiet() -> None:
    """megatron-core and torch tell, at every import, what isn't installed; the plan says what is used."""
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def tell(text: str) -> None:
    """Once, however many processes torchrun has started."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, and print the plan or train. Returns the exit code."""
    quiet()
    if argv is None and "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_parents_death(signal.SIGTERM)
        if orphaned():  # it would look for torchrun's store for minutes
            cli.fail("torchrun died before this rank began", 128 + signal.SIGTERM, everywhere=True)
    try:
        config, options = cli.parse(sys.argv[1:] if argv is None else argv)
        from nextvid_mcore.parallel import plan

        if options.dry_run:
            tell(plan.describe(config, options.world_size))
            return 0
        plan.check(config, options.world_size)
    except cli.Help as text:
        tell(str(text))
        return 0
    except ConfigError as error:
        cli.fail(error)
    return train(config, options)


def train(config: RunConfig, options: cli.Options) -> int:
    """The run, with its failures as exit codes."""
    import torch.distributed as dist

    from nextvid_mcore.data.guard import DataError
    from nextvid_mcore.training.feed import LoaderError
    from nextvid_mcore.training.loop import NonFiniteError, Trainer
    from nextvid_mcore.training.manifest import CheckpointError
    from nextvid_mcore.training.start import check_init_from

    joined = dist.is_initialized()
    try:
        check_init_from(config, options.out)
        return Trainer(config, options.out).run()
    except (DataError, LoaderError) as error:
        cli.fail(error, EXIT_DATA, everywhere=True)
    except NonFiniteError as error:
        cli.fail(error, EXIT_NON_FINITE)
    except CheckpointError as error:
        cli.fail(error, EXIT_CHECKPOINT)
    except ConfigError as error:
        cli.fail(error, everywhere=True)
    except OSError as error:
        if error.errno not in DISK:
            raise
        said = f"{options.out}: {error.strerror}; make room, and the same command goes on from what was saved"
        cli.fail(said, EXIT_CHECKPOINT, everywhere=True)
    except KeyboardInterrupt:
        saved = "what was saved stays, and the same command goes on from there"
        cli.fail(f"ended at once by Ctrl-C; {saved}", 128 + signal.SIGINT, everywhere=True)
    finally:
        if dist.is_initialized() and not joined:
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
