"""Keys and values as arrays in few bits: per_channel, per_token, per_group, and keys in latents.

    q = kvplane.quantize.per_channel(keys, bits=4)
    q.bytes, q.bits_per_element, q.error_bound()
    close = q.dequantize()
"""
from ._kvplane.quantize import Latents, Quantized, latents, per_channel, per_group, per_token

__all__ = ["Latents", "Quantized", "latents", "per_channel", "per_group", "per_token"]
