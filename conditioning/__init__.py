"""Conditioning: captions, labels or nothing in, the keyword arguments of the network out."""

from conditioning.context import Conditioner, Context, Unconditional

__all__ = ["Conditioner", "Context", "Unconditional"]
