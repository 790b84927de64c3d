#!/usr/bin/env python3
"""A cache from Python, with ctypes and nothing else: python3 examples/c/attend.py [LIBKVPLANE]

Appends 1000 tokens, attends with the last of them, forks, drafts and takes the drafts back.
"""
import array
import ctypes
import ctypes.util
import random
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p


class Rows(Structure):
    """kvplane_rows; strides 0: [token][head][channel] without gaps."""
    _fields_ = [("data", c_void_p), ("type", c_int), ("heads", c_int64), ("tokens", c_int64), ("head_dim", c_int64),
                ("head_stride", c_int64), ("token_stride", c_int64), ("channel_stride", c_int64)]


class Configuration(Structure):
    _fields_ = [("kv_heads", c_int64), ("query_heads", c_int64), ("key_head_dim", c_int64), ("value_head_dim", c_int64),
                ("recipe", c_char_p), ("rotation_seed", c_uint64), ("rope_base", c_double), ("rope_dims", c_int64),
                ("rope_halves", c_int), ("rope_frequencies", c_void_p), ("rope_pairs", c_int64),
                ("values_in_keys", c_int)]


class Output(Structure):
    _fields_ = [("data", c_void_p), ("type", c_int), ("token_stride", c_int64)]


path = sys.argv[1] if len(sys.argv) > 1 else ctypes.util.find_library("kvplane")
if not path:
    sys.exit("attend.py: no libkvplane found; give its path")
kvplane = ctypes.CDLL(path)
kvplane.kvplane_last_error.restype = c_char_p
kvplane.kvplane_version.restype = c_char_p
for name in ["kvplane_cache_tokens", "kvplane_cache_bytes", "kvplane_pool_bytes"]:
    getattr(kvplane, name).restype = c_int64
    getattr(kvplane, name).argtypes = [c_void_p]
kvplane.kvplane_cache_bits_per_element.restype = c_double
kvplane.kvplane_cache_bits_per_element.argtypes = [c_void_p]
kvplane.kvplane_cache_append.argtypes = [c_void_p, POINTER(Rows), POINTER(Rows), POINTER(Rows)]
kvplane.kvplane_cache_append_provisional.argtypes = kvplane.kvplane_cache_append.argtypes
kvplane.kvplane_cache_attend.argtypes = [c_void_p, POINTER(Rows), POINTER(Output), c_void_p, c_void_p, c_void_p,
                                         c_void_p]
kvplane.kvplane_cache_truncate.argtypes = [c_void_p, c_int64]
kvplane.kvplane_cache_create.argtypes = [POINTER(Configuration), c_void_p, POINTER(c_void_p)]
kvplane.kvplane_cache_fork.argtypes = [c_void_p, POINTER(c_void_p)]
kvplane.kvplane_workspace_create.argtypes = [c_void_p, POINTER(c_void_p)]
for name in ["cache", "workspace", "pool"]:
    getattr(kvplane, f"kvplane_{name}_destroy").argtypes = [c_void_p]
    getattr(kvplane, f"kvplane_{name}_destroy").restype = None


def check(status):
    if status != 0:
        raise RuntimeError(kvplane.kvplane_last_error().decode())


def made(create, *arguments):
    handle = c_void_p()
    check(create(*arguments, byref(handle)))
    return handle


KV_HEADS, QUERY_HEADS, DIM, TOKENS = 2, 4, 64, 1000
numbers = random.Random(1)


def rows(heads, tokens):
    """Random numbers, and a view of them that the library takes. The array must outlive the view."""
    data = array.array("f", (numbers.gauss(0, 1) for _ in range(tokens * heads * DIM)))
    return data, Rows(data.buffer_info()[0], 0, heads, tokens, DIM, 0, 0, 0)


pool = made(kvplane.kvplane_pool_create)
workspace = made(kvplane.kvplane_workspace_create, None)
layer = Configuration(KV_HEADS, QUERY_HEADS, DIM, DIM, b"key_favored:5:3", 0, 0.0, 0, 0)
cache = made(kvplane.kvplane_cache_create, byref(layer), pool)

keys, k = rows(KV_HEADS, TOKENS)
values, v = rows(KV_HEADS, TOKENS)
check(kvplane.kvplane_cache_append(cache, byref(k), byref(v), None))
queries, q = rows(QUERY_HEADS, 1)


def attend(of):
    out = (c_float * (QUERY_HEADS * DIM))()
    check(kvplane.kvplane_cache_attend(of, byref(q), byref(Output(ctypes.addressof(out), 0, 0)), None, workspace, None,
                                       None))
    return list(out)


first = attend(cache)
fork = made(kvplane.kvplane_cache_fork, cache)
shared = kvplane.kvplane_pool_bytes(pool) == kvplane.kvplane_cache_bytes(cache)
more_keys, mk = rows(KV_HEADS, 5)
check(kvplane.kvplane_cache_append_provisional(fork, byref(mk), byref(mk), None))
drafted = attend(fork)
check(kvplane.kvplane_cache_truncate(fork, TOKENS))
ok = shared and drafted != first and attend(fork) == first

layer.recipe = b"kivi:99"
try:
    made(kvplane.kvplane_cache_create, byref(layer), pool)
    ok = False
except RuntimeError as error:
    sentence = str(error)

print(f"kvplane {kvplane.kvplane_version().decode()}: {kvplane.kvplane_cache_tokens(cache)} tokens, "
      f"{kvplane.kvplane_cache_bytes(cache)} bytes, {kvplane.kvplane_cache_bits_per_element(cache):.2f} bits an element")
print(f"a fork shares all pages: {shared}; drafts taken back leave no trace: {attend(fork) == first}")
print(f"bad input: {sentence}")
for handle in (cache, fork):
    kvplane.kvplane_cache_destroy(handle)
kvplane.kvplane_workspace_destroy(workspace)
kvplane.kvplane_pool_destroy(pool)
sys.exit(0 if ok else 1)
