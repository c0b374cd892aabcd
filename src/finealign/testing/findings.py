"""What a check finds: a sentence for each fault, all of them raised together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from finealign.errors import FinealignError, sentence


class CheckError(FinealignError):
    """What was checked does not keep to what is asked of it; one line for each fault."""


class Findings:
    """The faults found so far."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def expect(self, holds: bool, fault: str) -> None:
        """Note a fault, as a sentence, unless what is expected holds."""
        if not holds:
            self.faults.append(fault)

    @contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Within the context, an error is a fault; ``work`` says what was tried, as "to score images"."""
        try:
            yield
        except Exception as error:  # of whatever kind: it is a stranger's code that is checked
            self.faults.append(f"It fails {work}: {type(error).__name__}: {sentence(error)}")

    def close(self, what: str) -> None:
        """Raise CheckError if there is a fault; ``what`` was checked."""
        if self.faults:
            listed = "\n".join(f"- {fault}" for fault in dict.fromkeys(self.faults))
            raise CheckError(f"{what} does not do what is asked of it:\n{listed}")


def near(one: Tensor, other: Tensor, *, relative: float = 1e-4, absolute: float = 1e-5) -> bool:
    """Whether two tensors are of one shape and equal up to rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=absolute)
