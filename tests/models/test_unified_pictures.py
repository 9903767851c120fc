"""12B's pictures at their real patch size against transformers in float64."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedVisionEmbedder

from gemma_mlx.models.gemma4.unified import UnifiedVisionEmbedder
from gemma_mlx.spec_gemma4_unified import UnifiedVisionSpec

DIMS = 48


@pytest.mark.parametrize("deviation", [0.3, 0.02, 0.001])
def test_bright_patches(deviation):
    """Nearly white paper: the mean of a patch's 6,912 values must be right to far more than 5e-5."""
    spec = UnifiedVisionSpec(mm_embed_dim=DIMS, mm_posemb_size=16, output_proj_dims=DIMS)
    sizes = {name: getattr(spec, name) for name in ("mm_embed_dim", "mm_posemb_size", "output_proj_dims")}
    config = SimpleNamespace(model_patch_size=spec.input_patch, rms_norm_eps=1e-6, **sizes)
    torch.manual_seed(0)
    reference = Gemma4UnifiedVisionEmbedder(config, SimpleNamespace(hidden_size=64)).float()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(torch.randn(weight.shape) * (0.3 if weight.ndim != 2 else weight.shape[1] ** -0.5))
    ours = UnifiedVisionEmbedder(spec, 64)
    ours.load_weights([(n, mx.array(w.detach().numpy())) for n, w in reference.state_dict().items()], strict=True)
    assert {n for n, _ in tree_flatten(ours.parameters())} == set(reference.state_dict())
    rng = np.random.default_rng(0)
    pixels = np.clip(0.98 + deviation * rng.standard_normal((1, 12, 3 * 48 * 48)), 0, 1).astype(np.float32)
    places = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(1, 12, 2)
    with torch.no_grad():
        single = reference(torch.tensor(pixels), torch.tensor(places), return_dict=True).pooler_output.numpy()
        exact = reference.double()(torch.tensor(pixels).double(), torch.tensor(places), return_dict=True)
    exact = exact.pooler_output.numpy()
    found = np.array(ours(mx.array(pixels), mx.array(places.astype(np.int32))))
    print(f"error in float32: transformers' {np.abs(single - exact).max():.1e}, ours {np.abs(found - exact).max():.1e}")
    assert np.abs(found - exact).max() <= 1e-5
