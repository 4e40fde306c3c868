"""Every random number has an address."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgengine.noise import CHUNK, Noise


@given(st.integers(0, 2**53 - 1), st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 40))
def test_the_noise_of_an_episode_does_not_depend_on_how_many_follow(seed: int, update: int, k: int, more: int) -> None:
    noise = Noise(seed, "training", update)
    assert np.array_equal(noise.uniform("action", 3, k), noise.uniform("action", 3, k + more)[:k])
    assert np.array_equal(noise.normal("action", 0, k, 3), noise.normal("action", 0, k + more, 3)[:k])
    assert np.array_equal(noise.words("begin", k), noise.words("begin", k + more)[:k])


def test_no_two_addresses_share_numbers() -> None:
    seen = [
        Noise(seed, domain, update).uniform(purpose, chunk, 2)
        for seed in (0, 1, 2**53 - 1)
        for domain in ("training", "selection", "evaluation", "mode", "acting")
        for update in (0, 1, 2)
        for purpose in ("parameters", "begin", "action", "transition", "probe")
        for chunk in (0, 1)
    ]
    values = np.concatenate([matrix.ravel() for matrix in seen])
    assert values.shape == (3 * 5 * 3 * 5 * 2 * 2 * CHUNK,)
    assert len(np.unique(values)) == len(values)


def test_the_scheme_is_the_one_of_version_one() -> None:
    """Stored runs are replayed from these numbers: a change needs a new noise version."""
    noise = Noise(7, "training", 3)
    assert noise.words("begin", 2).tolist() == WORDS
    assert noise.uniform("action", 1, 1)[0, :3].tolist() == UNIFORMS


WORDS = [15226554465918655132, 1973034048717794535]
UNIFORMS = [0.33267005707086106, 0.745698674872071, 0.4430753990022286]
