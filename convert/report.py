"""What a conversion did and what it lost, as text and as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_gemma3.checkpoint.entries import part_of
from mlx_gemma3.visible import one_line

if TYPE_CHECKING:
    from mlx_gemma3.measure.evaluate import Evaluation

KINDS = ("embedding", "head", "attention", "mlp", "norms", "dense", "vision", "projector")


def kind_of(name: str) -> str:
    """The kind of a parameter by its canonical name: one of KINDS."""
    part = part_of(name)
    return {"vision_tower": "vision", "embed_tokens": "embedding", "lm_head": "head"}.get(part, part)


@dataclass
class Loss:
    """Sums over some parameters: what they were, and what was lost of them."""

    squares: float = 0.0
    errors: float = 0.0
    largest: float = 0.0  # one number's difference

    def add(self, squares: float, errors: float, largest: float) -> None:
        self.squares += squares
        self.errors += errors
        self.largest = max(self.largest, largest)

    @property
    def relative(self) -> float:
        """Root mean square of the differences over that of the numbers."""
        return float((self.errors / self.squares) ** 0.5) if self.squares else 0.0


@dataclass
class Row:
    """One kind of parameter, or one parameter."""

    parameters: int = 0
    nbytes: int = 0
    stored: dict[str, int] = field(default_factory=dict)  # how → how many matrices
    loss: Loss = field(default_factory=Loss)


@dataclass
class Melted:
    """What became of an adapter: sums over the matrices that it changes."""

    name: str
    matrices: int
    loss: Loss = field(default_factory=Loss)
    changes: float = 0.0  # squares of what it changes

    def add(self, squares: float, errors: float, largest: float, changes: float) -> None:
        self.loss.add(squares, errors, largest)
        self.changes += changes

    @property
    def relative(self) -> float:
        """Root mean square of what it changes over that of the numbers."""
        return float((self.changes / self.loss.squares) ** 0.5) if self.loss.squares else 0.0

    @property
    def cost(self) -> float:
        """Root mean square of what is lost of these matrices over that of what the adapter changes."""
        return float((self.loss.errors / self.changes) ** 0.5) if self.changes else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "matrices": self.matrices,
            "relative_change": self.relative,
            "error_over_change": self.cost,
        }


@dataclass
class Report:
    """The result of `convert`."""

    source: str
    out: str
    parameters: int = 0
    nbytes: int = 0  # of the tensors, copies included
    head_copy_bytes: int = 0  # of them the second copy of the head's scales
    kinds: dict[str, Row] = field(default_factory=dict)
    worst: list[tuple[str, float]] = field(default_factory=list)  # relative error by parameter, largest first
    left_plain: list[str] = field(default_factory=list)  # asked to be packed, of a width that no group divides
    repacked: list[tuple[str, str, float]] = field(default_factory=list)  # GGUF types that MLX has no packing for
    notes: list[str] = field(default_factory=list)  # how the source was understood
    seconds: float = 0.0
    adapter: Melted | None = None  # that was melted in
    comparison: Evaluation | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * (self.nbytes - self.head_copy_bytes) / self.parameters

    def text(self) -> str:
        """A table for people."""
        lines = [
            f"{one_line(self.source)} → {one_line(self.out)}",
            f"{self.parameters / 1e6:,.1f} M parameters, {_size(self.nbytes)}, "
            f"{self.bits_per_weight:.2f} bits a weight, {self.seconds:.0f} s",
            "",
            f"{'kind':<10} {'M parameters':>12} {'size':>10}  {'relative error':>14}  stored as",
        ]
        for kind, row in self.kinds.items():
            stored = ", ".join(f"{how} × {count}" for how, count in row.stored.items())
            error = f"{row.loss.relative:.2e}" if row.loss.errors else "none"
            lines.append(f"{kind:<10} {row.parameters / 1e6:>12,.2f} {_size(row.nbytes):>10}  {error:>14}  {stored}")
        if self.worst:
            lines += ["", "largest relative errors:", *(f"  {error:.2e}  {name}" for name, error in self.worst)]
        if (melted := self.adapter) is not None:
            lines += [
                "",
                f"the adapter {one_line(melted.name)} is in {melted.matrices} matrices: it changes them by "
                f"{melted.relative:.2%}, and writing them moves them by {melted.cost:.2%} of that change",
            ]
        if self.left_plain:
            lines += ["", "left plain, since no group divides their width:", *(f"  {n}" for n in self.left_plain)]
        if self.repacked:
            kinds = sorted({kind for _, kind, _ in self.repacked})
            largest = max(error for _, _, error in self.repacked)
            lines += [
                "",
                f"{len(self.repacked)} matrices of {', '.join(kinds)} were packed anew in 8 bits, groups of 32: "
                f"largest relative error {largest:.1e}",
            ]
        if self.head_copy_bytes:
            lines += [
                "",
                f"{_size(self.head_copy_bytes)} of it are the embedding's scales once more, for mlx-vlm's head",
            ]
        if self.comparison is not None:
            lines += ["", self.comparison.text()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "source": self.source,
            "out": self.out,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "head_copy_bytes": self.head_copy_bytes,
            "bits_per_weight": self.bits_per_weight,
            "kinds": {
                kind: {
                    "parameters": row.parameters,
                    "bytes": row.nbytes,
                    "stored": row.stored,
                    "relative_error": row.loss.relative,
                    "largest_error": row.loss.largest,
                }
                for kind, row in self.kinds.items()
            },
            "worst": [{"name": name, "relative_error": error} for name, error in self.worst],
            "left_plain": self.left_plain,
            "repacked": [{"name": n, "kind": kind, "relative_error": error} for n, kind, error in self.repacked],
            "notes": self.notes,
            "seconds": self.seconds,
            "adapter": self.adapter.to_dict() if self.adapter is not None else None,
            "comparison": self.comparison.to_dict() if self.comparison is not None else None,
        }


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
