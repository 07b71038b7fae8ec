"""An exported encoder as a folder for `transformers.AutoModel.from_pretrained(dir, trust_remote_code=True)`.

The folder: config.json, model.safetensors, preprocessor_config.json, README.md (card.py), and the code: the
hub's own vit.py, copied, under a thin shell. Writing it needs no transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nextvid_mcore.config import RunConfig
from nextvid_mcore.hub.hf import card

HERE = Path(__file__).parent
CODE = ("configuration_nextvid.py", "modeling_nextvid.py", "processing_nextvid.py")
FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "vit.py", *CODE)
NAMES = {  # transformers' name: the hub's
    "image_size": "image_size",
    "num_frames": "frames",
    "patch_size": "patch_size",
    "tubelet_size": "tubelet_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_eps",
    "rope_base": "rope_base",
}


def write_folder(
    folder: Path,
    run: RunConfig,
    config: Mapping[str, Any],
    encoder: Mapping[str, Tensor],
    metrics: Mapping[str, Any] | None = None,
    held_out: Mapping[str, Any] | None = None,
) -> None:
    """Fill an empty folder. config: the hub's flat config; encoder: the hub encoder's state."""
    from safetensors.torch import save_file

    state = {f"vit.{name}": value for name, value in encoder.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(HERE.parent / "vit.py", folder)
    for name in CODE:
        shutil.copy(HERE / name, folder)
    settings = {
        "model_type": "nextvid",
        "architectures": ["NextVidModel"],
        "auto_map": {
            "AutoConfig": "configuration_nextvid.NextVidConfig",
            "AutoModel": "modeling_nextvid.NextVidModel",
        },
        **{theirs: config[ours] for theirs, ours in NAMES.items()},
        "dtype": "float32",
        "nextvid": {key: config[key] for key in ("recipe", "step", "weights", "version")},
    }
    processor = {
        "image_processor_type": "NextVidProcessor",
        "video_processor_type": "NextVidVideoProcessor",
        "auto_map": {
            "AutoImageProcessor": "processing_nextvid.NextVidProcessor",
            "AutoVideoProcessor": "processing_nextvid.NextVidVideoProcessor",
        },
        "size": {"height": config["image_size"], "width": config["image_size"]},
        "num_frames": config["frames"],
        "tubelet_size": config["tubelet_size"],
    }
    for name, value in (("config.json", settings), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    parameters = sum(value.numel() for value in encoder.values())
    (folder / "README.md").write_text(card.write(run, config, parameters, metrics, held_out))
    for path in folder.iterdir():
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner alone
