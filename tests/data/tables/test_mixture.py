"""Mixtures that cannot be read."""

import pytest

from gemma_mlx.data.sources.opening import open_parts
from gemma_mlx.errors import InputError


@pytest.mark.parametrize("name", ["gs://bucket/mix.yaml", "https://example.org/mix.yml", "hf://datasets/a/b/mix.yaml"])
def test_a_mixture_far_away_is_not_said_to_be_missing(name):
    with pytest.raises(InputError) as caught:
        open_parts(name)
    assert str(caught.value) == (
        f"{name}: a mixture is read from this machine alone; copy the file here, its sources may be URLs"
    )
