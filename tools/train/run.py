"""Train the embedded model: one run of at most ten minutes on one GPU, from scratch or from saved weights.

    python -m tools.train.run --out DIR --seconds 540 [--from DIR] [--lr 1e-3] [--seed 0] [--workers 14]
    python -m tools.train.run --out DIR --steps 3 --small        # a rehearsal on a CPU

DIR gets bf16 weights in shards, the joint head, and log.json with every figure that was printed. The learning rate
falls by a cosine over the time that is given; the optimiser starts anew with a warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from tools.train.batches import Batches, Sizes
from tools.train.learn import Learner, Marks, Stage
from tools.train.network import Network

SMALL = Sizes(rows=2, seen=4, told=2, clips=4)
SAY_EVERY = 100


def main() -> int:
    given = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMALL if given.small else Sizes()
    torch.backends.cuda.matmul.allow_tf32 = True
    network = Network(given.seed)
    if given.start is not None:
        load(network, given.start)
    network.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    network.inv_freq = network.inv_freq.to(device)
    learner = Learner(network, sizes, device)
    if given.compile and device.type == "cuda":
        compile_parts(network, learner)
    log: list[dict[str, Any]] = [
        {"arguments": {k: str(v) for k, v in vars(given).items()}, "torch": torch.__version__}
    ]
    train(network, learner, sizes, given, device, log)
    given.out.mkdir(parents=True, exist_ok=True)
    save(network, given.out)
    log.append(check(learner, sizes, given, device))
    (given.out / "log.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
    return 0


def train(
    network: Network,
    learner: Learner,
    sizes: Sizes,
    given: argparse.Namespace,
    device: torch.device,
    log: list[Any],
) -> None:
    batches = iter(_loader(given, sizes, "train", given.seed + 1000 * (given.start is not None)))
    stepper = Stepper(network, learner, device, given.lr)
    began_s = time.perf_counter()
    step, share, stage = 0, 0.0, None
    while share < 1:
        batch = {name: array.to(device, non_blocking=True) for name, array in next(batches).items()}
        share = step / given.steps if given.steps else (time.perf_counter() - began_s) / given.seconds
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1, share))
        stepper.rate.fill_(given.lr * min(1, (step + 1) / given.warmup) * (0.02 + 0.98 * cosine))
        wanted = stage_at(share, given.see, given.start is not None)
        batch["pictures"] = learner.pictures(batch.pop("frames"), train=True)
        if wanted != stage:
            stage = wanted
            stepper.begin(batch, stage)
        stepper.step(batch)
        step += 1
        if step % SAY_EVERY == 0 or step in (1, 10, 30) or share >= 1:
            line = {
                "step": step,
                "s": round(time.perf_counter() - began_s, 1),
                "norm": round(float(stepper.norm), 2),
            }
            line |= {name: round(value, 4) for name, value in stepper.marks.shares().items()}
            log.append(line)
            print(_brief(line), flush=True)
            if line["skipped"] > 0.5:
                raise SystemExit("the loss is no number: lower the learning rate")
            stepper.marks.clear()


class Stepper:
    """One step of learning. On a GPU the model is bf16 beside fp32 masters, and a step is one recorded graph of
    kernels: launching them one by one takes three times as long as running them.
    """

    def __init__(self, network: Network, learner: Learner, device: torch.device, rate: float) -> None:
        self.learner, self.device, self.marks = learner, device, Marks()
        self.rate = torch.tensor(rate, device=device)
        self.norm = torch.zeros((), device=device)
        self._network = network
        self._masters: list[torch.Tensor] = []
        self._own: list[torch.nn.Parameter] = []
        self._optimiser: torch.optim.Optimizer | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: dict[str, torch.Tensor] = {}
        self._stage = Stage()

    def begin(self, batch: dict[str, torch.Tensor], stage: Stage) -> None:
        """Take the stage for the steps that follow; on a GPU, record its graph."""
        self._stage, self._graph = stage, None
        self._batch = {name: tensor.clone() for name, tensor in batch.items()}
        if self._optimiser is None:
            self._prepare()
        if self.device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._clear()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        for name, tensor in batch.items():
            self._batch[name].copy_(tensor)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._clear()
            self._step()

    def _prepare(self) -> None:
        """Find out which parameters learn, and make the optimiser over their masters."""
        self.learner.loss(self._batch, Stage(), Marks()).backward()
        self._own = [p for p in self._network.parameters() if p.grad is not None]
        self._masters = [p.detach().float().clone() for p in self._own]
        for master in self._masters:
            master.grad = torch.zeros_like(master)
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

    def _step(self) -> None:
        assert self._optimiser is not None
        self.learner.loss(self._batch, self._stage, self.marks).backward()
        grads = [master.grad for master in self._masters]
        for grad, parameter in zip(grads, self._own, strict=True):
            if parameter.grad is None:  # it has no part in this stage
                grad.zero_()
            else:
                grad.copy_(parameter.grad)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        whole = norm.isfinite()
        self.marks.add("skipped", (~whole).float(), torch.ones_like(norm))
        for grad in grads:  # a step that went wrong teaches nothing, and harms nothing
            grad.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(grads, torch.where(whole, (1.0 / (norm + 1e-6)).clamp(max=1.0), 0.0))
        self._optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self._own, self._masters)
        self.norm.copy_(norm)


def stage_at(share: float, see: float, later: bool) -> Stage:
    """Captions alone first, for the share `see`: they teach to see. Then few distractors, and nothing disturbed.

    A run that goes on from weights begins in full.
    """
    if later:
        return Stage()
    if share < see:
        return Stage(asked=False, disturbed=0.0)
    if share < see + 0.15:
        return Stage(limit=8, own=0.2, disturbed=0.0)
    if share < see + 0.4:
        return Stage(limit=24, own=0.5, disturbed=0.1)
    return Stage()


@torch.no_grad()
def check(learner: Learner, sizes: Sizes, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Shares that are right on recordings of the development split, nothing disturbed."""
    marks, stage = Marks(), Stage(disturbed=0.0)
    batches = iter(_loader(given, sizes, "dev", given.seed))
    torch.manual_seed(0)
    for _ in range(2 if given.small else 24):
        batch = {name: array.to(device) for name, array in next(batches).items()}
        batch["pictures"] = learner.pictures(batch.pop("frames"), train=False)
        learner.loss(batch, stage, marks, train=False)
    line = {"dev": {name: round(value, 4) for name, value in marks.shares().items()}}
    print("dev", json.dumps(line["dev"]), flush=True)
    return line


def compile_parts(network: Network, learner: Learner) -> None:
    """Fuse what is many small kernels: the pictures, and the halves of a layer."""
    torch._dynamo.config.cache_size_limit = 64
    learner.paint = torch.compile(learner.paint, dynamic=False)
    for layer in network.layers:
        layer.mlp.compile(dynamic=True)
        layer.input_layernorm.compile(dynamic=True)
        layer.post_attention_layernorm.compile(dynamic=True)
    network.turn = torch.compile(network.turn, dynamic=True)  # type: ignore[method-assign]


def save(network: Network, folder: Path) -> None:
    """bf16 weights in shards below 16 MiB, and the joint head."""
    weights = {
        name: tensor.detach().to(torch.bfloat16).cpu() for name, tensor in network.hf.state_dict().items()
    }
    network.hf.save_pretrained(folder, state_dict=weights, max_shard_size="14MB")
    joint = {
        name: tensor.detach().to(torch.bfloat16).cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if name.startswith("joint_") or name == "sharp"
    }
    save_file(joint, folder / "joint.safetensors")
    teachers = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if name.startswith("tell_")
    }
    save_file(teachers, folder / "teachers.safetensors")  # for the next run; they are not shipped


def load(network: Network, folder: Path) -> None:
    """Take over the weights that an earlier run saved in `folder`."""
    found = type(network.hf).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    network.hf.load_state_dict(found.state_dict())
    for part in ("joint", "teachers"):
        path = folder / f"{part}.safetensors"
        if path.exists():
            own = {name: tensor.float() for name, tensor in load_file(path).items()}
            network.load_state_dict(own, strict=False)


def _loader(
    given: argparse.Namespace, sizes: Sizes, split: str, seed: int
) -> DataLoader[dict[str, torch.Tensor]]:
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
    found = [value for name, value in line.items() if name.startswith("found") and name != "found_joint"]
    seen = [value for name, value in line.items() if name.startswith("seen_")]
    kept = [value for name, value in line.items() if name.startswith("kept_")]
    hidden = ("found", "seen_", "kept_")
    shown = {k: v for k, v in line.items() if not k.startswith(hidden) or k == "found_joint"}
    shown |= {"seen": f"{min(seen):.2f}-{max(seen):.2f}", "kept": f"{min(kept):.2f}-{max(kept):.2f}"}
    shown["found"] = f"{min(found):.2f}-{max(found):.2f}" if found else ""
    return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of seconds")
    parser.add_argument("--from", dest="start", type=Path)
    parser.add_argument(
        "--see", type=float, default=0.22, help="share of the time for captions alone, from scratch"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
