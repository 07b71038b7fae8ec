"""Generation targets behind one protocol: pixels and VA-VAE latents."""

from nextvid_mcore.targets.base import Target, build_target, target_channels

__all__ = ["Target", "build_target", "target_channels"]
