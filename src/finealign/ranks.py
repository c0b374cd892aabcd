"""The processes that share the work of one run: torchrun or ``accelerate launch`` starts them, accelerate joins them.

Only encoding is shared out. The features come together on every rank, and what follows from them (labels, weights,
losses, running means, the anchors) is computed alike on each. So no method knows of ranks, one process and several give
the same run, and per step no more crosses than a batch's features and the gradients of the encoder's few parameters.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor

from finealign.errors import ConfigError, FinealignError

# A rank that dies takes the others with it, by its launcher; one that is only slow, as at decoding a million images, is
# waited for.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """One process among ``count``; alone unless made by ``launched``."""

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls, device: str = "auto") -> Self:
        """All the processes that the launcher started, or this one alone where there is no launcher.

        ``device`` is the one wanted: ``cpu`` joins them by gloo even where there are GPUs. Raises ConfigError where
        accelerate cannot join processes on such a device.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        state = process_state(device)
        if state.num_processes != count:
            raise ConfigError(
                f"{count} processes were launched, but on {state.device.type!r} accelerate does not join them. "
                "Launch one, or use --device cpu."
            )
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.index == 0

    def sizes(self, length: int) -> list[int]:
        """How many of so many items each rank takes: in order, sizes that differ by one at most."""
        return [length // self.count + (rank < length % self.count) for rank in range(self.count)]

    def share(self, items: Tensor) -> Tensor:
        """The items that are this rank's; where it has none, the first, whose result ``gather`` leaves out."""
        return torch.split(items, self.sizes(len(items)))[self.index] if len(items) > self.index else items[:1]

    def gather(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of every rank, of which rank r has ``sizes[r]``, in the ranks' order.

        Carries the gradient, where every rank makes the same of the result: of what a rank adds to it, that rank alone
        gets the gradient.
        """
        if self.count == 1:
            return part
        whole = (sum(sizes), *part.shape[1:])
        if 0 in whole:  # as crops that no one looks at: accelerate cannot tell the shape of nothing
            return part.new_zeros(whole)
        gathered: Tensor = _Gather.apply(part, tuple(sizes), self.index)
        return gathered

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum over the ranks, in place, the gradients of parameters of which each rank has seen its share of images."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count == 1 or not gradients:
            return
        from accelerate.utils import reduce

        total = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, summed in zip(gradients, total.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    @torch.no_grad()
    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Take the first rank's values, in place: what kernels that round at will have driven apart is one again."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            sent = tensor.detach().to(process_state().device)
            tensor.copy_(broadcast(sent.clone() if sent.data_ptr() == tensor.data_ptr() else sent))

    def any(self, said: bool) -> bool:
        """Whether any rank says so: the same answer on every rank."""
        if self.count == 1:
            return said
        from accelerate.utils import gather

        return bool(gather(torch.tensor([int(said)], device=process_state().device)).any())

    def texts(self, own: str) -> list[str]:
        """What each rank has to say, in their order."""
        if self.count == 1:
            return [own]
        from accelerate.utils import gather, pad_across_processes

        device = process_state().device
        data = torch.tensor(list(own.encode()), dtype=torch.uint8)
        lengths = gather(torch.tensor([len(data)], device=device)).tolist()
        together = gather(pad_across_processes(data.to(device))).reshape(self.count, -1).cpu().numpy()
        return [bytes(row[:length]).decode() for row, length in zip(together, lengths, strict=True)]

    def refuse_different(self, what: str, own: Any) -> None:
        """Raise FinealignError, on every rank, where what JSON makes of ``own`` differs among them."""
        found = self.texts(json.dumps(own, sort_keys=True, default=str))
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise FinealignError(
                f"The processes of this run differ in {what}: the first has {found[0]:.200}, number {other} has "
                f"{found[other]:.200}. Every machine needs the same images, texts, settings and versions."
            )

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            process_state().wait_for_everyone()

    def leave(self) -> None:
        """At the end, when no rank needs another any more."""
        if self.count > 1:
            self.wait()
            process_state().destroy_process_group()

    @contextmanager
    def first_of_each_machine(self) -> Iterator[None]:
        """The first rank of each machine goes through before the others: what it leaves on disk, they find."""
        if self.count == 1:
            yield
            return
        with process_state().local_main_process_first():
            yield


def process_state(device: str = "auto") -> Any:
    """Accelerate's one object of its kind: this process's device and its place among the others."""
    from accelerate import PartialState

    launched = {"timeout": PATIENCE} if "LOCAL_RANK" in os.environ else {}
    return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), **launched)


class _Gather(torch.autograd.Function):
    """Forward: the rows of all ranks. Backward: the gradient of this rank's rows, as the loss is the same on each."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: tuple[int, ...], index: int) -> Tensor:
        from accelerate.utils import gather

        most = max(sizes)
        ctx.own = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        ctx.given = len(part)
        padded = part.new_zeros(most, *part.shape[1:])
        padded[: sizes[index]] = part[: sizes[index]]
        together = gather(padded)
        return torch.cat([together[rank * most : rank * most + size] for rank, size in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        own = gradient.new_zeros(ctx.given, *gradient.shape[1:])
        mine = gradient[ctx.own]
        own[: len(mine)] = mine
        return own, None, None
