"""Generation targets behind one protocol (Table 3): pixels, VA-VAE, SigLIP2 features, Cosmos latents."""

from nextvid_mcore.targets.base import Target, build_target, target_channels, width_note

__all__ = ["Target", "build_target", "target_channels", "width_note"]
