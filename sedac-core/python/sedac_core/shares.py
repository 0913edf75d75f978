"""How the programs of a kernel that all run at once share out neurons."""

import triton
import triton.language as tl


@triton.jit
def tiles_of(program, programs, needed, BLOCK_N: tl.constexpr):
    """The tiles of at most BLOCK_N neurons that a program runs, and the neurons of each."""
    pairs = tl.cdiv(tl.cdiv(needed, 2), programs)  # that the first program is dealt
    tiles = tl.where(program * 2 < needed, tl.cdiv(pairs * 2, BLOCK_N), 0)
    return tiles, tl.cdiv(pairs, tl.maximum(tiles, 1)) * 2


@triton.jit
def dealt(n, program, programs):
    """The place of a program's n-th neuron: a pair to each program in turn, so that no program has more than a pair more
    than another, however many run."""
    return (n // 2 * programs + program) * 2 + n % 2
