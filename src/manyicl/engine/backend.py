"""What an engine asks of whatever runs a network: token ids in, numbers out. Knows no task and imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Identity:
    """Which network made something, as far as its numbers depend on it.

    Attributes:
        fingerprint: Hash of all weights, those of an adapter included.
        config_hash: Hash of the configuration, which says how the weights are used.
        dtype: Precision of the computation, such as ``bfloat16``.
        base_fingerprint: Hash of the weights below an adapter; None for a model that is no adapter.
        reference: How the user named the model; takes no part in comparisons.
    """

    fingerprint: str
    config_hash: str
    dtype: str
    base_fingerprint: str | None = None
    reference: str = field(default="", compare=False)

    def difference(self, other: Identity) -> str | None:
        """Say in a few words how another network differs from this one; None where both are the same.

        >>> small = Identity("ab12", "c", "float32", reference="runs/small")
        >>> small.difference(Identity("ab12", "c", "bfloat16"))
        'another precision (bfloat16 against float32)'
        >>> small.difference(Identity("ab12", "c", "float32", reference="/tmp/copy of small"))
        """
        if self.dtype != other.dtype:
            return f"another precision ({other.dtype} against {self.dtype})"
        if self.fingerprint != other.fingerprint:
            if self.base_fingerprint and self.base_fingerprint == other.base_fingerprint:
                return "another adapter of the same base"
            return "another model"
        return None if self == other else "another configuration of the same weights"
