"""What is allowed and yet worth saying before anybody waits for it.

A notice is no error and no part of a label: the estimate is what its label says. It names something about the
environment, or about a policy in it, that people were surprised by.
"""

from typing import Literal

from pgengine.environments.episodes import EnvironmentFacts
from pgengine.spaces import BoxSpace, Space
from pgengine.spec import PolicySpec, Spec

__all__ = ["Notice", "NoticeCode", "notices_of"]

NoticeCode = Literal["not_repeatable", "image_as_numbers"]

IMAGE_SIDE = 8  # a box with two axes of at least as many numbers is taken for an image


class Notice(Spec):
    """Something worth knowing."""

    code: NoticeCode
    """Closed code."""
    message: str
    """The same for people."""


def notices_of(facts: EnvironmentFacts, policy: PolicySpec | None = None) -> list[Notice]:
    """What is worth saying of an environment, and of a policy in it.

    Args:
        facts: What is known of the environment, as `pgengine.describe` finds it out.
        policy: What acts in it; None says what is to be said of the environment alone.
    """
    found = []
    if not facts.repeatable:
        message = (
            "played twice with the same seed and the same actions, this environment gave different episodes: it draws "
            "from a generator that reset(seed=...) does not set, in its constructor perhaps, or keeps something from "
            "earlier episodes. Runs with one seed differ, and their updates cannot be made again. In a class of your "
            "own, take every draw from self.np_random, which super().reset(seed=seed) sets"
        )
        found.append(Notice(code="not_repeatable", message=message))
    shape = _image(facts.observation_space)
    if policy is not None and shape is not None:
        size = " x ".join(str(length) for length in shape)
        numbers = facts.observation_space.size if isinstance(facts.observation_space, BoxSpace) else 0
        scale = "" if policy.normalise_observations else ", and not scaled, unless normalise_observations is true"
        message = (
            f"the observation looks like an image of {size}; there are no convolutions here, so a policy of kind "
            f"{policy.kind} reads its {numbers} numbers one by one, without knowing which are neighbours{scale}. Small "
            "grey images or a few numbers that describe the picture are learned much faster"
        )
        found.append(Notice(code="image_as_numbers", message=message))
    return found


def _image(space: Space) -> list[int] | None:
    """Shape of what looks like an image, or a stack of them: two long axes at least, and two or three in all."""
    if not isinstance(space, BoxSpace) or len(space.shape) not in (2, 3, 4):
        return None
    return space.shape if sorted(space.shape)[-2] >= IMAGE_SIDE else None
