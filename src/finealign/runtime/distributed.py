"""The ranks, the processes of one run. torchrun or ``accelerate launch`` starts them, and accelerate connects them.

Only the encoding of images is distributed. The features are gathered on every rank, and each rank computes the same
labels, weights, losses, running means and anchors from them. So methods need no code for ranks, and a run is the same
with one process as with several. Per step, the ranks exchange only the features of a batch and the gradients of the
encoder's few learned parameters.
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

# The timeout is long because a rank may be slow, for example while it decodes a million images. A rank that has died is
# noticed by the launcher, which then ends the others.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """One process of a run: rank ``index`` of ``count``. It is the only one unless made by ``launched``."""

    index: int = 0
    count: int = 1

    @classmethod
    def launched(cls, device: str = "auto") -> Self:
        """The ranks that the launcher has started, or a single process where there is no launcher.

        ``device`` is the wanted device: with ``cpu`` the ranks communicate by gloo even where there are GPUs. Raises
        ConfigError where accelerate cannot connect processes on such a device.
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
        """Whether this is rank 0, which writes files and reports for all ranks."""
        return self.index == 0

    def sizes(self, length: int) -> list[int]:
        """How many of ``length`` items each rank takes, by rank. The numbers differ by at most one."""
        return [length // self.count + (rank < length % self.count) for rank in range(self.count)]

    def share(self, items: Tensor) -> Tensor:
        """The items of this rank. A rank without any gets the first item, and ``gather`` ignores its result."""
        return torch.split(items, self.sizes(len(items)))[self.index] if len(items) > self.index else items[:1]

    def gather(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """Concatenate the rows of all ranks in the order of the ranks. Rank r contributes ``sizes[r]`` rows.

        Differentiable: each rank gets the gradient of its own rows. This requires that every rank computes the same
        loss from the result.
        """
        if self.count == 1:
            return part
        shape = (sum(sizes), *part.shape[1:])
        if 0 in shape:  # as for methods without crops: accelerate cannot gather empty tensors
            return part.new_zeros(shape)
        gathered: Tensor = _Gather.apply(part, tuple(sizes), self.index)
        return gathered

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of ``parameters`` over the ranks, in place. Each rank has those of its share of images."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count == 1 or not gradients:
            return
        from accelerate.utils import reduce

        total = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, summed in zip(gradients, total.split([part.numel() for part in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    @torch.no_grad()
    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Replace the values of ``tensors`` by those of rank 0, in place.

        Kernels whose rounding is not deterministic make the values of the ranks drift apart.
        """
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for tensor in tensors:
            value = tensor.detach().to(process_state().device)
            tensor.copy_(broadcast(value.clone() if value.data_ptr() == tensor.data_ptr() else value))

    def any(self, said: bool) -> bool:
        """Whether ``said`` is true on any rank. Every rank gets the same answer."""
        if self.count == 1:
            return said
        from accelerate.utils import gather

        return bool(gather(torch.tensor([int(said)], device=process_state().device)).any())

    def texts(self, own: str) -> list[str]:
        """The texts that the ranks pass as ``own``, in the order of the ranks. Every rank gets all of them."""
        if self.count == 1:
            return [own]
        from accelerate.utils import gather, pad_across_processes

        device = process_state().device
        data = torch.tensor(list(own.encode()), dtype=torch.uint8)
        lengths = gather(torch.tensor([len(data)], device=device)).tolist()
        gathered = gather(pad_across_processes(data.to(device))).reshape(self.count, -1).cpu().numpy()
        return [bytes(row[:length]).decode() for row, length in zip(gathered, lengths, strict=True)]

    def refuse_different(self, what: str, own: Any) -> None:
        """Raise FinealignError on every rank where the JSON form of ``own`` differs among them.

        ``what`` names the value in the message.
        """
        texts = self.texts(json.dumps(own, sort_keys=True, default=str))
        differing = next((rank for rank, text in enumerate(texts) if text != texts[0]), None)
        if differing is not None:
            raise FinealignError(
                f"The processes of this run differ in {what}: the first has {texts[0]:.200}, number {differing} has "
                f"{texts[differing]:.200}. Every machine needs the same images, texts, settings and versions."
            )

    def wait(self) -> None:
        """Wait until every rank has called this method."""
        if self.count > 1:
            process_state().wait_for_everyone()

    def leave(self) -> None:
        """Disconnect from the other ranks, after waiting for all of them. To be called at the end of the run."""
        if self.count > 1:
            self.wait()
            process_state().destroy_process_group()

    @contextmanager
    def first_of_each_machine(self) -> Iterator[None]:
        """A context that each machine's first rank runs before the others, which then find what it wrote to disk."""
        if self.count == 1:
            yield
            return
        with process_state().local_main_process_first():
            yield


def process_state(device: str = "auto") -> Any:
    """Accelerate's state of this process, a singleton: its device, its rank and the number of processes."""
    from accelerate import PartialState

    options = {"timeout": PATIENCE} if "LOCAL_RANK" in os.environ else {}
    return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), **options)


class _Gather(torch.autograd.Function):
    """Forward: the rows of all ranks. Backward: the gradient of this rank's rows; the loss is the same on all."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, sizes: tuple[int, ...], index: int) -> Tensor:
        from accelerate.utils import gather

        longest = max(sizes)
        ctx.own = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        ctx.given = len(part)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: sizes[index]] = part[: sizes[index]]
        gathered = gather(padded)
        return torch.cat([gathered[rank * longest : rank * longest + size] for rank, size in enumerate(sizes)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        part_gradient = gradient.new_zeros(ctx.given, *gradient.shape[1:])
        own_rows = gradient[ctx.own]
        part_gradient[: len(own_rows)] = own_rows
        return part_gradient, None, None
