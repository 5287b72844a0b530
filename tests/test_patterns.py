"""The demo set: balanced, the same everywhere, and neither trivial nor hopeless."""

import numpy as np
import pytest

from mocokit.data.open import open_data
from mocokit.data.sources import patterns
from mocokit.data.sources.arrays import ArraySource


@pytest.fixture(scope="module")
def demo() -> tuple[ArraySource, ArraySource]:
    train, test = open_data(None)
    assert isinstance(train, ArraySource) and isinstance(test, ArraySource)
    return train, test


def test_sizes_names_and_balance(demo: tuple[ArraySource, ArraySource]) -> None:
    train, test = demo
    assert train.images.shape == (6000, 32, 32, 3) and test.images.shape == (1200, 32, 32, 3)
    assert train.name == test.name == "demo" and train.images.dtype == np.uint8
    assert len(train.classes) == 12 and train.classes == test.classes
    assert train.labels is not None and np.bincount(train.labels).tolist() == [500] * 12
    assert test.labels is not None and np.bincount(test.labels).tolist() == [100] * 12


def test_the_same_pixels_on_every_machine(demo: tuple[ArraySource, ArraySource]) -> None:
    # No value lies within 3e-8 of a rounding boundary, and float64 errs by 1e-13.
    assert demo[0].fingerprint == "8b51b2981afa44a5711797501a81c390"
    assert demo[1].fingerprint == "218b1544da03507d99bfd7c4c52e91f3"


def test_an_image_does_not_depend_on_how_many_are_drawn(
    demo: tuple[ArraySource, ArraySource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "_CHUNK", 7)
    some = patterns._split(1, 120, labelled=True)
    np.testing.assert_array_equal(some.images, demo[1].images[:120])


def test_no_image_is_flat_or_repeated(demo: tuple[ArraySource, ArraySource]) -> None:
    images = np.concatenate([demo[0].images, demo[1].images])
    gray = images.astype(np.float32).mean(-1).reshape(len(images), -1)
    assert gray.std(1).min() > 4
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 7200


def test_raw_pixels_score_27_percent(demo: tuple[ArraySource, ArraySource]) -> None:
    train, test = (source.images.reshape(len(source), -1) / np.float32(255) for source in demo)
    mean = train.mean(0)
    train, test = train - mean, test - mean
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    test /= np.linalg.norm(test, axis=1, keepdims=True)
    cosine = test @ train.T
    nearest = np.argpartition(-cosine, 200, axis=1)[:, :200]
    weights = np.exp(np.take_along_axis(cosine, nearest, 1) / 0.1)
    assert demo[0].labels is not None and demo[1].labels is not None
    votes = [(weights * (demo[0].labels[nearest] == one)).sum(1) for one in range(12)]
    score = (np.argmax(votes, axis=0) == demo[1].labels).mean()
    assert 0.26 < score < 0.28


def test_labels_can_be_dropped() -> None:
    train, validation = open_data(None, "none")
    assert train.labels is None and train.classes == ()
    assert validation is not None and validation.labels is None
