"""TF32: products of fp32 matrices on the tensor cores of an NVIDIA GPU, with 10 bits of mantissa instead of 23."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """Whether torch multiplies fp32 matrices in TF32 from here on; afterwards as it was before.

    transformers' ``tf32`` argument is not used for this. It stays in force after a run, and in a process that trains
    with it, without it and with it again the third run goes without: ``enable_tf32`` of transformers 5.23 is cached.
    """
    import torch

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    # The older name of the two: it sets the newer too, while torch refuses to read the older one after the newer was
    # set (torch 2.13).
    matmul.allow_tf32 = wanted
    try:
        yield
    finally:
        matmul.allow_tf32 = before == "tf32"
