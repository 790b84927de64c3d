"""kvplane.Cache on numpy arrays."""
import inspect
import pathlib
import threading
import time

import numpy as np
import pytest

import kvplane
from small_model import HEAD_DIM, KV_HEADS, LAYERS, NAME, POLICIES, QUERY_HEADS, ROPE_BASE
from support import RECIPES, attention, heads_of, in_halves, numbers, refused, sequence, tensor

ROPE = kvplane.Rope(10000.0)


def layer(**more):
    return kvplane.Layer(**{**dict(kv_heads=2, query_heads=6, head_dim=64, rope=ROPE), **more})


def made(recipe, random, batch=1, tokens=900, of=None, **options):
    of = of or layer()
    cache = kvplane.Cache([of], recipe, batch=batch, **options)
    keys, values, queries = sequence(random, batch, of, tokens)
    cache.append(keys, values, queries)
    return cache, keys, values, queries


@pytest.mark.parametrize("recipe", RECIPES)
def test_attention_is_that_of_what_is_stored(recipe):
    cache, keys, values, queries = made(recipe, numbers())
    stored_keys, stored_values = (heads_of(x, 2) for x in (cache.stored_keys(), cache.stored_values()))
    for count in (1, 5, 40):
        last = queries[:, :, -count:]
        output = cache.attend(last)
        assert output.shape == (1, 6, count, 64) and output.dtype == np.float32
        expected = attention(stored_keys, stored_values, last[0])
        assert np.sqrt(np.mean((output[0] - expected) ** 2)) < 0.01
    # What is stored errs, but is close: a tile was made, and is the right one.
    off = np.abs(stored_keys - keys[0]).mean()
    assert 0 < off < (0.002 if recipe == "fp16" else 0.5)
    assert cache.packed_tokens() == [900] if recipe in ("fp16", "block32:8") else cache.packed_tokens()[0] >= 640
    assert cache.bits_per_element == 8 * cache.bytes / (900 * 2 * 128)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_is_its_sequences_and_padding_is_nothing(recipe):
    random, padding = numbers(), [0, 130, 7]
    cache, keys, values, queries = kvplane.Cache([layer()], recipe, batch=3), *sequence(random, 3, layer(), 900)
    cache.append(keys[:, :, :850], values[:, :, :850], queries[:, :, :850], padding=padding)
    for t in range(850, 900):
        cache.append(*(x[:, :, t:t + 1] for x in (keys, values, queries)))
    assert cache.tokens() == [900, 770, 893]
    many, one = cache.attend(queries[:, :, -9:]), cache.attend(queries[:, :, -1:])
    for b, first in enumerate(padding):
        alone = kvplane.Cache([layer()], recipe)
        alone.append(*(x[b, :, first:] for x in (keys, values, queries)))
        np.testing.assert_array_equal(alone.stored_keys(), cache.stored_keys(0, b))
        np.testing.assert_array_equal(alone.attend(queries[b, :, -9:]), many[b])
        np.testing.assert_array_equal(alone.attend(queries[b, :, -1:]), one[b])


def test_rows_of_padding_become_zero():
    of = layer()
    keys, values, queries = sequence(numbers(), 2, of, 20)
    cache = kvplane.Cache([of], "fp16", batch=2)
    cache.append(keys, values, padding=[0, 12])
    out = np.full((2, 6, 20, 64), 7, np.float32)
    cache.attend(queries, out=out, padding=[0, 12])
    assert not out[1, :, :12].any() and out[1, :, 12:].all() and out[0].all()
    np.testing.assert_allclose(out[1, :, 12:], attention(keys[1, :, 12:], values[1, :, 12:], queries[1, :, 12:]),
                               atol=2e-3)


def test_types_and_strides_of_inputs_and_outputs():
    of, random = layer(value_head_dim=32), numbers()
    keys, values, queries = sequence(random, 2, of, 300, np.float16)
    plain = kvplane.Cache([of], "standard", batch=2)
    plain.append(keys.astype(np.float32), values.astype(np.float32))
    other = kvplane.Cache([of], "standard", batch=2)
    # [batch, tokens, heads, channels], every second channel of it
    wide = np.repeat(keys.transpose(0, 2, 1, 3), 2, 3)[..., ::2].transpose(0, 2, 1, 3)
    other.append(wide, np.asfortranarray(values))
    np.testing.assert_array_equal(plain.stored_keys(0, 1), other.stored_keys(0, 1))
    expected = plain.attend(queries[:, :, -3:].astype(np.float32))
    for shape, axes in (((2, 6, 3, 32), (0, 1, 2, 3)), ((2, 3, 6, 32), (0, 2, 1, 3)), ((6, 3, 32, 2), (3, 0, 1, 2))):
        for dtype in (np.float32, np.float16):
            memory = np.zeros(shape, dtype)
            out = memory.transpose(axes)
            assert plain.attend(queries[:, :, -3:], out=out) is out
            np.testing.assert_array_equal(out, expected.astype(dtype))


def test_scale_softcap_sink_logits_and_windows():
    of, random = layer(sliding_window=100), numbers()
    cache, keys, values, queries = made("fp16", random, tokens=250, of=of)
    sinks, stored = random.standard_normal(6).astype(np.float32), [heads_of(x, 2) for x in (cache.stored_keys(),
                                                                                            cache.stored_values())]
    for count in (1, 12):
        last = queries[:, :, -count:]
        output = cache.attend(last, scale=0.3, softcap=20.0, sink_logits=list(sinks))
        expected = attention(*stored, last[0], 100, 0.3, 20.0, sinks)
        np.testing.assert_allclose(output[0], expected, atol=2e-3)
    assert np.abs(cache.attend(queries[:, :, -1:]) - cache.attend(queries[:, :, -1:], scale=0.3)).max() > 0.01


def test_a_window_forgets_what_it_never_sees_again():
    of, random = layer(sliding_window=200), numbers()
    keys, values, queries = sequence(random, 1, of, 3000)
    cache = kvplane.Cache([of], "standard")
    sizes = []
    for t in range(0, 3000, 50):
        cache.append(keys[:, :, t:t + 50], values[:, :, t:t + 50])
        sizes.append(cache.bytes)
    assert cache.tokens() == [3000] and cache.first_kept()[0] == 2950 + 1 - 200
    assert max(sizes[20:]) < 3 * sizes[3]
    stored = heads_of(cache.stored_keys(), 2), heads_of(cache.stored_values(), 2)
    np.testing.assert_allclose(cache.attend(queries[:, :, -1:])[0], attention(*stored, queries[0, :, -1:], 200),
                               atol=0.02)
    with refused(pytest, "index", "sliding window of 200", "were dropped"):
        cache.truncate(2900)
    assert cache.tokens() == [3000]


@pytest.mark.parametrize("recipe", RECIPES)
def test_drafts_taken_back_leave_no_trace(recipe):
    random = numbers()
    cache, *_ = made(recipe, random, tokens=700)
    same = cache.fork()
    for count in (1, 30, 128):
        drafts = sequence(random, 1, layer(), count)
        cache.append(*drafts, provisional=True)
        assert cache.provisional_tokens() == [count]
        kept = count // 3
        cache.crop(count - kept)
        cache.accept()
        if kept:
            same.append(*(x[:, :, :kept] for x in drafts))
    more = sequence(random, 1, layer(), 400)
    for c in (cache, same):
        c.append(*more)
    np.testing.assert_array_equal(cache.stored_keys(), same.stored_keys())
    np.testing.assert_array_equal(cache.attend(more[2][:, :, -1:]), same.attend(more[2][:, :, -1:]))
    assert cache.bytes == same.bytes


def test_truncate_and_crop():
    random = numbers()
    cache, keys, values, _ = made("fp16", random, batch=2, tokens=300)
    cache.truncate([200, 250])
    cache.crop(10)
    assert cache.tokens() == [190, 240]
    np.testing.assert_array_equal(heads_of(cache.stored_keys(0, 1), 2), keys[1, :, :240].astype(np.float16))
    for refusal in (lambda: cache.truncate(241), lambda: cache.crop(191), lambda: cache.truncate(-1),
                    lambda: cache.crop(-1)):
        with refused(pytest, "index"):
            refusal()
    with refused(pytest, "shape", "3 numbers", "2 sequences"):
        cache.truncate([1, 2, 3])
    assert cache.tokens() == [190, 240]
    cache.clear()
    assert cache.tokens() == [0, 0] and cache.bytes == 0


def test_reorder_forks_and_shares():
    random = numbers()
    cache, keys, values, queries = made("standard", random, batch=2, tokens=1500)
    size, stored = cache.bytes, [cache.stored_keys(0, b) for b in (0, 1)]
    cache.reorder([1, 1, 0, 1])
    assert cache.batch == 4 and cache.bytes == size
    for b, was in enumerate((1, 1, 0, 1)):
        np.testing.assert_array_equal(cache.stored_keys(0, b), stored[was])
    more = sequence(random, 4, layer(), 1)
    cache.append(*more)
    assert size < cache.bytes < 1.1 * size
    assert not np.array_equal(cache.stored_keys(0, 0)[-1], cache.stored_keys(0, 1)[-1])
    cache.reorder([2])
    assert cache.batch == 1 and cache.bytes < 0.6 * size
    for bad in ([0, 1], [-1]):
        with refused(pytest, "index", "of 1"):
            cache.reorder(bad)
    with refused(pytest, "shape", "no sequences"):
        cache.reorder([])


@pytest.mark.parametrize("recipe", ["fp16", "standard", "smallest", "latent:3:3"])
def test_save_and_load(recipe, tmp_path):
    random, path = numbers(), tmp_path / "session.safetensors"
    layers = [layer(), layer(sliding_window=300)]
    cache = kvplane.Cache(layers, recipe, batch=2)
    first, more = sequence(random, 2, layer(), 900), sequence(random, 2, layer(), 9)
    for i in (0, 1):
        cache.append(*first, layer=i, padding=[0, 40])
    cache.save(path)
    again = kvplane.Cache(layers, recipe)
    again.load(str(path))
    assert again.batch == 2 and again.tokens() == [900, 860] and again.bytes == cache.bytes
    for c in (cache, again):
        for i in (0, 1):
            c.append(*more, layer=i)
    for i in (0, 1):
        np.testing.assert_array_equal(cache.attend(more[2], layer=i), again.attend(more[2], layer=i))
    with refused(pytest, "mismatch"):
        kvplane.Cache(layers, "kivi:4").load(path)
    with refused(pytest, "mismatch", "multiple of 3"):
        kvplane.Cache([layer()] * 3, recipe).load(path)
    with refused(pytest, "io"):
        again.load(tmp_path / "nothing")
    path.write_bytes(path.read_bytes()[:-5])
    with refused(pytest, "format"):
        again.load(path)
    assert again.tokens() == [909, 869]


def test_policies(tmp_path):
    layers = [layer(), layer(kv_heads=2)]
    policy = kvplane.Policy("Model A", layers, ["standard", "kivi:4"])
    policy.save(tmp_path / "policy.safetensors")
    loaded = kvplane.Policy.load(tmp_path / "policy.safetensors")
    assert loaded.model == "Model A" and loaded.recipes == ["standard", "kivi:4"]
    cache = kvplane.Cache(layers, policy=loaded, model="Model A")
    assert cache.recipes == ["standard", "kivi:4"]
    plain = kvplane.Cache(layers, ["standard", "kivi:4"])
    tokens = sequence(numbers(), 1, layer(), 500)
    for c in (cache, plain):
        c.append(*tokens, layer=1)
    np.testing.assert_array_equal(cache.stored_keys(1), plain.stored_keys(1))
    with refused(pytest, "mismatch", "Model B", "Model A"):
        kvplane.Cache(layers, policy=loaded, model="Model B")
    with refused(pytest, "mismatch"):
        kvplane.Cache([layer(), layer(kv_heads=3)], policy=loaded, model="Model A")
    with refused(pytest, "mismatch"):
        kvplane.Cache([layer()], policy=loaded, model="Model A")
    with refused(pytest, "mismatch"):
        loaded.require_model("Model A", [layer(rope=None), layer()])
    with refused(pytest, "mismatch"):
        kvplane.Policy("Model A", [layer()], "latent:3:3")  # without a basis
    with refused(pytest, "io"):
        kvplane.Policy.load(tmp_path / "nothing")


def small_layers(halves):
    rope = kvplane.Rope(ROPE_BASE, halves=halves)
    return [kvplane.Layer(kv_heads=KV_HEADS, query_heads=QUERY_HEADS, head_dim=HEAD_DIM, rope=rope)] * LAYERS


def test_policies_of_tune_are_loaded_and_refused():
    policy = kvplane.Policy.load(POLICIES["latent"])
    assert policy.model == NAME and all(recipe.startswith("latent:") for recipe in policy.recipes)
    cache = kvplane.Cache(small_layers(False), policy=policy, model=NAME)
    assert cache.recipes == policy.recipes and not cache.needs_queries()
    halves = small_layers(True)
    with refused(pytest, "mismatch", "layer 0", "interleaved", "halves"):
        kvplane.Cache(halves, policy=policy, model=NAME)
    assert kvplane.Cache(halves, policy=policy.with_halves(), model=NAME).recipes == policy.recipes
    with refused(pytest, "mismatch", f"'{NAME}'", "not for 'Another'"):
        kvplane.Cache(halves, policy=policy.with_halves(), model="Another")
    with refused(pytest, "mismatch", "2 layers, not of 3"):
        kvplane.Cache(halves + halves[:1], policy=policy.with_halves(), model=NAME)
    with refused(pytest, "option", "recipe", "beside a policy"):
        kvplane.Cache(halves, "standard", policy=policy.with_halves(), model=NAME)
    with refused(pytest, "option", "rotation_seed", "beside a policy"):
        kvplane.Cache(halves, policy=policy.with_halves(), model=NAME, rotation_seed=3)


@pytest.mark.parametrize("kind", POLICIES)
def test_what_a_policy_knows_of_channels_moves_with_them(kind, tmp_path):
    policy = kvplane.Policy.load(POLICIES[kind])
    policy.with_halves().save(tmp_path / "halves")
    policy.with_halves().with_halves(False).save(tmp_path / "back")
    policy.with_halves(False).save(tmp_path / "same")
    for same in ("back", "same"):
        assert (tmp_path / same).read_bytes() == POLICIES[kind].read_bytes()
    # Channels of a head, and the shape in which they have an axis of their own.
    axes = {"shaped": {"queries.mean": ((KV_HEADS, HEAD_DIM), [1]),
                       "queries.scatter": ((KV_HEADS, HEAD_DIM, HEAD_DIM), [1, 2])},
            "latent": {f"parts.0.{name}": ((KV_HEADS, HEAD_DIM, -1), [1]) for name in ("mean", "encode", "decode")}}
    for name in (f"layers.{layer}.{name}" for layer in range(LAYERS) for name in axes[kind]):
        shape, moving = axes[kind][name.split(".", 2)[2]]
        was, now = (tensor(file, name).reshape(shape) for file in (POLICIES[kind], tmp_path / "halves"))
        expected = was
        for axis in moving:
            expected = in_halves(expected, axis)
        np.testing.assert_array_equal(now, expected)
        assert not np.array_equal(now, was)


def test_a_policy_of_latents_stores_the_same_in_both_orders_of_channels():
    policy, random = kvplane.Policy.load(POLICIES["latent"]), numbers()
    keys, values, queries = sequence(random, 1, small_layers(True)[0], 900)
    keys[..., :4] *= 5
    caches = [kvplane.Cache(small_layers(False), policy=policy, model=NAME),
              kvplane.Cache(small_layers(True), policy=policy.with_halves(), model=NAME)]
    caches[0].append(keys, values, queries)
    caches[1].append(in_halves(keys), values, in_halves(queries))
    assert caches[0].packed_tokens() == caches[1].packed_tokens() == [768] and caches[0].bytes == caches[1].bytes
    packed = slice(4, 772)
    pair = [heads_of(cache.stored_keys(), KV_HEADS) for cache in caches]
    error = np.abs(pair[0] - keys[0])[:, packed].mean()
    # Keys come to tiles from 8 bits, which are rotated: other rotations of the same keys.
    apart = np.abs(in_halves(pair[0]) - pair[1])[:, packed]
    assert error > 0.01 and apart.mean() < 0.2 * error, (apart.mean(), error)
    np.testing.assert_allclose(in_halves(pair[0])[:, :4], pair[1][:, :4], atol=0.02)
    outputs = [caches[0].attend(queries[:, :, -9:]), caches[1].attend(in_halves(queries)[:, :, -9:])]
    exact = attention(keys[0], values[0], queries[0, :, -9:])
    off = [np.sqrt(np.mean((output[0] - exact) ** 2)) for output in outputs]
    apart = np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2))
    assert apart < 0.5 * off[0] and 0.7 < off[1] / off[0] < 1.4, (apart, off)


def test_bad_input_changes_nothing():
    random = numbers()
    cache, keys, values, queries = made("standard", random, batch=2, tokens=200)
    before = cache.stored_keys(0, 0), cache.bytes

    def bad(array, at, value):
        array = array.copy()
        array[at] = value
        return array
    for code, words, call in (
            ("not finite", ["sequence 1", "token 9", "head 1", "channel 3"],
             lambda: cache.append(bad(keys, (1, 1, 9, 3), np.inf), values)),
            ("beyond fp16", ["values", "sequence 1"], lambda: cache.append(keys, bad(values, (1, 0, 0, 0), 7e4))),
            ("shape", ["keys", "3 heads", "2 heads of 64"], lambda: cache.append(queries[:, :3], values)),
            ("shape", ["batch 1", "batch 2"], lambda: cache.append(keys[0], values)),
            ("shape", ["values: 5 tokens"], lambda: cache.append(keys, values[:, :, :5])),
            ("shape", ["queries: 5 tokens"], lambda: cache.append(keys, values, queries[:, :, :5])),
            ("shape", ["(200, 64)"], lambda: cache.append(keys[0, 0], values)),
            ("shape", ["padding: 1 numbers for 2"], lambda: cache.append(keys, values, padding=[1])),
            ("index", ["padding: 201"], lambda: cache.append(keys, values, padding=[0, 201])),
            ("index", ["layer 1 of 1"], lambda: cache.append(keys, values, layer=1)),
            ("option", ["float64"], lambda: cache.append(keys.astype(np.float64), values)),
            ("shape", ["out"], lambda: cache.attend(queries, out=np.empty((2, 6, 200, 63), np.float32))),
            ("shape", ["201 query tokens"], lambda: cache.attend(np.zeros((2, 6, 201, 64), np.float32))),
            ("option", ["scale"], lambda: cache.attend(queries, scale=-1.0)),
            ("shape", ["sink logits"], lambda: cache.attend(queries, sink_logits=[1.0])),
            ("option", ["nonsense"], lambda: cache.attend(queries, read="nonsense"))):
        with refused(pytest, code, *words):
            call()
    assert cache.tokens() == [200, 200] and cache.bytes == before[1]
    np.testing.assert_array_equal(cache.stored_keys(0, 0), before[0])
    for code, words, call in (
            ("option", ["recipe 'nonsense'", "standard", "compact"], lambda: kvplane.Cache([layer()], "nonsense")),
            ("option", ["99 bits", "1 to 8"], lambda: kvplane.capabilities("kivi:99")),
            ("shape", ["layers: none"], lambda: kvplane.Cache([])),
            ("shape", ["2 names for 1 layers"], lambda: kvplane.Cache([layer()], ["fp16", "fp16"])),
            ("option", ["batch: 0"], lambda: kvplane.Cache([layer()], batch=0)),
            ("option", ["threads: 0"], lambda: kvplane.Cache([layer()], threads=0)),
            ("option", ["sliding window of -1"], lambda: kvplane.Cache([layer(sliding_window=-1)])),
            ("option", ["queries"], lambda: kvplane.Cache([layer()], "smallest").append(keys[0], values[0]))):
        with refused(pytest, code, *words):
            call()


def test_errors_are_value_errors_with_a_code():
    assert issubclass(kvplane.Error, ValueError) and "code" in kvplane.Error.__doc__
    with pytest.raises(ValueError) as caught:
        kvplane.Cache([layer()], "nonsense")
    assert caught.value.code == "option"


def test_threads_do_not_change_a_bit():
    outputs = []
    for threads in (1, 2, 3):
        cache, _, _, queries = made("smallest", numbers(), batch=2, threads=threads)
        assert cache.threads == threads
        outputs.append((cache.attend(queries[:, :, -1:]), cache.attend(queries[:, :, -50:])))
    for one, many in outputs[1:]:
        np.testing.assert_array_equal(one, outputs[0][0])
        np.testing.assert_array_equal(many, outputs[0][1])


def test_calls_let_other_threads_run():
    of = layer(kv_heads=8, query_heads=8)
    keys, values, queries = sequence(numbers(), 1, of, 6000)
    cache, turns, done = kvplane.Cache([of], "standard"), 0, threading.Event()

    def work():
        cache.append(keys, values)
        cache.attend(queries[:, :, -400:])
        done.set()
    thread = threading.Thread(target=work)
    begun = time.monotonic()
    thread.start()
    while not done.is_set():
        time.sleep(0.002)
        turns += 1
    took = time.monotonic() - begun
    thread.join()
    assert turns > 10, f"{turns} turns in {took:.2f} s: the GIL was held"


def test_one_cache_and_several_threads():
    cache, keys, values, queries = made("standard", numbers(), tokens=600, threads=2)
    expected, wrong = cache.attend(queries[:, :, -1:]), []

    def work():
        for _ in range(50):
            if not np.array_equal(cache.attend(queries[:, :, -1:]), expected):
                wrong.append(1)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_everything_is_documented_and_typed():
    folder = pathlib.Path(kvplane.__file__).parent
    assert (folder / "py.typed").exists()
    stub = (folder / "_kvplane/__init__.pyi").read_text()
    arrays = (folder / "_kvplane/quantize.pyi").read_text()
    for name in kvplane.__all__:
        if name == "Error":
            assert "class Error(ValueError):" in stub
        elif name not in ("quantize", "__version__"):
            assert inspect.getdoc(getattr(kvplane, name)), name
            assert f" {name}" in stub, name
    for name in kvplane.quantize.__all__:
        assert inspect.getdoc(getattr(kvplane.quantize, name)), name
        assert f" {name}" in arrays, name
    for method in ("append", "attend", "truncate", "crop", "reorder", "save", "load"):
        assert inspect.getdoc(getattr(kvplane.Cache, method)), method
        assert f"def {method}(" in stub
    assert "_kvplane" not in stub and "\nimport _kvplane" not in arrays  # which no one can import
    assert "latent:KEY:VALUE" in kvplane.recipes()
