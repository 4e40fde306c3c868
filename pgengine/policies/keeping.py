"""From a file or its bytes to a policy: everything is compared before anything is computed, and no code is read."""

import json
from os import PathLike
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import ValidationError

from pgengine.errors import CheckpointError, SpecError
from pgengine.policies.normaliser import COUNT, SQUARES, buffer_shapes
from pgengine.policies.policy import Policy, PolicyHeader
from pgengine.policies.probes import probes
from pgengine.spaces import BoxSpace

__all__ = ["load"]

PROBE_TOLERANCE = 1e-4  # between machines; on the same machine they agree to the bit


def load(source: str | PathLike[str] | bytes | bytearray) -> Policy:
    """The policy that `Policy.to_bytes` kept; reads no code and no pickle.

        policy = pgengine.load("policy.safetensors")

    Args:
        source: Path of a checkpoint, or its bytes.

    Raises:
        CheckpointError: if there is no such file, or what it holds is not a policy, is damaged, or gives other outputs
            on this machine than where it was made.
    """
    if isinstance(source, bytes | bytearray):
        return _read(bytes(source), "these bytes are")
    path = Path(source)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:  # a directory, no permission, a name that no file can have
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return _read(data, f"{path} is")


def _read(data: bytes, what: str) -> Policy:
    try:
        tensors = safetensors.numpy.load(data)
        header = PolicyHeader.model_validate_json(_metadata(data)["pgengine"])
        if header.format != "pgengine-policy" or header.version != 1:
            raise CheckpointError(f"expected a policy of version 1, found {header.format} {header.version}")
        parameters = {
            name.removeprefix("parameters."): array for name, array in tensors.items() if name.startswith("parameters.")
        }
        buffers = {
            name.removeprefix("buffers."): array for name, array in tensors.items() if name.startswith("buffers.")
        }
        policy = Policy(header, parameters, tensors.get("features"), buffers)
        _check_shapes(policy)
        outputs = policy.outputs(probes(policy.observation_space, policy.memory))
        expected = tensors["probe.outputs"]
        agree = expected.shape == outputs.shape and np.allclose(
            outputs, expected, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE, equal_nan=True
        )
    except _DAMAGE as error:
        raise CheckpointError(f"{what} not a policy: {_found(data, error)}") from error
    if not agree:
        raise CheckpointError("the policy gives other outputs here than where it was made; it is damaged")
    return policy


def _found(data: bytes, error: Exception) -> str:
    """What was read in the place of a policy, as far as its beginning tells."""
    try:
        kept = _metadata(data)
    except _DAMAGE:
        return _other(data) or f"it is damaged, or something else ({type(error).__name__})"
    if "pgengine" not in kept:
        return "it is a safetensors file of something else; expected what Policy.to_bytes wrote"
    if '"pgengine-state"' in kept["pgengine"]:
        return "it is the state of a training run, which train(…, resume_from=…) goes on from"
    return f"it is damaged ({type(error).__name__})"


def _other(data: bytes) -> str | None:
    if not data:
        return "it is empty"
    if data.startswith((b"PK", b"\x80")):
        return "it is a zip archive or a pickle, such as torch.save writes; expected what Policy.to_bytes wrote"
    if data.lstrip()[:1] in (b"{", b"[", b"<") and b"\0" not in data[:200]:
        return (
            f"it is text, perhaps an answer that says why there is no checkpoint: {data[:200].decode(errors='replace')}"
        )
    return None


_DAMAGE = (
    safetensors.SafetensorError,
    ValidationError,
    SpecError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    AttributeError,
)
"""What damaged or hostile bytes can make the readers raise."""


def _check_shapes(policy: Policy) -> None:
    """Compares before anything is computed: a small file can claim a large network."""
    if policy.features is not None and policy.features.dtype != np.float32:
        raise CheckpointError("the features of the checkpoint are of another type")
    shapes = {name: array.shape for name, array in policy.parameters.items()}
    if shapes != policy.shapes() or any(array.dtype != np.float32 for array in policy.parameters.values()):
        raise CheckpointError("the parameters of the checkpoint do not belong to its network")
    space, buffers = policy.observation_space, policy.buffers
    normalises = policy.spec.normalise_observations and isinstance(space, BoxSpace)
    expected = buffer_shapes(space) if normalises and isinstance(space, BoxSpace) else {}
    if {name: array.shape for name, array in buffers.items()} != expected:
        raise CheckpointError("the buffers of the checkpoint do not belong to its observations")
    if any(array.dtype != np.float64 or not np.isfinite(array).all() for array in buffers.values()):
        raise CheckpointError("the buffers of the checkpoint are not numbers")
    if expected and (buffers[COUNT] < 0 or (buffers[SQUARES] < 0).any()):
        raise CheckpointError("the buffers of the checkpoint are no counts and squares")


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: eight bytes of length, then JSON, as its format says."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return metadata
