"""Arithmetic for which PyTorch has no fast path.

Each kernel is an operator ``torch.ops.hasten.NAME`` defined in a module here. Its torch reference in ``reference`` is its
meaning and the oracle of its tests; ``cpu`` (C++) and ``gpu`` (Triton) hold faster forms with the same signature, chosen
by the tensors' device. Where no faster form can run, the reference does.
"""
