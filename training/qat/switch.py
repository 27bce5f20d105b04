"""Whether a model rounds at present: one object that all rounders of a model look at."""

from collections.abc import Iterator
from contextlib import contextmanager


class Switch:
    """`is_on`: weights and activations are rounded. `is_adapted`: low-rank adapters are added to their weights."""

    def __init__(self) -> None:
        self.is_on = True
        self.is_adapted = True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model as it came, for as long as the block lasts: a teacher that takes no memory of its own."""
        before = (self.is_on, self.is_adapted)
        self.is_on = self.is_adapted = False
        try:
            yield
        finally:
            self.is_on, self.is_adapted = before
