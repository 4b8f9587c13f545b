"""How a dimension is divided among ranks."""

from __future__ import annotations

from collections.abc import Sequence


def even_splits(length: int, parts: int) -> list[int]:
    """`length` in `parts` nearly equal pieces, the longer ones first, as `torch.tensor_split` does.

    Example:
        >>> even_splits(10, 4)
        [3, 3, 2, 2]
    """
    size, longer = divmod(length, parts)
    return [size + (index < longer) for index in range(parts)]


def check_dim(op: str, dim: int, dims: int) -> int:
    """`dim` counted from the front.

    Raises:
        ValueError: a tensor of `dims` dimensions has no such dimension.
    """
    if not -dims <= dim < dims:
        raise ValueError(f"{op}: dim is {dim}, but the tensor has {dims} dimension(s)")
    return dim % dims


def check_splits(op: str, name: str, splits: Sequence[int], parts: int, length: int | None = None) -> list[int]:
    """`splits` as a list of `parts` sizes, adding up to `length` where that is given.

    Raises:
        ValueError: another number of sizes, a negative size, or another sum.
    """
    sizes = [int(size) for size in splits]
    if len(sizes) != parts or min(sizes) < 0:
        raise ValueError(f"{op}: {name} is {sizes}; a group of {parts} rank(s) needs {parts} size(s) of at least 0")
    if length is not None and sum(sizes) != length:
        raise ValueError(f"{op}: {name} {sizes} adds up to {sum(sizes)}, the tensor has {length} along that dimension")
    return sizes


def splits_or_even(op: str, name: str, splits: Sequence[int] | None, parts: int, length: int) -> list[int]:
    """`splits` checked against `length`, or `even_splits` of it where none are given."""
    return even_splits(length, parts) if splits is None else check_splits(op, name, splits, parts, length)
