"""What the tests of the Python package share: inputs, and attention in double precision."""
import json
import pathlib
import struct

import numpy as np

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RECIPES = ["fp16", "block32:8", "kivi:4:32", "standard", "compact", "smallest", "latent:3:3", "weighted:3:3"]


def numbers(seed=20261127):
    print("seed", seed)  # pytest shows it where a test fails
    return np.random.default_rng(seed)


def sequence(random, batch, layer, tokens, dtype=np.float32):
    """Keys, values and queries [batch, heads, tokens, channels], with the large channels that keys have."""
    shape = [(batch, heads, tokens, dim) for heads, dim in ((layer.kv_heads, layer.head_dim),
                                                           (layer.kv_heads, layer.value_head_dim),
                                                           (layer.query_heads, layer.head_dim))]
    keys, values, queries = (random.standard_normal(s).astype(np.float32) for s in shape)
    keys += 4 * random.standard_normal(layer.head_dim).astype(np.float32)
    return keys.astype(dtype), values.astype(dtype), queries.astype(dtype)


def attention(keys, values, queries, window=0, scale=None, softcap=0.0, sinks=None):
    """Of one sequence [heads, tokens, channels], of the last queries, in double."""
    keys, values, queries = (np.asarray(x, np.float64) for x in (keys, values, queries))
    group = queries.shape[0] // keys.shape[0]
    keys, values = np.repeat(keys, group, 0), np.repeat(values, group, 0)
    scores = np.einsum("hqd,hkd->hqk", queries, keys) * (scale or keys.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    tokens, last = keys.shape[1], queries.shape[1]
    behind = np.arange(tokens - last, tokens)[:, None] - np.arange(tokens)[None]
    scores = np.where((behind >= 0) & ((behind < window) | (window == 0)), scores, -np.inf)
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(np.asarray(sinks)[:, None, None], scores.shape[:2] + (1,))], 2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,hkd->hqd", weights[..., :tokens], values)


def heads_of(matrix, heads):
    """[tokens, heads * channels] as [heads, tokens, channels]"""
    return matrix.reshape(matrix.shape[0], heads, -1).transpose(1, 0, 2)


def in_halves(array, axis=-1):
    """Channels 2 i and 2 i + 1 of a head at i and i + half."""
    return np.concatenate([np.take(array, np.arange(first, array.shape[axis], 2), axis) for first in (0, 1)], axis)


def tensor(file, name):
    """A tensor of a safetensors file."""
    with open(REPOSITORY / file, "rb") as f:
        size, = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(size))[name]
        begin, end = header["data_offsets"]
        f.seek(8 + size + begin)
        kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I32": np.int32,
                "I64": np.int64}[header["dtype"]]
        return np.frombuffer(f.read(end - begin), kind).reshape(header["shape"])


def refused(pytest, code, *words):
    """A context in which kvplane.Error of that code must be raised, with these words in its sentence."""
    import kvplane

    class Refused:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, trace):
            assert kind is not None, f"nothing was refused; expected {code}: {words}"
            if not isinstance(error, kvplane.Error):
                return False
            assert error.code == code, error
            for word in words:
                assert word in str(error), f"'{word}' is not in: {error}"
            return True

    return Refused()
