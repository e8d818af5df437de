"""Train the embedded model: one run of at most ten minutes, from scratch or from saved weights.

    python -m tools.train.run --out DIR --seconds 540 [--from DIR] [--see-seconds 150] [--lr 1e-3] [--seed 0]
    torchrun --nproc-per-node 2 -m tools.train.run ...     # on two GPUs, twice the batch
    python -m tools.train.run --out DIR --steps 3 --small        # a rehearsal on a CPU

From scratch, the vision tower first learns to see single frames; then everything is learned together. The learning
rate falls by a cosine over the time that is given; the optimiser starts anew with a warm-up. DIR gets bf16 weights
in shards, the joint head, the heads that only training uses, and log.json with every figure that was printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from tools.train.batches import Batches, Sizes
from tools.train.frames import Frames
from tools.train.learn import Learner
from tools.train.marks import Marks, Read, Stage
from tools.train.network import Network
from tools.train.step import Stepper
from tools.train.weights import load, save

SMALL = Sizes(rows=2, near=3, far=2, told=2, clips=4)
SEE_FRAMES = 2048  # single frames a step and GPU
SAY_EVERY = 100
_AGREE_EVERY = 10  # steps: processes that learn together go by the clock of the first
Batch = dict[str, Tensor]


@dataclass
class Log:
    """What is printed and kept, by the first process."""

    speaks: bool
    lines: list[dict[str, Any]] = field(default_factory=list)
    began_s: float = field(default_factory=time.perf_counter)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.speaks:
            print(_brief(line), flush=True)


def main() -> int:
    given = _arguments()
    device, rank = _join()
    sizes = SMALL if given.small else Sizes()
    torch.backends.cuda.matmul.allow_tf32 = True
    network = Network(given.seed)
    if given.start is not None:
        load(network, given.start)
    network.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    network.inv_freq = network.inv_freq.to(device)
    learner = Learner(network, sizes, device)
    torch.manual_seed(1000 * given.seed + rank)
    if given.compile and device.type == "cuda":
        compile_parts(network, learner)
    log = Log(rank == 0)
    log.add({"arguments": {k: str(v) for k, v in vars(given).items()}, "torch": torch.__version__})
    if given.see_seconds or given.see_steps:
        see(network, learner, given, log)
    if given.seconds or given.steps:
        learn(network, learner, sizes, given, log, rank)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        save(network, given.out)
        if given.seconds or given.steps:
            log.add(check(learner, sizes, given))
        (given.out / "log.json").write_text(json.dumps(log.lines, indent=1), encoding="utf-8")
    return 0


def see(network: Network, learner: Learner, given: argparse.Namespace, log: Log) -> None:
    """Single frames of the training world, drawn on the GPU."""
    frames, count = Frames("train", learner.device), 8 if given.small else SEE_FRAMES

    def batches() -> Iterator[Batch]:
        while True:
            rows = frames.draw(count)
            yield {"frames": rows, "pictures": learner.pictures(rows, train=True, together=1)}

    stepper = Stepper(network, learner.seeing, learner.device)
    _steps(stepper, batches(), lambda share: Stage(), given.see_seconds, given.see_steps, given.see_lr, log)


def learn(
    network: Network, learner: Learner, sizes: Sizes, given: argparse.Namespace, log: Log, rank: int
) -> None:
    """Whole recordings: facts, captions, searches and answers together."""
    seed = f"{given.seed + 1000 * (given.start is not None)}/{rank}"
    loader = _loader(given, sizes, "train", seed)

    def batches() -> Iterator[Batch]:
        for batch in loader:
            own = {name: array.to(learner.device, non_blocking=True) for name, array in batch.items()}
            own["pictures"] = learner.pictures(own["frames"], train=True)
            yield own

    def stage(share: float) -> Stage:
        return replace(stage_at(share, given.start is not None), frozen=given.freeze)

    stepper = Stepper(network, learner.loss, learner.device)
    _steps(stepper, batches(), stage, given.seconds, given.steps, given.lr, log)


def stage_at(share: float, later: bool) -> Stage:
    """Few distractors first, and nothing disturbed. A run that goes on from weights begins in full."""
    if later or share >= 0.45:
        return Stage()
    small = Read(8, 16, 6)
    if share < 0.2:
        return Stage(near=small, far=Read(32, 56, 14), told=small, own=0.2, disturbed=0.0)
    return Stage(own=0.5, disturbed=0.1)


def _steps(
    stepper: Stepper,
    batches: Iterator[Batch],
    stage_of: Callable[[float], Stage],
    seconds: float,
    steps: int,
    rate: float,
    log: Log,
) -> None:
    began_s = time.perf_counter()
    step, share, stage = 0, 0.0, None
    warmup = 200
    while share < 1:
        batch = next(batches)
        if steps:
            share = step / steps
        elif step % _AGREE_EVERY == 0:
            share = _agreed((time.perf_counter() - began_s) / seconds, stepper.device)
        wanted = stage_of(share)
        if wanted != stage:
            stage = wanted
            stepper.begin(batch, stage)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1, share))
        stepper.step(batch, rate * min(1, (step + 1) / warmup) * (0.02 + 0.98 * cosine))
        step += 1
        if step % SAY_EVERY == 0 or step in (1, 10, 30) or share >= 1:
            line = {"step": step, "s": round(time.perf_counter() - log.began_s, 1)}
            line |= {"norm": round(float(stepper.norm), 2)}
            line |= {name: round(value, 4) for name, value in stepper.marks.shares().items()}
            log.add(line)
            if line["skipped"] > 0.5:
                raise SystemExit("the loss is no number: lower the learning rate")
            stepper.marks.clear()


@torch.no_grad()
def check(learner: Learner, sizes: Sizes, given: argparse.Namespace) -> dict[str, Any]:
    """Shares that are right on recordings of the development split, nothing disturbed."""
    marks, stage = Marks(), Stage(disturbed=0.0)
    batches = iter(_loader(given, sizes, "dev", str(given.seed)))
    torch.manual_seed(0)
    for _ in range(2 if given.small else 24):
        batch = {name: array.to(learner.device) for name, array in next(batches).items()}
        batch["pictures"] = learner.pictures(batch["frames"], train=False)
        learner.loss(batch, stage, marks, train=False)
    return {"dev": True, **{name: round(value, 4) for name, value in marks.shares().items()}}


def compile_parts(network: Network, learner: Learner) -> None:
    """Fuse what is many small kernels: the pictures, and the halves of a layer."""
    torch._dynamo.config.cache_size_limit = 64
    learner.paint = torch.compile(learner.paint, dynamic=False)
    for layer in network.layers:
        layer.mlp.compile(dynamic=True)
        layer.input_layernorm.compile(dynamic=True)
        layer.post_attention_layernorm.compile(dynamic=True)
    for layer in network.tower_layers():
        layer.mlp.compile(dynamic=True)
        layer.layer_norm1.compile(dynamic=True)
        layer.layer_norm2.compile(dynamic=True)
    network.turn = torch.compile(network.turn, dynamic=True)  # type: ignore[method-assign]


def _join() -> tuple[torch.device, int]:
    """The device of this process and its number among those that learn together."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), 0
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(rank)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    return torch.device("cuda", rank), rank


def _agreed(share: float, device: torch.device) -> float:
    """How much of the time has passed, by the clock of the first process."""
    if not dist.is_initialized():
        return share
    told = torch.tensor(share, device=device)
    dist.broadcast(told, 0)
    return float(told)


def _loader(given: argparse.Namespace, sizes: Sizes, split: str, seed: str) -> DataLoader[Batch]:
    workers = given.workers
    return DataLoader(
        Batches(seed, split, sizes),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,  # they only plan and tokenise, on the CPU
    )


def _brief(line: dict[str, Any]) -> str:
    """A line of figures, those of one kind as their lowest and highest."""
    shown = dict(line)
    for kind in ("found", "seen_", "kept_"):
        own = [shown.pop(name) for name in line if name.startswith(kind) and name != "found_joint"]
        if own:
            shown[kind.rstrip("_")] = f"{min(own):.2f}-{max(own):.2f}"
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.0, help="of learning everything together")
    parser.add_argument("--steps", type=int, default=0, help="instead of seconds")
    parser.add_argument("--see-seconds", type=float, default=0.0, help="of learning to see, before")
    parser.add_argument("--see-steps", type=int, default=0)
    parser.add_argument("--see-lr", type=float, default=1e-3)
    parser.add_argument("--freeze", action="store_true", help="leave the vision tower as it is")
    parser.add_argument("--from", dest="start", type=Path)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
