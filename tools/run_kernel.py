"""Run one kernel on arrays from a file, to compare it with the released code of its paper.

    python -m tools.run_kernel NAME in.npz out.npz
    python -m tools.run_kernel --list > tools/kernels.md

Names, kinds and shapes of the arrays: tools/kernels.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from memdb.schemas.errors import MemdbError, UsageError
from tools.kernel_list import BOOLS, BYTES, FLOATS, INTS, KERNELS, Array, Kernel, Spec, table

HEADER = """# Kernels

What a method decides, as plain functions from arrays to arrays, without a model and without a store:

```text
python -m tools.run_kernel NAME in.npz out.npz
```
Arrays of floats are computed in their own precision where a released code does so, and in fp32 otherwise. Indices
count from 0 and ascend. Of equal scores the earliest block, or the newest frame and in it the lowest patch, stays.
Letters: `L` layers, `Hq` query heads, `H` KV heads, `T` tokens (blocks of a layer in SelectKV), `D` head size, `F`
frames, `E` embedding size, `r` probe rows; one letter is one size within a call, and `...` any sizes in front.
`blocks` says how many of the T columns of a layer are there. `stable`: where the released code leaves equal scores or
counts to numpy's or torch's sort, which differ from machine to machine, false does the same on yours, and true takes
the lowest index first.

This page is the output of `python -m tools.run_kernel --list`.

"""
KINDS = {FLOATS: "f", INTS: "iu", BOOLS: "biu", BYTES: "u"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print tools/kernels.md")
    parser.add_argument("name", nargs="?", help="a kernel")
    parser.add_argument("source", nargs="?", type=Path, help="in.npz")
    parser.add_argument("target", nargs="?", type=Path, help="out.npz")
    args = parser.parse_args(arguments)
    if args.list:
        print(page(), end="")
        return 0
    if args.target is None:
        parser.error("give a kernel, in.npz and out.npz")
    try:
        if args.name not in KERNELS:
            raise UsageError(f"no kernel {args.name!r}: choose one of {', '.join(KERNELS)}")
        np.savez(args.target, **run(KERNELS[args.name], read(args.source)))
    except MemdbError as error:
        sys.stderr.write(f"run_kernel: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"run_kernel: cannot write {args.target}: {error}\n")
        return 1
    return 0


def page() -> str:
    return (HEADER + table()).rstrip() + "\n"


def read(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise UsageError(f"cannot read {path}: {error}; give a file of numpy.savez without objects") from None


def run(kernel: Kernel, arrays: dict[str, Array]) -> dict[str, Array]:
    """The kernel's outputs. Raises UsageError for arrays that are missing, unknown or of another kind or shape."""
    unknown = sorted(set(arrays) - set(kernel.inputs))
    if unknown:
        raise UsageError(f"unknown array {unknown[0]!r}: the arrays are {', '.join(kernel.inputs)}")
    sizes: dict[str, int] = {}
    given = {name: value(name, spec, arrays.get(name), sizes) for name, spec in kernel.inputs.items()}
    try:
        found = kernel.run(**given)
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"these arrays do not go together: {why}; see tools/kernels.md") from error
    return {
        name: out.numpy() if isinstance(out, torch.Tensor) else np.asarray(out) for name, out in found.items()
    }


def value(name: str, spec: Spec, array: Array | None, sizes: dict[str, int]) -> Any:
    """An input as its kernel takes it: a tensor, or Python's number where the shape is ()."""
    if array is None:
        if spec.default is None and not spec.optional:
            raise UsageError(f"array {name!r} is missing: {spec.kind} of shape ({spec.shape})")
        return spec.default
    if array.dtype.kind not in KINDS[spec.kind] and not (spec.kind == FLOATS and array.dtype.kind in "iu"):
        raise UsageError(f"array {name!r} is of kind {array.dtype}: give {spec.kind}")
    letters = spec.letters
    free = array.ndim - len(letters)  # sizes in front
    if free < 0 or (free and not spec.open):
        raise UsageError(f"array {name!r} has shape {array.shape}: give ({spec.shape})")
    for letter, size in zip(letters, array.shape[free:], strict=True):
        if size != (int(letter) if letter.isdigit() else sizes.setdefault(letter, size)):
            raise UsageError(
                f"array {name!r} has shape {array.shape}: {letter} is {sizes.get(letter, letter)}"
            )
    if spec.kind == BOOLS:
        array = array.astype(bool)
    elif spec.kind == INTS:
        array = array.astype(np.int64)
    elif spec.kind == FLOATS and array.dtype.kind != "f":
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array)) if spec.shape else array.item()


if __name__ == "__main__":
    sys.exit(main())
