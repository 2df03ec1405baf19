"""Zero-skipping products on a GPU: there are none worth having, so the dense ones run.

Tensor cores multiply tiles of at least 16x8 elements, of which one without a single non-zero is rare at any density
that training shows (at 1%: 0.99**128 = 28%, at 5%: 0.1%); products element by element on the other units are some 16
times as slow per element. Not measured on a GPU.
"""

from __future__ import annotations

from hasten.kernels.reference.zero_skip import grad_input, grad_weight

__all__ = ["grad_input", "grad_weight"]
