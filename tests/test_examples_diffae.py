"""The example runs, small, and what its figure shows is so."""

from pathlib import Path

import pytest
from PIL import Image

from examples import diffusion_autoencoder

pytestmark = pytest.mark.usefixtures("in_process")


def test_two_codes_of_a_picture(tmp_path: Path) -> None:
    found = diffusion_autoencoder.main(tmp_path, small=True)
    with Image.open(tmp_path / "diffusion_autoencoder.png") as figure:
        assert min(figure.size) > 500
    assert found["reconstruction"] < 0.5 * found["variation"]
    assert found["most ink"] > found["least ink"] + 0.5
    assert found["most slant"] > found["least slant"]
