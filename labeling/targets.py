"""Token targets: class distributions for every token of a batch, as short lists of classes.

Everything a list does not name shares the rest evenly, so a distribution over a million classes
costs a few numbers and blending is concatenation. Knows neither maps nor crops.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import InvalidTargetsError

__all__ = ["TokenTargets", "merge_repeated"]

_ABSENT = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class TokenTargets:
    """Class distributions q of B x N tokens, tokens in row-major order of their grid.

        q[b, n, c] = base[b, n] + sum of excess[b, n, m] over the m with class_ids[b, n, m] == c

    A class may be listed more than once. Padding entries have excess 0 (and class id 0).

    Attributes:
        class_ids: int32 [B, N, M].
        excess: float32 [B, N, M], what the listed classes have above `base`.
        base: float32 [B, N], the probability of a class that is not listed.
        weight: float32 [B, N], the share of the token (0 to 1) that the label map knows; where
            it is 0 the distribution is uniform.
        class_target: the target of the class token, a TokenTargets with N = 1, or None.
        num_classes: C, where it is known; logits of another number of classes are then refused.

    Raises:
        InvalidTargetsError: shapes or dtypes are not these.
    """

    class_ids: Tensor
    excess: Tensor
    base: Tensor
    weight: Tensor
    class_target: "TokenTargets | None" = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.class_ids, self.excess, self.base, self.weight)]
        listed, tokens = shapes[0], shapes[0][:2]
        if len(listed) != 3 or shapes != [listed, listed, tokens, tokens]:
            raise InvalidTargetsError(
                "token targets need class_ids and excess [B, N, M], base and weight [B, N], "
                f"got {', '.join(map(str, shapes))}"
            )
        dtypes = [t.dtype for t in (self.class_ids, self.excess, self.base, self.weight)]
        if dtypes != [torch.int32, torch.float32, torch.float32, torch.float32]:
            raise InvalidTargetsError(
                "token targets need int32 class_ids and float32 excess, base and weight, "
                f"got {', '.join(map(str, dtypes))}"
            )
        if self.class_target is not None and self.class_target.base.shape != (len(self), 1):
            raise InvalidTargetsError(
                f"class_target must hold one token for each of {len(self)} images, "
                f"got base {tuple(self.class_target.base.shape)}"
            )

    def __len__(self) -> int:
        """B."""
        return len(self.class_ids)

    def dense(self, num_classes: int) -> Tensor:
        """Every distribution in full: float32 [B, N, C], for tests and losses that need it.

        Raises:
            InvalidTargetsError: a listed class id is not below `num_classes`.
        """
        self.check_num_classes(num_classes)
        dense = self.base.unsqueeze(-1).repeat(1, 1, num_classes)
        return dense.scatter_add_(-1, self.class_ids.long(), self.excess)

    def check_num_classes(self, num_classes: int) -> None:
        """See that the targets are for so many classes.

        Raises:
            InvalidTargetsError: they are for another number, or, where that is not known, list a
                class beyond it (looked for on the CPU only: a GPU would have to be waited for).
        """
        if self.num_classes is not None:
            if self.num_classes != num_classes:
                raise InvalidTargetsError(
                    f"the targets are for {self.num_classes} classes, expected {num_classes}: the "
                    "student needs as many classes as the label store has"
                )
            return
        ids = self.class_ids
        if not ids.is_cuda and ids.numel() and not 0 <= ids.min() <= ids.max() < num_classes:
            raise InvalidTargetsError(
                f"targets list class ids {int(ids.min())} to {int(ids.max())}, expected 0 to "
                f"{num_classes - 1}: the student needs as many classes as the label store has"
            )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenTargets":
        """The same targets on another device."""
        return _each(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TokenTargets":
        """The same targets in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return _each(self, Tensor.pin_memory)


def merge_repeated(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the values of equal ids in every list and drop what is zero.

    Args:
        ids: int32 [..., L], not negative.
        values: float32 [..., L].

    Returns:
        ids [..., M] in ascending order, each once, and their summed values [..., M]; M is what
        the longest list needs (at least 1), shorter ones are padded with id 0 and value 0.
    """
    ids, order = ids.masked_fill(values == 0, _ABSENT).sort(dim=-1, stable=True)
    values = values.gather(-1, order)
    absent = ids == _ABSENT
    is_new = pad(ids[..., 1:] != ids[..., :-1], (1, 0), value=True) & ~absent
    slots = is_new.cumsum(-1) - 1
    length = max(1, int(slots.max()) + 1)
    # What is absent goes into one more column, which is cut off.
    slots = slots.masked_fill(absent, length)
    shape = (*ids.shape[:-1], length + 1)
    merged_ids = ids.new_zeros(shape).scatter_(-1, slots, ids)
    merged_values = values.new_zeros(shape).scatter_add_(-1, slots, values)
    return merged_ids[..., :length], merged_values[..., :length]


def _each(targets: TokenTargets, move: Callable[[Tensor], Tensor]) -> TokenTargets:
    return TokenTargets(
        move(targets.class_ids),
        move(targets.excess),
        move(targets.base),
        move(targets.weight),
        None if targets.class_target is None else _each(targets.class_target, move),
        targets.num_classes,
    )
