"""From uniform numbers and words of noise to what environments draw: indices and normal numbers."""

import numpy as np
from jaxtyping import Float, Int, UInt64

__all__ = ["cumulated", "index_at", "normals", "uniform_of_word", "uniforms_of_words"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def cumulated(probabilities: Float[np.ndarray, "*rows n"]) -> Float[np.ndarray, "*rows n"]:
    """Distribution function with its last possible value at exactly 1, so that nothing impossible is drawn."""
    cdf = np.cumsum(probabilities, axis=-1)
    last = probabilities.shape[-1] - 1 - np.argmax(probabilities[..., ::-1] > 0, axis=-1)
    return np.where(np.arange(probabilities.shape[-1]) >= last[..., None], 1.0, cdf)


def index_at(cdf: Float[np.ndarray, "rows n"], uniforms: Float[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Inverts the distribution function of each row at its number."""
    index: np.ndarray = np.count_nonzero(cdf[..., :-1] <= uniforms[:, None], axis=-1)
    return index


def normals(uniforms: Float[np.ndarray, "N even"], width: int) -> Float[np.ndarray, "N width"]:
    """Standard normal numbers from twice as many uniform ones, rounded up to whole pairs.

    A pair (u, v) gives sqrt(-2 log(1 - u)) times cos(2 pi v) and times sin(2 pi v), which are independent.

    Args:
        uniforms: Numbers in [0, 1), an even number for each row, at least `width`.
        width: How many normal numbers each row gets.

    Source: Box and Muller, A note on the generation of random normal deviates, 1958.
    """
    radius = np.sqrt(-2.0 * np.log1p(-uniforms[:, 0::2]))
    angle = 2.0 * np.pi * uniforms[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(len(uniforms), -1)[:, :width]


def uniform_of_word(words: UInt64[np.ndarray, "*K"]) -> Float[np.ndarray, "*K"]:
    """A number in [0, 1) from the upper 53 bits of a word."""
    return (words >> np.uint64(11)) * 2.0**-53


def uniforms_of_words(words: UInt64[np.ndarray, "K"], width: int) -> Float[np.ndarray, "K width"]:
    """Several independent numbers in [0, 1) from each word, which is the state of a generator of its own.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014: SplitMix64.
    """
    steps = np.arange(1, width + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what is wanted
        z = words[:, None] + _GOLDEN * steps
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return uniform_of_word(z ^ (z >> np.uint64(31)))
