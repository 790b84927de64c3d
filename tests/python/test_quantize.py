"""kvplane.quantize on numpy arrays."""
import numpy as np
import pytest

import kvplane
from kvplane import quantize
from support import heads_of, numbers, refused, tensor

WAYS = {"per_channel": quantize.per_channel, "per_token": quantize.per_token, "per_group": quantize.per_group}


def close(q):
    """What codes and grids say, element by element."""
    tokens, channels = q.shape
    return np.array([[np.float32(q.grid(t, c)[0]) + np.float32(q.grid(t, c)[1]) * np.float32(q.code(t, c) + 0.5)
                      for c in range(channels)] for t in range(tokens)], np.float32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("way", WAYS)
def test_values_are_what_codes_and_grids_say_and_within_the_bound(way, bits):
    x = numbers().standard_normal((40, 24)).astype(np.float32)
    q = WAYS[way](x, bits=bits, heads=2)
    assert q.shape == (40, 24) and q.bits == bits and q.heads == 2
    values = q.dequantize()
    np.testing.assert_allclose(values, close(q), rtol=0, atol=1e-6)
    assert 0 < np.abs(values - x).max() <= q.error_bound()
    assert np.linalg.norm(values - x) <= q.frobenius_error_bound()
    for depth in range(1, bits + 1):
        assert np.abs(q.dequantize(depth) - x).max() <= q.error_bound(depth)


def test_bytes_are_planes_and_grids():
    x = numbers().standard_normal((256, 128)).astype(np.float32)
    for q, grids in ((quantize.per_channel(x, bits=4), 2 * 128), (quantize.per_token(x, bits=4), 256),
                     (quantize.per_group(x, bits=4), 256 * 4)):
        assert q.bytes == 256 * 128 * 4 // 8 + 4 * grids
        assert q.bits_per_element == 8 * q.bytes / x.size


def test_strides_and_types_give_what_a_contiguous_array_gives():
    x = numbers().standard_normal((64, 6, 48)).astype(np.float16)
    plain = quantize.per_channel(np.ascontiguousarray(x[:, ::2, ::-1]).astype(np.float32).reshape(64, -1), heads=3)
    assert plain.bytes > 0
    for other in (x[:, ::2, ::-1].transpose(1, 0, 2), np.asfortranarray(x[:, ::2, ::-1].transpose(1, 0, 2)),
                  x[:, ::2, ::-1].astype(np.float32).transpose(1, 0, 2)):
        np.testing.assert_array_equal(quantize.per_channel(other).dequantize(), plain.dequantize())


def test_read_only_arrays_are_taken():
    x = numbers().standard_normal((32, 16)).astype(np.float32)
    x.setflags(write=False)
    assert quantize.per_token(x).shape == (32, 16)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_out_is_written_where_it_is(dtype):
    x = numbers().standard_normal((33, 16)).astype(np.float32)
    q, memory = quantize.per_token(x, bits=5), np.zeros((33, 40), dtype)
    assert q.dequantize(out=memory[:, 3:35:2]) is not None
    np.testing.assert_array_equal(memory[:, 3:35:2], q.dequantize().astype(dtype))
    assert not memory[:, :3].any() and not memory[:, 4:35:2].any() and not memory[:, 35:].any()


def test_real_keys_in_latents_err_less_in_scores_than_channels_of_as_many_bytes():
    file = "examples/data/smollm2_layers_16_24.safetensors"
    keys = tensor(file, "layers.16.keys").astype(np.float32).reshape(1024, -1)
    queries = tensor(file, "layers.16.queries").astype(np.float32).reshape(64, -1)
    rope = kvplane.Rope(100000.0, halves=False)
    l = quantize.latents(keys, queries, bits=4, heads=3, query_heads=9, rope=rope)
    c = quantize.per_channel(keys, bits=4, heads=3)
    assert l.shape == keys.shape and l.heads == 3 and len(l.kept) == 3

    def error(x):
        off = heads_of(x - keys, 3)
        return np.sqrt(np.mean(np.einsum("hqd,hkd->hqk", heads_of(queries, 9), np.repeat(off, 3, 0)) ** 2))
    print(error(l.dequantize()), error(c.dequantize()), l.bits_per_element, c.bits_per_element)
    assert 8 * (l.bytes - l.basis_bytes) / keys.size < c.bits_per_element
    assert 0 < error(l.dequantize()) < 0.9 * error(c.dequantize())
    assert error(l.dequantize(4)) > error(l.dequantize())


@pytest.mark.parametrize("frame", ["tile", "before_rope", "after_rope"])
def test_more_bits_bring_latents_closer(frame):
    random = numbers()
    keys, queries = random.standard_normal((2, 300, 64)), random.standard_normal((4, 300, 64))
    keys[..., :8] *= 6
    keys, queries = keys.astype(np.float32), queries.astype(np.float32)
    errors, sizes = [], []
    for bits in (2, 4, 8):
        l = quantize.latents(keys, queries, bits=bits, rope=kvplane.Rope(), frame=frame)
        errors.append(np.abs(heads_of(l.dequantize(), 2) - keys).mean())
        sizes.append(l.bits_per_element)
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.5 * errors[2] and errors[2] < 0.1
    assert sizes[0] < sizes[1] < sizes[2]
    assert l.bytes > l.basis_bytes > 0


def test_bad_input_is_refused():
    x = np.ones((8, 16), np.float32)
    with refused(pytest, "option", "9", "expected"):
        quantize.per_channel(x, bits=9)
    with refused(pytest, "option", "group_tokens: 0"):
        quantize.per_channel(x, group_tokens=0)
    with refused(pytest, "option", "group_channels: -1"):
        quantize.per_group(x, group_channels=-1)
    with refused(pytest, "option", "scheme: 'best'", "cell", "unbiased"):
        quantize.per_token(x, scheme="best")
    with refused(pytest, "option", "float64", "float32, float16 or bfloat16"):
        quantize.per_token(x.astype(np.float64))
    with refused(pytest, "option", "int32"):
        quantize.per_token(x.astype(np.int32))
    with refused(pytest, "option", "list"):
        quantize.per_token([[1.0]])
    with refused(pytest, "shape", "(16,)"):
        quantize.per_token(x[0])
    with refused(pytest, "shape", "16 channels", "3 heads"):
        quantize.per_token(x, heads=3)
    bad = x.copy()
    bad[3, 5] = np.nan
    with refused(pytest, "not finite", "token 3", "channel 5"):
        quantize.per_channel(bad)
    bad[3, 5] = 1e6
    with refused(pytest, "beyond fp16", "token 3", "channel 5"):
        quantize.per_channel(bad)
    q = quantize.per_token(x)
    with refused(pytest, "option", "5"):
        q.dequantize(5)
    with refused(pytest, "index"):
        q.code(8, 0)
    with refused(pytest, "shape", "(8, 15)"):
        q.dequantize(out=np.empty((8, 15), np.float32))
    frozen = np.empty((8, 16), np.float32)
    frozen.setflags(write=False)
    with refused(pytest, "option", "writable"):
        q.dequantize(out=frozen)
    with refused(pytest, "option", "frame: 'none'"):
        quantize.latents(x, frame="none")
    with refused(pytest, "shape", "queries: 9 x 16"):
        quantize.latents(np.ones((8, 16), np.float32), np.ones((9, 16), np.float32))
