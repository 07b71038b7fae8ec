"""Turn a published V-JEPA 2 checkpoint into a folder that tools/probe.py takes as an encoder.

    python tools/import_vjepa2.py vitl.pt --out exports/vjepa2_vitl

Reads the encoder's weights under their published names (the EMA encoder, as V-JEPA 2 evaluates it; --key
for another) and writes config.json and model.safetensors. Strict: a missing, surplus or misshapen tensor is
an error. The encoder computes what V-JEPA 2's own code does, its rotary embedding's quirk included; see
nextvid_mcore/evaluation/vjepa2.py. Nothing is downloaded, and the file's pickled code is never run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # so that it runs from a clone that isn't installed

import torch  # noqa: E402

from nextvid_mcore.config import ConfigError, require  # noqa: E402
from nextvid_mcore.evaluation import vjepa2  # noqa: E402
from nextvid_mcore.evaluation.results import writable_folder  # noqa: E402


def import_checkpoint(checkpoint: Path, out: Path, key: str | None, heads: int | None) -> str:
    """Write the folder and load it again; returns a line about it."""
    require(checkpoint.is_file(), f"there is no file {checkpoint}; give a checkpoint such as vitl.pt")
    require(
        not out.exists() or (out.is_dir() and not any(out.iterdir())),
        f"--out {out} exists; name a new folder",
    )
    config, state = vjepa2.convert(vjepa2.read_checkpoint(checkpoint, key), heads)
    vjepa2.build(config, state, str(checkpoint))  # strict, before anything is written
    writable_folder(out)
    vjepa2.save(out, config, state)
    loaded = vjepa2.load(out)
    require(
        all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items()),
        f"{out} does not hold what was written; check the disk",
    )
    millions = sum(p.numel() for p in loaded.parameters()) / 1e6
    return (
        f"{out}: {millions:.1f}M parameters, width {config['width']}, depth {config['depth']}, "
        f"{config['heads']} heads"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, metavar="FILE", help="e.g. vitl.pt, vith.pt, vitg.pt")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--key", help=f"the checkpoint's encoder (default: {', else '.join(vjepa2.ROLES)})")
    parser.add_argument("--heads", type=int, help="attention heads, where the width is none of the published")
    args = parser.parse_args(argv)
    try:
        print(import_checkpoint(args.checkpoint, args.out, args.key, args.heads))
    except (ConfigError, OSError) as error:
        print(f"import_vjepa2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
