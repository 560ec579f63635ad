"""Pictures and ego features as the graphs take them."""

import numpy as np
import pytest

from spanvla_ros.model.inputs import ego_features, pixels
from spanvla_ros.types import EgoState, Observation, SpanvlaError


def test_pixels_are_planes_between_zero_and_one():
    image = np.random.default_rng(0).integers(0, 256, (112, 224, 3), dtype=np.uint8)
    planes = pixels(image)
    assert planes.shape == (1, 3, 112, 224)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    np.testing.assert_allclose(planes[0, 1], image[..., 1] / 255.0, atol=1e-6)


@pytest.mark.parametrize('size', [(376, 1241), (480, 640), (56, 112), (300, 100)])
def test_other_sizes_are_cut_around_their_middle(size):
    rows, columns = size
    image = np.zeros((rows, columns, 3), np.uint8)
    image[:, : columns // 2, 0] = 200
    image[: rows // 2, :, 1] = 100
    planes = pixels(image, 112, 224)[0]
    assert planes.shape == (3, 112, 224)
    assert planes[0, :, :105].min() == pytest.approx(200 / 255, abs=0.01)
    assert planes[0, :, 119:].max() == 0.0
    assert planes[1, :49].min() == pytest.approx(100 / 255, abs=0.01)
    assert planes[1, 63:].max() == 0.0


def test_a_speck_of_a_picture_is_refused():
    with pytest.raises(SpanvlaError, match='too small'):
        pixels(np.zeros((1, 5, 3), np.uint8), 112, 224)


def test_ego_features_have_their_places():
    seen = Observation(
        stamp_ns=0,
        frames=(),
        ego=EgoState(0, 1.0, 2.0, 3.0, 12.0, 1.5, 0.2),
        history=np.array([[-16.0, 8.0, 0.5], [-8.0, 4.0, 0.2], [-4.0, 0.0, 0.1]]),
        history_valid=np.array([False, True, True]),
        route=None,
        command='right',
    )
    features = ego_features(seen)
    expected = [0.5, 0.5, 0.2, 0, 0, 0, -1, 0.5, 0.6, -0.5, 0, 0.3, 0, 1, 1, 0, 0, 1, 0, 0]
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert features.dtype == np.float32
    assert seen.history[0, 0] == -16.0
