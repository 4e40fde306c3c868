"""A transformer over the last k observations: a policy with memory.

Pure functions of (parameters, encoded windows), written once for numpy and torch. Blocks are pre-norm (Xiong et al.
2020): x + attention(norm(x)), then x + layer(norm(x)). Places of the window before the beginning of the episode are
kept out of the attention, so nothing that stands there can be seen; positions are counted from the newest observation.

Source: Sun, Policy Gradient, f_theta as a transformer; Vaswani et al. 2017, scaled dot-product attention.
"""

import math

import numpy as np

from pgengine.distributions import Array, namespace
from pgengine.errors import SpecError
from pgengine.noise import Noise
from pgengine.policies.layers import activate, encoded_numbers, orthogonal, product, width_of_numbers
from pgengine.policies.memory import present
from pgengine.spaces import DiscreteSpace, Space
from pgengine.spec import TransformerPolicySpec

__all__ = ["Transformer"]

EXPANSION = 4  # width of the fully connected layer of a block, in widths of the network
NORM_EPSILON = 1e-5
NOWHERE = -1e30  # a score whose exponential is zero beside any other, and which is no infinity to subtract


class Transformer:
    """Reads windows [N, k, …] and gives the outputs of the newest position."""

    def __init__(self, spec: TransformerPolicySpec, space: Space, width: int) -> None:
        """Reads the sizes.

        Raises:
            SpecError: if the width is no multiple of the heads.
        """
        if spec.width % spec.heads:
            raise SpecError("/width", "width_not_divisible", f"expected a multiple of heads, which are {spec.heads}")
        self._space = space
        self._k, self._W, self._heads, self._layers = spec.window, spec.width, spec.heads, spec.layers
        self._activation = spec.activation
        self._inputs = width_of_numbers(space)
        self._width = width

    @property
    def numbers(self) -> int:
        """At every place the embedding, and in each block norms, queries, keys, values, the wide layer, the scores."""
        k, W = self._k, self._W
        block = k * (4 + 3 * EXPANSION) * W
        # the last block is asked for the newest place alone
        scores = 4 * self._heads * k * (k * (self._layers - 1) + 1)
        return k * (self._inputs + 1 + 2 * W) + self._layers * block + scores

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """An embedding, positions from the oldest to the newest, the blocks, a last norm and the head."""
        W, wide = self._W, EXPANSION * self._W
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self._inputs, W), "position": (self._k, W)}
        for n in range(self._layers):
            b = f"blocks.{n}"
            shapes |= {f"{b}.norm0.scale": (W,), f"{b}.norm0.shift": (W,)}
            shapes |= {f"{b}.{name}.weight": (W, W) for name in ("query", "key", "value", "merge")}
            shapes |= {f"{b}.merge.bias": (W,), f"{b}.norm1.scale": (W,), f"{b}.norm1.shift": (W,)}
            shapes |= {f"{b}.expand.weight": (W, wide), f"{b}.expand.bias": (wide,)}
            shapes |= {f"{b}.contract.weight": (wide, W), f"{b}.contract.bias": (W,)}
        shapes |= {"norm.scale": (W,), "norm.shift": (W,), "head.weight": (W, self._width), "head.bias": (self._width,)}
        return shapes

    def initial(self, noise: Noise) -> dict[str, np.ndarray]:
        """Orthogonal matrices; norms that do nothing yet; a small head: all actions start about equally likely.

        What is added to the stream of a block is scaled by 1 / sqrt(2 * layers), so that depth does not make it grow.
        """
        added = 1.0 / math.sqrt(2 * self._layers)
        parameters: dict[str, np.ndarray] = {}
        for index, (name, shape) in enumerate(self.shapes().items()):
            if len(shape) == 1:
                value = np.ones(shape) if name.endswith(".scale") else np.zeros(shape)
                parameters[name] = value.astype(np.float32)
            elif name == "position":  # as long as an observation's embedding
                draws = noise.matrix("parameters", index, (shape[0], shape[1]))
                parameters[name] = (draws / math.sqrt(self._W)).astype(np.float32)
            else:
                gain = 0.01 if name == "head.weight" else added if ".merge." in name or ".contract." in name else 1.0
                parameters[name] = orthogonal(noise, index, (shape[0], shape[1]), gain)
        return parameters

    def encode(self, observations: np.ndarray) -> np.ndarray:
        """Windows [N, k, …], or observations [N, …] if k is 1, as numbers.

        Returns:
            [N, k] indices of a discrete observation, -1 where there is none; otherwise [N, k, D + 1], the last number
            1 where there is an observation and 0, as all others, where there is none.
        """
        seen = observations[:, None] if self._k == 1 else observations
        there = present(self._space, seen)
        if isinstance(self._space, DiscreteSpace):
            return np.where(there, seen - self._space.start, -1)
        N, k = there.shape
        filled = np.zeros_like(seen)
        filled[:] = getattr(self._space, "starts", 0)  # any value that can be read
        filled[there] = seen[there]
        numbers = encoded_numbers(self._space, filled.reshape(N * k, *seen.shape[2:])).reshape(N, k, -1)
        encoded: np.ndarray = np.concatenate([numbers * there[:, :, None], there[:, :, None]], axis=2, dtype=np.float32)
        return encoded

    def outputs(self, parameters: dict[str, Array], encoded: Array) -> Array:
        """Outputs [N, width] of the newest position."""
        xp, p = namespace(parameters["position"]), parameters
        if isinstance(self._space, DiscreteSpace):
            there = encoded >= 0
            indices = xp.reshape(xp.where(there, encoded, xp.zeros_like(encoded)), (-1,))
            x = xp.reshape(xp.take(p["embedding"], indices, axis=0), (*encoded.shape, self._W))
        else:
            there = encoded[..., -1] > 0
            x = product(encoded[..., :-1], p["embedding"])
        x = x + p["position"]
        there = there[..., None, None, :]  # for all heads and all that ask
        for n in range(self._layers):
            x = self._block(p, f"blocks.{n}", x, there, newest=n == self._layers - 1)
        x = self._norm(p, "norm", x)
        return (product(x, p["head.weight"]) + p["head.bias"])[..., 0, :]

    def _block(self, p: dict[str, Array], b: str, x: Array, there: Array, *, newest: bool) -> Array:
        """Attention and a fully connected layer; the last block is asked for the newest position alone."""
        normed = self._norm(p, f"{b}.norm0", x)
        if newest:
            x, asking = x[..., -1:, :], normed[..., -1:, :]
        else:
            asking = normed
        x = x + self._attention(p, b, asking, normed, there)
        wide = product(self._norm(p, f"{b}.norm1", x), p[f"{b}.expand.weight"]) + p[f"{b}.expand.bias"]
        return x + product(activate(self._activation, wide), p[f"{b}.contract.weight"]) + p[f"{b}.contract.bias"]

    def _attention(self, p: dict[str, Array], b: str, asking: Array, asked: Array, there: Array) -> Array:
        xp = namespace(asked)
        query = self._split(product(asking, p[f"{b}.query.weight"]))
        key, value = (self._split(product(asked, p[f"{b}.{name}.weight"])) for name in ("key", "value"))
        scores = query @ xp.matrix_transpose(key) / math.sqrt(self._W // self._heads)
        scores = xp.where(there, scores, xp.full_like(scores, NOWHERE))
        weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        weights = weights / xp.sum(weights, axis=-1, keepdims=True)
        merged = xp.swapaxes(weights @ value, -3, -2)  # [N, asking, heads, W / heads]
        merged = xp.reshape(merged, (*merged.shape[:-2], self._W))
        return product(merged, p[f"{b}.merge.weight"]) + p[f"{b}.merge.bias"]

    def _split(self, x: Array) -> Array:
        """[N, places, W] as [N, heads, places, W / heads]."""
        xp = namespace(x)
        return xp.swapaxes(xp.reshape(x, (*x.shape[:-1], self._heads, self._W // self._heads)), -2, -3)

    def _norm(self, p: dict[str, Array], name: str, x: Array) -> Array:
        """Every place at mean 0 and deviation 1, then scaled and shifted (Ba et al. 2016)."""
        xp = namespace(x)
        x = x - xp.mean(x, axis=-1, keepdims=True)
        deviation = xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
        return x / deviation * p[f"{name}.scale"] + p[f"{name}.shift"]
