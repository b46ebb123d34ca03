"""What the attention kernels take on a chip that need not be here: `python tools/compile_kernels.py [CHIP ...]`.

Compiles every tile of every kernel for the given compute capabilities (default: 80 90 100) and prints registers a
thread, stack in bytes a thread (spilled registers), shared memory in bytes a program, and the matrix, load and
reduction instructions of the machine code. Exit status 1 where a variant has more shared memory than the chip.
"""

from __future__ import annotations

import argparse
import sys

from bd3_scale.attention.kernels.offline import SHARED_MEMORY, compile_all, variants

ROW = "{:8}{:58}{:>6}{:>7}{:>10}{:>6}{:>8}  {}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", type=int, default=[80, 90, 100], metavar="CHIP", help="90 for sm_90")
    chips = parser.parse_args().chips
    unknown = [chip for chip in chips if chip not in SHARED_MEMORY]
    if unknown:
        parser.error(f"unknown chip {unknown[0]}: choose among {', '.join(map(str, SHARED_MEMORY))}")
    print(
        ROW.format(
            "chip", "kernel, head size, dtype, rows × keys, loads", "warps", "stages", "registers", "stack", "shared",
            "instructions",
        )
    )  # fmt: skip
    fits = True
    work = [(chip, variant) for chip in chips for variant in variants(chip)]
    for (chip, variant), usage in zip(work, compile_all(work), strict=True):
        instructions = ", ".join(f"{n} {name}" for name, n in usage.instructions.items())
        tile = variant.tile
        print(
            ROW.format(
                f"sm_{chip}", str(variant), tile.num_warps, tile.num_stages, usage.registers, usage.stack, usage.shared,
                instructions,
            ),
            flush=True,
        )  # fmt: skip
        fits &= usage.shared <= SHARED_MEMORY[chip]
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
