"""kvplane: the KV cache of transformers in bit planes, and attention on the packed bits.

    import kvplane
    cache = kvplane.Cache([kvplane.Layer(kv_heads=8, query_heads=32, head_dim=128)], "standard")
    cache.append(keys, values)              # (heads, tokens, channels), after RoPE
    output = cache.attend(queries)          # of the last tokens

`kvplane.quantize` has the quantizers for arrays, `kvplane.transformers` the cache for Hugging Face transformers (it
imports torch and transformers, and is not imported by this module). What is refused raises kvplane.Error.
"""
from ._kvplane import Cache, Error, Layer, Policy, Rope, __version__, capabilities, cuda_devices, recipes
from . import quantize

__all__ = ["Cache", "Error", "Layer", "Policy", "Rope", "__version__", "capabilities", "cuda_devices", "quantize",
           "recipes"]
