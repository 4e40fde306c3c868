"""What can learn: networks, features and families of action distributions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pgengine.spec.base import Numbers, Spec, Tables

__all__ = [
    "BernoulliSpec",
    "DistributionSpec",
    "FeaturesSpec",
    "FourierFeaturesSpec",
    "GaussianSpec",
    "JointFeaturesSpec",
    "LinearPolicySpec",
    "MlpPolicySpec",
    "OneHotFeaturesSpec",
    "PlainFeaturesSpec",
    "PolicySpec",
    "PolynomialFeaturesSpec",
    "RbfFeaturesSpec",
    "ScorePolicySpec",
    "SoftmaxSpec",
    "TableFeaturesSpec",
    "TileFeaturesSpec",
    "TransformerPolicySpec",
]


# --- distributions ----------------------------------------------------------------------------------------------------


class SoftmaxSpec(Spec):
    """Softmax over a finite set of actions, or one for each component of a MultiDiscrete action.

    Source: Bereyhi, chapter 5, softmax policy.
    """

    kind: Literal["softmax"] = "softmax"
    """Which family of distributions this is."""


class BernoulliSpec(Spec):
    """A coin for each component of a MultiBinary action."""

    kind: Literal["bernoulli"] = "bernoulli"
    """Which family of distributions this is."""


class GaussianSpec(Spec):
    """Diagonal Gaussian over a box of actions. Source: Bereyhi, chapter 5; Sun, N(mu(s), sigma^2 I), STD by an MLP."""

    kind: Literal["gaussian"] = "gaussian"
    """Which family of distributions this is."""
    sigma: Literal["fixed", "learned", "head"] = "learned"
    """Whether the standard deviation stays as it is, is a parameter of its own for each dimension, or is an output of
    the network beside the mean."""
    initial_sigma: Annotated[float, Field(ge=1e-3, le=100.0)] = 0.5
    """Standard deviation at the start: with clip in the `unit` of a draw, with tanh before squashing."""
    action_map: Literal["clip", "tanh"] = "clip"
    """How a draw becomes an action inside the box; outside the density, so the score is taken at the raw draw."""
    unit: Literal["action", "box"] = "action"
    """What a draw is measured in, with clip: in the numbers of the action, or in those of the box, in which 0 is the
    middle between two bounds and 1 half their distance. A number without two bounds is measured in its own. Left out
    together with `initial_sigma`: box, unless all actions have bounds like -1 and 1: a middle near 0, and not farther
    than 4 and not nearer than 0.5 to it; or none at all."""


DistributionSpec = Annotated[SoftmaxSpec | BernoulliSpec | GaussianSpec, Field(discriminator="kind")]


# --- features ---------------------------------------------------------------------------------------------------------


class PlainFeaturesSpec(Spec):
    """The observation's own numbers and a constant 1."""

    kind: Literal["plain"] = "plain"
    """Which features these are."""


class OneHotFeaturesSpec(Spec):
    """One feature for each value of a discrete observation."""

    kind: Literal["one_hot"] = "one_hot"
    """Which features these are."""


class TableFeaturesSpec(Spec):
    """Explicit features x(s, a), or x(s), of a discrete observation.

    Source: Bereyhi, chapter 5, x: S x A -> R^J.
    """

    kind: Literal["table"] = "table"
    """Which features these are."""
    values: Tables | None = None
    """[O][A][J]: features of each observation and action. null: those of the finite MDP."""


class PolynomialFeaturesSpec(Spec):
    """All products of the observation's numbers up to a degree, the constant included."""

    kind: Literal["polynomial"] = "polynomial"
    """Which features these are."""
    degree: Annotated[int, Field(ge=1, le=6)] = 2
    """Largest total degree of a product."""


class _Bounded(Spec):
    low: Numbers | None = None
    """Value of each number that is scaled to 0; null takes the space's bounds."""
    high: Numbers | None = None
    """Value of each number that is scaled to 1; null takes the space's bounds."""


class FourierFeaturesSpec(_Bounded):
    """cos(pi c'x) for all whole vectors c up to an order, on observations scaled to [0, 1] (Konidaris et al. 2011)."""

    kind: Literal["fourier"] = "fourier"
    """Which features these are."""
    order: Annotated[int, Field(ge=1, le=10)] = 3
    """Largest entry of c."""


class RbfFeaturesSpec(_Bounded):
    """Gaussian bumps on a grid over observations scaled to [0, 1], and a constant 1."""

    kind: Literal["rbf"] = "rbf"
    """Which features these are."""
    centres: Annotated[int, Field(ge=1, le=20)] = 5
    """Centres along each axis."""
    width: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    """Standard deviation of a bump on the scaled axes; null: the distance of two centres."""


class TileFeaturesSpec(_Bounded):
    """Tile coding: overlapping grids, each shifted against the others; one active tile in each.

    Source: Sutton and Barto, Reinforcement Learning, section 9.5.4.
    """

    kind: Literal["tile"] = "tile"
    """Which features these are."""
    tilings: Annotated[int, Field(ge=1, le=64)] = 8
    """How many grids."""
    tiles: Annotated[int, Field(ge=1, le=64)] = 8
    """Tiles along each axis of a grid."""


class JointFeaturesSpec(Spec):
    """Products of the numbers of [s, a] taken as one vector: x = [s, a] at degree 1.

    At degree 1 the state cancels in a softmax, whose policy then ignores it; from degree 2 on the products of state
    and action tell states apart. Other features are crossed with the action, which always does.

    Source: Bereyhi, chapter 5, x(s, a) = [x, y, a] of the moving particle.
    """

    kind: Literal["joint"] = "joint"
    """Which features these are."""
    degree: Annotated[int, Field(ge=1, le=6)] = 1
    """Largest total degree of a product."""


FeaturesSpec = Annotated[
    PlainFeaturesSpec
    | OneHotFeaturesSpec
    | TableFeaturesSpec
    | PolynomialFeaturesSpec
    | FourierFeaturesSpec
    | RbfFeaturesSpec
    | TileFeaturesSpec
    | JointFeaturesSpec,
    Field(discriminator="kind"),
]


# --- networks ---------------------------------------------------------------------------------------------------------

Activation = Literal["tanh", "relu"]
Hidden = Annotated[list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=8)]
InitialParameters = Annotated[dict[str, Any], Field(max_length=64)]


class LinearPolicySpec(Spec):
    """Logits or means that are linear in features. Source: Bereyhi, chapter 5, linear policies."""

    kind: Literal["linear"] = "linear"
    """Which network this is."""
    features: FeaturesSpec | None = None
    """Features x(s) or x(s, a). null: the table of a finite MDP that has one, one_hot for other discrete observations,
    plain for boxes. Features of the state alone are crossed with the action."""
    distribution: DistributionSpec | None = None
    """Family of action distributions; null takes the one that fits the action space."""
    normalise_observations: bool = False
    """Whether a box of observations is brought to mean 0 and deviation 1, by figures that are part of the policy and
    move only between updates."""
    initial_parameters: InitialParameters | None = None
    """Values to start from by parameter name, nested lists of numbers; null starts from zero."""


class MlpPolicySpec(Spec):
    """A fully connected network. Source: Bereyhi, chapter 5, deep policy network; Sun, f_theta as an MLP."""

    kind: Literal["mlp"] = "mlp"
    """Which network this is."""
    hidden: Hidden = Field(default_factory=lambda: [64, 64])
    """Widths of the hidden layers."""
    activation: Activation = "tanh"
    """Function after each hidden layer."""
    distribution: DistributionSpec | None = None
    """Family of action distributions; null takes the one that fits the action space."""
    normalise_observations: bool = False
    """Whether a box of observations is brought to mean 0 and deviation 1, by figures that are part of the policy and
    move only between updates."""
    initial_parameters: InitialParameters | None = None
    """Values to start from by parameter name, nested lists of numbers; null draws them from the seed."""


class ScorePolicySpec(Spec):
    """A network f(s, a) that gives one score for each pair, and a softmax over the actions.

    Source: Sun, Policy Gradient, f_theta: S x A -> R.
    """

    kind: Literal["score"] = "score"
    """Which network this is."""
    hidden: Hidden = Field(default_factory=lambda: [64, 64])
    """Widths of the hidden layers."""
    activation: Activation = "tanh"
    """Function after each hidden layer."""
    features: TableFeaturesSpec | None = None
    """Features x(s, a) that it reads. null: the table of a finite MDP that has one, otherwise the observation beside a
    one-hot action."""
    distribution: SoftmaxSpec | None = None
    """A softmax over the actions."""
    normalise_observations: bool = False
    """Whether a box of observations is brought to mean 0 and deviation 1, by figures that are part of the policy and
    move only between updates."""
    initial_parameters: InitialParameters | None = None
    """Values to start from by parameter name, nested lists of numbers; null draws them from the seed."""


class TransformerPolicySpec(Spec):
    """A transformer over the last k observations: a policy with memory.

    Source: Sun, Policy Gradient, f_theta as a transformer.
    """

    kind: Literal["transformer"] = "transformer"
    """Which network this is."""
    window: Annotated[int, Field(ge=1, le=128)] = 8
    """k, how many observations it reads, the newest one included."""
    width: Annotated[int, Field(ge=2, le=512)] = 32
    """Numbers for each observation inside the network; a multiple of `heads`."""
    heads: Annotated[int, Field(ge=1, le=16)] = 2
    """Heads of attention."""
    layers: Annotated[int, Field(ge=1, le=8)] = 1
    """Blocks of attention and a fully connected layer."""
    activation: Activation = "relu"
    """Function inside the fully connected layers."""
    distribution: DistributionSpec | None = None
    """Family of action distributions; null takes the one that fits the action space."""
    normalise_observations: bool = False
    """Whether a box of observations is brought to mean 0 and deviation 1, by figures that are part of the policy and
    move only between updates."""
    initial_parameters: InitialParameters | None = None
    """Values to start from by parameter name, nested lists of numbers; null draws them from the seed."""


PolicySpec = Annotated[
    LinearPolicySpec | MlpPolicySpec | ScorePolicySpec | TransformerPolicySpec, Field(discriminator="kind")
]
