"""One step of learning, on one GPU or several: bf16 beside fp32 masters, recorded kernels, gradients averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tools.train.marks import Marks, Stage

Batch = dict[str, Tensor]
Loss = Callable[[Batch, Stage, Marks], Tensor]


class Stepper:
    """Steps down a loss. Only parameters that get a gradient in the first stage are taken along.

    On a GPU the forward and backward of a step are one recorded graph of kernels, and the optimiser is another:
    launching them one by one takes three times as long as running them. Between the two, gradients are averaged
    over the processes that learn together.
    """

    def __init__(self, network: nn.Module, loss: Loss, device: torch.device) -> None:
        self.device, self.marks = device, Marks()
        self.rate = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self._network, self._loss = network, loss
        self._batch: Batch = {}
        self._stage = Stage()
        self._own: list[nn.Parameter] = []
        self._masters: list[Tensor] = []
        self._flat = torch.empty(0)
        self._optimiser: torch.optim.Optimizer | None = None
        self._first: torch.cuda.CUDAGraph | None = None
        self._second: torch.cuda.CUDAGraph | None = None

    def begin(self, batch: Batch, stage: Stage) -> None:
        """Take the stage for the steps that follow; on a GPU, record its graph."""
        self._stage, self._first = stage, None
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        if self._optimiser is None:
            self._prepare()
        if self.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._gradients()
        torch.cuda.current_stream().wait_stream(side)
        self._clear()
        first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(first, capture_error_mode="thread_local"):
            self._gradients()
        self._first = first
        if self._second is None:
            self._flat.zero_()
            self.rate.zero_()
            with torch.cuda.stream(side):
                self._descend()  # the optimiser makes its state
            torch.cuda.current_stream().wait_stream(side)
            second = torch.cuda.CUDAGraph()
            with torch.cuda.graph(second, capture_error_mode="thread_local"):
                self._descend()
            self._second = second

    def step(self, batch: Batch, rate: float) -> None:
        self.rate.fill_(rate)
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor)
        if self._first is not None:
            self._first.replay()
        else:
            self._gradients()
        if dist.is_initialized():
            dist.all_reduce(self._flat, op=dist.ReduceOp.AVG)
        if self._second is not None:
            self._second.replay()
        else:
            self._descend()

    def _prepare(self) -> None:
        """Find out which parameters learn, and make the optimiser over their masters."""
        self._clear()
        self._loss(self._batch, self._stage, Marks()).backward()
        self._own = [p for p in self._network.parameters() if p.grad is not None]
        self._masters = [p.detach().float().clone() for p in self._own]
        self._flat = torch.zeros(sum(p.numel() for p in self._own), device=self.device)
        parts = self._flat.split([p.numel() for p in self._own])
        for master, part in zip(self._masters, parts, strict=True):
            master.grad = part.view_as(master)
        thick = [m for m in self._masters if m.ndim > 1]
        thin = [m for m in self._masters if m.ndim <= 1]
        groups = [{"params": thick, "weight_decay": 0.05}, {"params": thin, "weight_decay": 0.0}]
        gpu = self.device.type == "cuda"
        self._optimiser = torch.optim.AdamW(
            groups, lr=self.rate, betas=(0.9, 0.98), fused=gpu, capturable=gpu
        )

    def _clear(self) -> None:
        for parameter in self._network.parameters():
            parameter.grad = None

    def _gradients(self) -> None:
        self._clear()
        self._loss(self._batch, self._stage, self.marks).backward()
        for master, parameter in zip(self._masters, self._own, strict=True):
            assert master.grad is not None
            if parameter.grad is None:  # it has no part in this stage
                master.grad.zero_()
            else:
                master.grad.copy_(parameter.grad)

    def _descend(self) -> None:
        assert self._optimiser is not None
        norm = torch.linalg.vector_norm(self._flat)
        whole = norm.isfinite()
        self.marks.note("skipped", (~whole).float())
        self._flat.nan_to_num_(0.0, 0.0, 0.0)  # a step that went wrong teaches nothing, and harms nothing
        self._flat.mul_(torch.where(whole, (1.0 / (norm + 1e-6)).clamp(max=1.0), 0.0))
        self._optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self._own, self._masters)
        self.norm.copy_(norm)
