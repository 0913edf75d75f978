"""How the programs of a kernel that all run at once share out neurons, and wait for each other."""

import triton
import triton.language as tl


@triton.jit
def tiles_of(program, programs, needed, BLOCK_N: tl.constexpr):
    """The tiles of at most BLOCK_N neurons that a program runs, and the neurons of each."""
    tl.static_assert(BLOCK_N % 2 == 0)  # a tile of less than a pair would leave neurons out
    pairs = tl.cdiv(tl.cdiv(needed, 2), programs)  # that the first program is dealt
    tiles = tl.where(program * 2 < needed, tl.cdiv(pairs * 2, BLOCK_N), 0)
    return tiles, tl.cdiv(pairs, tl.maximum(tiles, 1)) * 2


@triton.jit
def dealt(n, program, programs):
    """The place of a program's n-th neuron: a pair to each program in turn, so that no program has more than a pair more
    than another, however many run."""
    return (n // 2 * programs + program) * 2 + n % 2


@triton.jit
def watch(count):
    """What another program has written; what it wrote before is there as well then. Not for Triton's interpreter, in which no
    program waits for another."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [count.to(tl.uint64, bitcast=True)], tl.int32, False, 1
    )


@triton.jit
def arrive(arrived, program, programs):
    """Half of a barrier for all programs of a launch that run at once. Each adds one to the count, and the first one what is
    missing to 2³¹: when all have come, its sign has changed and the rest is zero, ready for the next barrier."""
    tl.debug_barrier()
    before = 0
    if programs > 1:
        before = tl.atomic_add(arrived, tl.where(program == 0, 2147483647 - (programs - 2), 1), sem="release")
    return before


@triton.jit
def wait_for_all(arrived, before, programs):
    """The other half: return once all have come."""
    if programs > 1:
        while (watch(arrived) ^ before) >= 0:
            pass
    tl.debug_barrier()
