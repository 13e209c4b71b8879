"""Random numbers that are a function of a key and a counter, on any device: Philox-4x32-10.

Each counter of four 32-bit words gives four random words, independent of all others, so any part of
a sequence is drawn alone, in any order (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3", section 4.3). The words are the same on all devices, because they are computed with integers
of torch. Uniform numbers are, too. Normal numbers are equal up to the rounding of the device's
logarithm, sine and cosine.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four tensors int64 of 32-bit words."""
NUM_ROUNDS = 10
FACTORS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 2**32 - 1


def philox(counter: Words, key: int) -> Words:
    """Returns the random words of counters under a key of 64 bits.

    The words of a counter may have different shapes, which are broadcast.
    """
    c0, c1, c2, c3 = counter
    keys = (key & WORD, key >> 32)
    for _ in range(NUM_ROUNDS):
        # The low halves of the products are used below; int64 wraps, which keeps all 64 bits.
        low0, low1 = c0 * FACTORS[0], c2 * FACTORS[1]
        # Only factors must be exact words, so c1 and c3 keep bits above the 32nd.
        c0 = (low1 >> 32).bitwise_xor(c1).bitwise_xor_(keys[0]).bitwise_and_(WORD)
        c2 = (low0 >> 32).bitwise_xor(c3).bitwise_xor_(keys[1]).bitwise_and_(WORD)
        c1, c3 = low1, low0
        keys = ((keys[0] + KEY_STEPS[0]) & WORD, (keys[1] + KEY_STEPS[1]) & WORD)
    return c0, c1 & WORD, c2, c3 & WORD


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """Returns float64 numbers in [0, 1), multiples of 2^-53, from two words each."""
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


def normal(words: Tensor) -> Tensor:
    """Returns float32 normal numbers (4, ...) from words (4, ...), by Box and Muller (1958).

    Their absolute values are at most 6.66.
    """
    half = words.to(torch.int32)
    # 31 bits and a half: never 0, whose logarithm is infinite.
    u = (half[:2] & 0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32)
    radius = u.log_().mul_(-2).sqrt_()
    angle = half[2:].float().mul_(2 * math.pi * 2.0**-32)  # -pi to pi, where float32 is finest
    return torch.cat([radius * angle.cos(), radius * angle.sin_()])
