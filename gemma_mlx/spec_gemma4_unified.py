"""What is of its own in the config of Gemma 4 12B (``gemma4_unified``): media without towers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnifiedVisionSpec:
    """Pictures as merged patches (transformers' ``Gemma4UnifiedVisionConfig``)."""

    patch_size: int = 16
    pooling_kernel_size: int = 3
    mm_embed_dim: int = 3840
    mm_posemb_size: int = 1120
    rms_norm_eps: float = 1e-6
    output_proj_dims: int = 3840
    """As in the files: the text's hidden size."""
    default_output_length: int = 280
    """Soft-token budget of a picture unless one is asked for."""

    @property
    def input_patch(self) -> int:
        """Pixels along one side of a patch as the model takes it: of a merged one."""
        return self.patch_size * self.pooling_kernel_size

    @property
    def input_pooling(self) -> int:
        """Patches along one side of a soft token: they come merged."""
        return 1


@dataclass(frozen=True)
class UnifiedAudioSpec:
    """Clips as frames of raw samples (transformers' ``Gemma4UnifiedAudioConfig``)."""

    audio_embed_dim: int = 640
    """Samples of a frame, each frame a soft token."""
    rms_norm_eps: float = 1e-6

    @property
    def frames_per_token(self) -> int:
        """Feature frames of one soft token."""
        return 1

    @property
    def max_samples(self) -> None:
        """The longest clip: there is no limit."""
        return None

    def soft_tokens(self, n_samples: int) -> int:
        """Soft tokens of a clip at 16 kHz: its frames, the last one filled up with zeros."""
        return -(-n_samples // self.audio_embed_dim)


TEXT_DEFAULTS = {
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
}
"""Where a text config of this kind says nothing, and ``gemma4``'s default is another."""
