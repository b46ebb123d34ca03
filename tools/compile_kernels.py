"""Compile the kernels for a chip that need not be here, and show their resources: `python tools/compile_kernels.py
[CHIP …]`.

Compiles every variant of every kernel, attention with every tile, for the given compute capabilities (default: 80 90
100). Prints registers per thread, stack in bytes per thread (spilled registers), shared memory in bytes per program,
and the matrix, load and reduction instructions of the machine code. Exit status 1 if a variant needs more shared memory
than the chip has.
"""

from __future__ import annotations

import argparse
import sys

from bd3_scale import offline
from bd3_scale.attention.kernels import offline as attention
from bd3_scale.fused.kernels import offline as fused

ROW = "{:8}{:70}{:>6}{:>10}{:>6}{:>8}  {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", type=int, default=[80, 90, 100], metavar="CHIP", help="90 for sm_90")
    chips = parser.parse_args().chips
    unknown = [chip for chip in chips if chip not in offline.SHARED_MEMORY]
    if unknown:
        parser.error(f"unknown chip {unknown[0]}: choose among {', '.join(map(str, offline.SHARED_MEMORY))}")
    print(ROW.format("chip", "kernel, sizes, dtype", "warps", "registers", "stack", "shared", "instructions"))
    fits = True
    of_attention = [(chip, variant) for chip in chips for variant in attention.variants(chip)]
    of_others = [(chip, variant) for chip in chips for variant in fused.variants()]
    for compile_variant, work in ((fused.compile_variant, of_others), (attention.compile_variant, of_attention)):
        for (chip, variant), usage in zip(work, offline.compile_all(compile_variant, work), strict=True):
            instructions = ", ".join(f"{n} {name}" for name, n in usage.instructions.items())
            sizes = (variant.num_warps, usage.registers, usage.stack, usage.shared)
            print(ROW.format(f"sm_{chip}", str(variant), *sizes, instructions), flush=True)
            fits &= usage.shared <= offline.SHARED_MEMORY[chip]
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
