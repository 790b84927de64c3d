"""Caches on CUDA devices, beside those on the CPU, and in transformers beside DynamicCache. What needs no device is
tested without one too: what is refused there."""
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvplane
from support import attention, heads_of, numbers, refused, sequence

ROPE = kvplane.Rope(10000.0)
BUILT = kvplane.cuda_devices() is not None
needs_device = pytest.mark.skipif(
    not kvplane.cuda_devices() or not torch.cuda.is_available(),
    reason=f"kvplane {'has' if BUILT else 'is built without'} CUDA, and finds {kvplane.cuda_devices() or 0} devices; "
           f"torch {'finds' if torch.cuda.is_available() else 'has no'} device")
needs_part = pytest.mark.skipif(not BUILT, reason="kvplane is built without CUDA")

SERVED = ["fp16", "kivi:4", "kivi:2:32", "key_favored:6:4", "key_favored:4:4", "standard", "compact", "latent:3:3",
          "weighted:3:3",
          # Which the CPU appends, for good:
          "smallest", "key_favored:4:4+value_widths=32x4/32x2/64x1", "standard+value_clip=1"]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = "cuda:0"


def layer(**more):
    return kvplane.Layer(**{**dict(kv_heads=2, query_heads=6, head_dim=64, rope=ROPE), **more})


def tokens_of(random, batch, of, tokens, dtype=torch.float16):
    """Keys, values and queries on the CPU."""
    return [torch.from_numpy(x).to(dtype) for x in sequence(random, batch, of, tokens)]


def there(tensors):
    return [x.to(DEVICE) for x in tensors]


def twins(recipe, of=None, **options):
    """A cache on the CPU and one on the device."""
    layers = of if isinstance(of, list) else [of or layer()]
    return kvplane.Cache(layers, recipe, **options), kvplane.Cache(layers, recipe, device=DEVICE, **options)


def append(caches, tensors, **how):
    host, device = caches
    host.append(*tensors, **{k: v for k, v in how.items() if k != "check"})
    device.append(*there(tensors), **how)


def saved(cache, folder):
    path = folder / f"{cache.device.replace(':', '')}.safetensors"
    cache.save(path)
    return path.read_bytes()


def expect_attention(cache, queries, output, layer=0, **how):
    """That output is attention over what the cache stores. Weights are rounded to 16 bits of a tile's largest, and so
    are factors of keys; tests/cuda/attend_gpu.cpp says what that may add up to."""
    of = cache.layer(layer)
    for b in range(cache.batch):
        keys, values = (heads_of(x, of.kv_heads) for x in (cache.stored_keys(layer, b), cache.stored_values(layer, b)))
        expected = attention(keys, values, queries[b].float().cpu().numpy(), **how)
        found = output[b].float().cpu().numpy()
        rounding = {torch.float32: 0, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[output.dtype]
        assert np.isfinite(found).all()
        off, most = np.abs(found - expected).max(), np.abs(values).max()
        assert off <= (3e-3 + rounding) * most, f"sequence {b}: off by {off} of {most}"


# Without a device ----------------------------------------------------------------------------------------------------

def test_devices_that_are_not_there_are_refused():
    for name in ("tpu", "cuda:", "cuda:x", "cuda:-1", ""):
        with refused(pytest, "option", f"device: '{name}'", "'cpu', or 'cuda:0'"):
            kvplane.Cache([layer()], device=name)
    assert kvplane.Cache([layer()], device="cpu").device == "cpu"
    assert kvplane.Cache([layer()], device=torch.device("cpu")).device == "cpu"
    count = kvplane.cuda_devices()
    if count is None:
        with refused(pytest, "option", "'cuda:0'", "no part for CUDA", "KVPLANE_CUDA=ON"):
            kvplane.Cache([layer()], device="cuda:0")
    else:
        with refused(pytest, "option", f"'cuda:{count}' of {count} CUDA devices"):
            kvplane.Cache([layer()], device=f"cuda:{count}")


def cuda_tensor(*shape, dtype=torch.float16):
    """A tensor that says that it is on a device; there need be none."""
    if torch.cuda.is_available():
        return torch.zeros(*shape, dtype=dtype, device=DEVICE)
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device=DEVICE)


def test_cuda_tensors_are_refused_by_a_cache_on_the_cpu():
    cache = kvplane.Cache([layer()], "fp16")
    on_cpu, on_cuda = torch.zeros(1, 2, 3, 64), cuda_tensor(1, 2, 3, 64)
    words = ["on device 'cuda:0'"] + (["device='cuda'", "expected the CPU"] if BUILT else ["KVPLANE_CUDA=ON"])
    for keys, values, name in ((on_cuda, on_cuda, "keys"), (on_cpu, on_cuda, "values")):
        with refused(pytest, "option", name, *words):
            cache.append(keys, values)
    with refused(pytest, "option", "array", *words):
        kvplane.quantize.per_token(cuda_tensor(3, 4))
    assert cache.tokens() == [0]


def small_model(**change):
    transformers = pytest.importorskip("transformers")
    import kvplane.transformers as kt
    config = dict(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=32)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **{**config, **change}, attn_implementation=kt.ATTENTION)).eval(), kt


def test_tensors_of_another_place_are_refused_in_transformers():
    model, kt = small_model()
    cache, keys = kt.Cache(model), torch.zeros(1, 2, 3, 32)
    if not kvplane.cuda_devices():
        with refused(pytest, "option", "'cuda:0'", "of 0 CUDA devices" if BUILT else "KVPLANE_CUDA=ON"):
            cache.update(*(cuda_tensor(1, 2, 3, 32),) * 2, 0)
        with refused(pytest, "option", "'cuda:0'", "of 0 CUDA devices" if BUILT else "KVPLANE_CUDA=ON"):
            kt.Cache(model, device="cuda:0")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    with refused(pytest, "option", "keys of layer 0", "'cuda:0'", "expected the CPU", "several devices"):
        cache.update(*(cuda_tensor(1, 2, 3, 32),) * 2, 0)
    with refused(pytest, "option", "values of layer 0", "'cuda:0'", "expected the CPU"):
        cache.update(keys, cuda_tensor(1, 2, 3, 32), 0)


# Arrays --------------------------------------------------------------------------------------------------------------

@needs_device
@pytest.mark.parametrize("recipe", SERVED)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_device_stores_the_bytes_of_the_cpu(recipe, dtype, tmp_path):
    random, padding = numbers(), [0, 130, 7]
    caches = twins(recipe, [layer(), layer(kv_heads=1, query_heads=4, head_dim=128, value_head_dim=64)], batch=3)
    for i in (0, 1):
        all_tokens = tokens_of(random, 3, caches[0].layer(i), 900, dtype)
        at = 0
        for count in (500, 150, 1, 1, 3, 200, 45):
            part = [x[:, :, at:at + count] for x in all_tokens]
            append(caches, part, layer=i, padding=padding if at == 0 else None)
            at += count
    host, device = caches
    assert device.device == DEVICE and device.batch == 3
    for i in (0, 1):
        assert device.tokens(i) == host.tokens(i) == [900, 770, 893]
        assert device.packed_tokens(i) == host.packed_tokens(i)
        assert not device.needs_queries(i)
        np.testing.assert_array_equal(device.stored_keys(i, 1), host.stored_keys(i, 1))
        np.testing.assert_array_equal(device.stored_values(i, 2), host.stored_values(i, 2))
    assert device.bytes == host.bytes and device.bits_per_element == host.bits_per_element
    assert saved(device, tmp_path) == saved(host, tmp_path)


@needs_device
def test_bytes_without_a_check_are_the_same(tmp_path):
    random = numbers()
    caches = twins("standard", batch=2)
    for count in (300, 1, 1, 130, 1):
        append(caches, tokens_of(random, 2, layer(), count), check=False)
    assert saved(caches[1], tmp_path) == saved(caches[0], tmp_path)


@needs_device
@pytest.mark.parametrize("recipe", SERVED)
def test_attention_is_that_of_what_is_stored(recipe):
    random = numbers()
    host, device = caches = twins(recipe)
    append(caches, tokens_of(random, 1, layer(), 1000))
    queries = tokens_of(random, 1, layer(), 700)[2]
    for count in (1, 5, 8, 9, 40, 600, 700):
        last = queries[:, :, -count:]
        output = device.attend(last.to(DEVICE))
        assert output.shape == (1, 6, count, 64) and output.dtype == torch.float32 and output.is_cuda
        expect_attention(device, last, output)
        # And close to what the CPU makes of it.
        np.testing.assert_allclose(output.cpu().numpy(), host.attend(last), atol=0.05)


@needs_device
@pytest.mark.parametrize("recipe", ["fp16", "standard", "latent:3:3", "smallest"])
@pytest.mark.parametrize("dtype", TYPES)
def test_ragged_batches_padding_and_layouts(recipe, dtype):
    random, padding = numbers(), [0, 600, 7]
    host, device = caches = twins(recipe, batch=3)
    append(caches, tokens_of(random, 3, layer(), 1200, dtype), padding=padding)
    for step in range(3):
        append(caches, tokens_of(random, 3, layer(), 1, dtype), check=False)
        queries = tokens_of(random, 3, layer(), 1, dtype)[2].to(DEVICE)
        out = torch.full((3, 1, 6, 64), 7.0, dtype=dtype, device=DEVICE)
        assert device.attend(queries, out=out.transpose(1, 2)) is not None
        expect_attention(device, queries, out.transpose(1, 2))
    for count in (1, 3, 8, 20):
        queries = tokens_of(random, 3, layer(), count, dtype)[2]
        other = queries.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE)  # [batch][token][head][channel]
        assert count == 1 or other.stride() != queries.stride()
        for given in (queries.to(DEVICE), other):
            out = torch.full((3, count, 6, 64), 7.0, dtype=dtype, device=DEVICE).transpose(1, 2)
            device.attend(given, out=out)
            expect_attention(device, queries, out)
            out = torch.full((3, 6, count, 64), 7.0, dtype=dtype, device=DEVICE)
            device.attend(given, out=out)
            expect_attention(device, queries, out)


@needs_device
def test_rows_of_padding_become_zero():
    keys, values, queries = there(tokens_of(numbers(), 2, layer(), 20))
    for recipe in ("fp16", "latent:3:3"):  # on the device, and while the CPU learns
        cache = kvplane.Cache([layer()], recipe, batch=2, device=DEVICE)
        cache.append(keys, values, queries, padding=[0, 12])
        for out in (torch.full((2, 6, 20, 64), 7.0, device=DEVICE),
                    torch.full((2, 20, 6, 64), 7.0, device=DEVICE).transpose(1, 2)):
            cache.attend(queries, out=out, padding=[0, 12])
            assert not out[1, :, :12].any() and out[1, :, 12:].all() and out[0].all()
            expected = attention(*(x[1, :, 12:].float().cpu().numpy() for x in (keys, values, queries)))
            np.testing.assert_allclose(out[1, :, 12:].cpu().numpy(), expected, atol=2e-2)


@needs_device
def test_scale_softcap_sink_logits_and_windows():
    of, random = layer(sliding_window=100), numbers()
    sinks = random.standard_normal(6).astype(np.float32)
    device = kvplane.Cache([of], "fp16", device=DEVICE)
    device.append(*there(tokens_of(random, 1, of, 250)))
    for count in (1, 12):
        last = tokens_of(random, 1, of, count)[2]
        given = dict(scale=0.3, softcap=20.0)
        for logits in (list(sinks), torch.from_numpy(sinks).to(DEVICE), list(sinks)):
            output = device.attend(last.to(DEVICE), sink_logits=logits, **given)
            expect_attention(device, last, output, window=100, sinks=sinks, **given)
        other = device.attend(last.to(DEVICE), sink_logits=list(sinks[::-1]), **given)
        assert not torch.equal(other, output)
        expect_attention(device, last, device.attend(last.to(DEVICE)), window=100)


@needs_device
def test_a_window_forgets_as_on_the_cpu(tmp_path):
    of, random = layer(sliding_window=200), numbers()
    host, device = caches = twins("standard", [of, layer()])
    for _ in range(30):
        part = tokens_of(random, 1, of, 50)
        for i in (0, 1):
            append(caches, part, layer=i)
        assert device.first_kept(0) == host.first_kept(0) and device.bytes == host.bytes
    assert device.first_kept(0)[0] == 1450 + 1 - 200
    assert saved(device, tmp_path) == saved(host, tmp_path)
    queries = tokens_of(random, 1, of, 30)[2]
    np.testing.assert_allclose(device.attend(queries.to(DEVICE)).cpu().numpy(), host.attend(queries), atol=0.05)
    for cache in caches:
        with refused(pytest, "index", "sliding window of 200", "were dropped"):
            cache.truncate(1400)
    assert device.tokens(0) == [1500]


@needs_device
@pytest.mark.parametrize("recipe", SERVED)
def test_drafts_taken_back_leave_no_trace(recipe):
    random, of = numbers(), layer()
    host, device = caches = twins(recipe, batch=2)
    append(caches, tokens_of(random, 2, of, 700), padding=[0, 30])
    for count in (1, 30, 128, 2, 200, 60):
        pieces = [1, count - 1] if count > 2 else [count]
        at, drafts = 0, tokens_of(random, 2, of, count)
        for piece in pieces:
            device.append(*there([x[:, :, at:at + piece] for x in drafts]), provisional=True, check=count == 30)
            at += piece
        assert device.provisional_tokens() == [count] * 2
        expect_attention(device, drafts[2][:, :, -1:], device.attend(drafts[2][:, :, -1:].to(DEVICE)))
        kept = count // 3
        # In two steps, the second of which goes behind the first.
        device.crop((count - kept) // 2)
        device.crop(count - kept - (count - kept) // 2)
        assert device.provisional_tokens() == [kept] * 2
        device.accept()
        if kept:
            host.append(*(x[:, :, :kept] for x in drafts))
        assert device.tokens() == host.tokens() and device.packed_tokens() == host.packed_tokens()
        for b in (0, 1):
            np.testing.assert_array_equal(device.stored_keys(0, b), host.stored_keys(0, b))
            np.testing.assert_array_equal(device.stored_values(0, b), host.stored_values(0, b))
    append(caches, tokens_of(random, 2, of, 400))
    assert device.bytes == host.bytes
    np.testing.assert_array_equal(device.stored_keys(0, 1), host.stored_keys(0, 1))


@needs_device
def test_provisional_tokens_are_forked_accepted_and_not_saved(tmp_path):
    random, of = numbers(), layer()
    host, device = caches = twins("standard")
    append(caches, tokens_of(random, 1, of, 280))
    drafts = tokens_of(random, 1, of, 60)
    device.append(*there(drafts), provisional=True)
    with refused(pytest, "option", "60 provisional tokens", "accept()"):
        device.save(tmp_path / "cache")
    fork = device.fork()
    fork.crop(60)
    np.testing.assert_array_equal(fork.stored_keys(), host.stored_keys())
    device.accept(keep=50)
    assert device.provisional_tokens() == [50] and fork.provisional_tokens() == [0]
    device.crop(50)
    host.append(*(x[:, :, :10] for x in drafts))
    np.testing.assert_array_equal(device.stored_keys(), host.stored_keys())
    assert device.provisional_tokens() == [0]
    # Other tokens accept them.
    for cache, bring in ((host, list), (device, there)):
        cache.append(*bring(x[:, :, :20] for x in drafts), provisional=True)
        cache.append(*bring(x[:, :, :1] for x in drafts))
        assert cache.provisional_tokens() == [0] and cache.tokens() == [311]
    np.testing.assert_array_equal(device.stored_keys(), host.stored_keys())


@needs_device
@pytest.mark.parametrize("recipe", ["fp16", "standard", "latent:3:3", "smallest"])
def test_truncate_crop_and_go_on(recipe, tmp_path):
    random, of = numbers(), layer()
    host, device = caches = twins(recipe, batch=2)
    append(caches, tokens_of(random, 2, of, 800))
    for cache in caches:
        cache.truncate([700, 650])
        cache.crop(10)
        assert cache.tokens() == [690, 640]
    append(caches, tokens_of(random, 2, of, 200))
    assert saved(device, tmp_path) == saved(host, tmp_path)
    for refusal in (lambda: device.truncate(891), lambda: device.crop(841), lambda: device.truncate(-1),
                    lambda: device.crop(-1)):
        with refused(pytest, "index"):
            refusal()
    # To nothing, after which a basis is fitted anew.
    for cache in caches:
        cache.truncate([0, 300])
        assert cache.tokens() == [0, 300]
    append(caches, tokens_of(random, 2, of, 700))
    assert saved(device, tmp_path) == saved(host, tmp_path)
    queries = tokens_of(random, 2, of, 2)[2]
    expect_attention(device, queries, device.attend(queries.to(DEVICE)))
    device.clear()
    assert device.tokens() == [0, 0] and device.bytes == 0
    append((kvplane.Cache([of], recipe, batch=2), device), tokens_of(random, 2, of, 9))
    assert device.tokens() == [9, 9]


@needs_device
@pytest.mark.parametrize("recipe", ["fp16", "standard", "latent:3:3", "smallest"])
@pytest.mark.parametrize("before", [150, 900])
def test_reorder_forks_and_shares(recipe, before, tmp_path):
    random, of = numbers(), layer()
    host, device = caches = twins(recipe, batch=2)
    append(caches, tokens_of(random, 2, of, before))
    for indices in ([1, 1, 0, 1], [3, 2, 0, 0], [0, 1, 2, 3], [2, 1]):
        size = device.bytes
        for cache in caches:
            cache.reorder(indices)
        assert device.batch == len(indices) and device.bytes == host.bytes
        if recipe in ("fp16", "standard"):  # what others learn is each sequence's own
            assert host.bytes <= size
        forks = [cache.fork() for cache in caches]
        append(forks, tokens_of(random, len(indices), of, 140))
        append(caches, tokens_of(random, len(indices), of, 3), check=False)
        for pair in (forks, caches):
            assert saved(pair[1], tmp_path) == saved(pair[0], tmp_path)
        queries = tokens_of(random, len(indices), of, 1)[2]
        expect_attention(device, queries, device.attend(queries.to(DEVICE)))
    for bad in ([0, 2], [-1]):
        with refused(pytest, "index", "of 2"):
            device.reorder(bad)
    with refused(pytest, "shape", "no sequences"):
        device.reorder([])


@needs_device
@pytest.mark.parametrize("recipe", ["fp16", "standard", "latent:3:3", "smallest"])
@pytest.mark.parametrize("before", [300, 900])
def test_files_go_from_one_to_the_other(recipe, before, tmp_path):
    random, layers = numbers(), [layer(), layer(sliding_window=300)]
    host, device = caches = twins(recipe, layers, batch=2)
    first, more = tokens_of(random, 2, layer(), before), tokens_of(random, 2, layer(), 300)
    for i in (0, 1):
        append(caches, first, layer=i, padding=[0, 40])
    device.save(tmp_path / "of device")
    host.save(tmp_path / "of host")
    again = twins(recipe, layers)
    again[0].load(tmp_path / "of device")
    again[1].load(tmp_path / "of host")
    for pair in (again, caches):
        assert pair[1].batch == 2 and pair[1].tokens() == [before, before - 40]
        for i in (0, 1):
            append(pair, more, layer=i)
    assert len({saved(cache, tmp_path) for cache in (*caches, *again)}) == 1
    other = kvplane.Cache([layer()] * 3, recipe, device=DEVICE)
    with refused(pytest, "mismatch", "4 caches", "multiple of 3"):
        other.load(tmp_path / "of host")
    with refused(pytest, "io", "nothing"):
        device.load(tmp_path / "nothing")
    assert device.tokens() == [before + 300, before + 260]


@needs_device
def test_work_goes_to_the_stream_that_is_current():
    random, of = numbers(), layer()
    cache = kvplane.Cache([of], "standard", device=DEVICE)
    plain = kvplane.Cache([of], "standard", device=DEVICE)
    for step in range(20):
        tensors = tokens_of(random, 1, of, 40)
        plain.append(*there(tensors))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # Work that is long enough for another stream to overtake it.
            slow = torch.randn(2000, 2000, device=DEVICE)
            for _ in range(20):
                slow = slow @ slow * 1e-3
            zero = (slow.sum() * 0).nan_to_num(0, 0, 0).half()
            ours = [x + zero for x in there(tensors)]
            cache.append(*ours, check=False)
            found = cache.attend(ours[2][:, :, -1:])
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(found, plain.attend(tensors[2][:, :, -1:].to(DEVICE)), rtol=0, atol=0)
    other = torch.cuda.Stream()
    by_number = cache.attend(tensors[2][:, :, -1:].to(DEVICE), stream=other.cuda_stream)
    other.synchronize()
    torch.testing.assert_close(by_number, found, rtol=0, atol=0)


@needs_device
def test_what_a_file_brings_is_there_for_other_streams(tmp_path):
    random, of = numbers(), layer()
    host, device = caches = twins("fp16")
    append(caches, tokens_of(random, 1, of, 6000))
    path, queries = tmp_path / "cache", tokens_of(random, 1, of, 1)[2]
    host.save(path)
    expected, stream = device.attend(queries.to(DEVICE)), torch.cuda.Stream()
    for _ in range(5):
        cache = kvplane.Cache([of], "fp16", device=DEVICE)
        with torch.cuda.stream(stream):
            there_queries = queries.to(DEVICE)
            stream.synchronize()
            cache.load(path)  # before any call that is given a stream
            found = cache.attend(there_queries)
            stream.synchronize()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_device
def test_a_stream_that_is_captured_is_refused():
    random, of = numbers(), layer()
    cache = kvplane.Cache([of], "standard", device=DEVICE)
    keys, values, queries = there(tokens_of(random, 1, of, 40))
    cache.append(keys, values)
    out = cache.attend(queries[:, :, -1:])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with refused(pytest, "option", "captured in a CUDA graph"):
            cache.append(keys, values)
        with refused(pytest, "option", "captured in a CUDA graph"):
            cache.attend(queries[:, :, -1:], out=out)
    assert cache.tokens() == [40]
    cache.append(keys, values)
    assert cache.tokens() == [80]


@needs_device
def test_drafts_of_other_strides_are_refused_before_anything_changes():
    random, of = numbers(), layer()
    cache = kvplane.Cache([of], "standard", device=DEVICE)
    keys, values, _ = there(tokens_of(random, 1, of, 30))
    apart = keys.transpose(2, 3).contiguous().transpose(2, 3)
    for wrong, words in ((apart, ["channels are 30 apart", "neighbours"]),
                         (keys[:, :, :1].expand(-1, -1, 30, -1), ["0 numbers apart", "64 or more"])):
        with refused(pytest, "shape", "keys: provisional tokens", *words):
            cache.append(wrong, values, provisional=True)
        with refused(pytest, "shape", "values: provisional tokens", *words):
            cache.append(keys, wrong, provisional=True)
    assert cache.tokens() == [0]
    cache.append(apart, values)
    assert cache.tokens() == [30]


@needs_device
def test_read_policies():
    random, of = numbers(), layer()
    cache = kvplane.Cache([of], "key_favored:8:8", device=DEVICE)
    cache.append(*there(tokens_of(random, 1, of, 3000)))
    queries = tokens_of(random, 1, of, 1)[2].to(DEVICE)
    all_bits, some = cache.attend(queries), cache.attend(queries, read="tolerance=0.05")
    assert not torch.equal(all_bits, some)
    values = np.linalg.norm(heads_of(cache.stored_values(), 2), axis=-1).max()
    assert (all_bits - some).norm(dim=-1).max() <= 0.06 * values
    with refused(pytest, "option", "'fixed2'", "tolerance"):
        cache.attend(queries, read="fixed2")
    with refused(pytest, "option", "read policy 'nonsense'"):
        cache.attend(queries, read="nonsense")


@needs_device
@pytest.mark.parametrize("kind", ["latent", "shaped"])
def test_policies(kind, tmp_path):
    from small_model import HEAD_DIM, KV_HEADS, LAYERS, NAME, POLICIES, QUERY_HEADS, ROPE_BASE
    rope = kvplane.Rope(ROPE_BASE, halves=False)
    layers = [kvplane.Layer(kv_heads=KV_HEADS, query_heads=QUERY_HEADS, head_dim=HEAD_DIM, rope=rope)] * LAYERS
    how = dict(policy=kvplane.Policy.load(POLICIES[kind]), model=NAME, batch=2)
    host, device = caches = kvplane.Cache(layers, **how), kvplane.Cache(layers, device=DEVICE, **how)
    random = numbers()
    for count in (140, 1, 300):
        for i in range(LAYERS):
            append(caches, tokens_of(random, 2, layers[0], count), layer=i)
    assert saved(device, tmp_path) == saved(host, tmp_path)
    for count in (1, 20):
        queries = tokens_of(random, 2, layers[0], count)[2]
        for i in range(LAYERS):
            expect_attention(device, queries, device.attend(queries.to(DEVICE), layer=i), layer=i)


@needs_device
def test_what_a_device_does_not_serve_is_refused():
    for recipe, why in (("block32:8", "grids of keys by token"), ("svdq:2", "before RoPE"),
                        ("latent:3:3+heads_together=1", "256 latents")):
        with refused(pytest, "option", f"recipe '{recipe}'", "'cuda:0'", why, "standard"):
            kvplane.Cache([layer(kv_heads=8, query_heads=8)], recipe, device=DEVICE)
    for of in (layer(head_dim=20), layer(head_dim=512), layer(value_head_dim=12)):
        for recipe in ("fp16", "latent:3:3"):
            with refused(pytest, "option", "channels", "multiple of 8 up to 256"):
                kvplane.Cache([of], recipe, device=DEVICE)


@needs_device
def test_tensors_that_do_not_fit_are_refused(tmp_path):
    random, of = numbers(), layer()
    host, cache = caches = twins("standard", batch=2)
    append(caches, tokens_of(random, 2, of, 200))
    before = saved(cache, tmp_path)
    on_cpu = tokens_of(random, 2, of, 150)
    keys, values, queries = there(on_cpu)
    wrong = [(on_cpu[0], values, "option", ["keys", "on device 'cpu'", "'cuda:0'"]),
             (keys, on_cpu[1], "option", ["values", "on device 'cpu'", "'cuda:0'"]),
             (keys.cpu().numpy(), values, "option", ["keys", "'cpu'", "'cuda:0'"]),
             (keys.double(), values, "option", ["keys", "torch.float64", "float32, float16 or bfloat16"]),
             (keys.float().requires_grad_(), values, "option", ["keys", "gradient"]),
             (keys.to_sparse(), values, "option", ["keys"]),
             ([1, 2], values, "option", ["keys", "list", "'cuda:0'"]),
             (keys[:1], values, "shape", ["keys", "batch 1", "batch 2"]),
             (keys, values[:, :, :3], "shape", ["values", "3 tokens", "150"]),
             (keys[..., :32], values, "shape", ["keys", "32 channels"])]
    for bad, code in ((float("nan"), "not finite"), (float("inf"), "not finite"), (1e6, "beyond fp16")):
        for sequence_, side in ((0, 0), (1, 1), (1, 0)):
            one = [keys.float(), values.float()]
            one[side][sequence_, 1, 100, 7] = bad
            wrong.append((*one, code, ["keys" if side == 0 else "values", "token 100"]))
    for k, v, code, words in wrong:
        with refused(pytest, code, *words):
            cache.append(k, v)
        assert cache.tokens() == [200, 200] and saved(cache, tmp_path) == before
    for change, code, words in ((dict(queries=queries.cpu()), "option", ["queries", "'cpu'", "'cuda:0'"]),
                                (dict(out=torch.zeros(2, 6, 150, 64)), "option", ["out", "'cpu'", "'cuda:0'"]),
                                (dict(out=torch.zeros(2, 6, 149, 64, device=DEVICE)), "shape", ["out", "149"]),
                                (dict(out=torch.zeros(2, 6, 150, 128, device=DEVICE)[..., ::2]), "shape",
                                 ["out", "neighbours"]),
                                (dict(sink_logits=[0.0] * 5), "shape", ["5 sink logits", "6"]),
                                (dict(sink_logits="six"), "option", ["sink_logits", "str"]),
                                (dict(queries=torch.zeros(2, 6, 201, 64, device=DEVICE)), "shape",
                                 ["201 tokens", "sequence 0", "200"])):
        with refused(pytest, code, *words):
            cache.attend(**{"queries": queries, **change})
    append(caches, tokens_of(random, 2, of, 150))
    assert saved(cache, tmp_path) == saved(host, tmp_path)


@needs_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_two_devices():
    random, of = numbers(), layer()
    tensors = tokens_of(random, 1, of, 300)
    caches = [kvplane.Cache([of], "standard", device=f"cuda:{i}") for i in (0, 1)]
    with refused(pytest, "option", "keys", "on device 'cuda:1'", "expected 'cuda:0'"):
        caches[0].append(*(x.to("cuda:1") for x in tensors))
    for i, cache in enumerate(caches):
        cache.append(*(x.to(f"cuda:{i}") for x in tensors))
    outputs = [cache.attend(tensors[2][:, :, -1:].to(f"cuda:{i}")).cpu() for i, cache in enumerate(caches)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert torch.cuda.current_device() == 0


# transformers --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tt():
    """The models and helpers of test_transformers.py."""
    pytest.importorskip("transformers")
    import test_transformers
    return test_transformers


FAMILIES = ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt_oss"]


def cuda_model(tt, family):
    return tt.model_of(family).to(DEVICE)


@needs_device
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exact_prompt", [True, False])
def test_logits_of_fp16_are_those_of_dynamic_cache(tt, family, exact_prompt):
    model, ids, chunks = cuda_model(tt, family), tt.prompt(2, 320).to(DEVICE), [250, 1, 1, 1, 60, 1, 6]
    expected = tt.logits(tt.own(model), tt.DynamicCache(config=model.config), ids, chunks)
    cache = tt.kt.Cache(tt.on(model, tt.kt.ATTENTION), "fp16", exact_prompt=exact_prompt)
    assert cache.device == torch.device(DEVICE)
    found = tt.logits(model, cache, ids, chunks)
    off, size = (found - expected).abs().max(), expected.abs().max()
    assert 0 < off < 1e-2 * max(1, size / 10), f"{off} of {size}"


@needs_device
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_beams_and_padding_choose_the_same_tokens(tt, family):
    model, ids = cuda_model(tt, family), tt.prompt(2, 150, seed=4 if family == "gpt_oss" else 3).to(DEVICE)
    mask = tt.padded(ids, [0, 33])
    for way in ({}, dict(num_beams=3), dict(attention_mask=mask), dict(attention_mask=mask, num_beams=2)):
        outputs = []
        for implementation in ("own", tt.kt.ATTENTION):
            if implementation == "own":
                made = tt.DynamicCache(config=tt.own(model).config)
            else:
                made = tt.kt.Cache(tt.on(model, tt.kt.ATTENTION), "fp16")
            outputs.append(model.generate(ids, past_key_values=made, **{"attention_mask": torch.ones_like(ids), **way}))
        torch.testing.assert_close(*outputs, rtol=0, atol=0, msg=str(way))
        assert way.get("num_beams") or made._cache.tokens() == ([189, 156] if "attention_mask" in way else [189] * 2)


@needs_device
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_assisted_decoding_chooses_the_tokens_of_greedy(tt, family):
    model, assistant = cuda_model(tt, family), tt.own(cuda_model(tt, "llama"))
    ids = tt.prompt(1, 30).repeat(1, 6).to(DEVICE)
    expected = tt.own(model).generate(ids, attention_mask=torch.ones_like(ids),
                                      past_key_values=tt.DynamicCache(config=model.config))
    for way in (dict(prompt_lookup_num_tokens=6), dict(assistant_model=assistant)):
        cache = tt.kt.Cache(tt.on(model, tt.kt.ATTENTION), "fp16")
        found = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **way)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=str(way))
        assert cache.records_past and cache._cache.provisional_tokens() == [0]


@needs_device
@pytest.mark.parametrize("recipe", ["standard", "latent:4:4", "smallest"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logits_of_recipes_are_those_of_the_cpu(tt, family, recipe):
    """The same model, on the device and on the CPU: with the prompt and with 60 tokens behind it, through the first
    tokens, in which latents are learned on the CPU, to tiles on the device."""
    ids, chunks = tt.prompt(2, 760), [400, 1, 200, 99] + [1] * 60
    model = tt.on(tt.model_of(family), tt.kt.ATTENTION)
    expected = tt.logits(model, tt.kt.Cache(model, recipe), ids, chunks)
    cache = tt.kt.Cache(model.to(DEVICE), recipe)
    found = tt.logits(model, cache, ids.to(DEVICE), chunks).cpu()
    assert not cache._cache.needs_queries(1) and cache.device.type == "cuda"
    # Codes at the border of two cells may fall into either where inputs differ in their last bits.
    off = (found - expected).abs()
    assert off.mean() < 3e-3 * expected.abs().max() and off.max() < 0.1 * expected.abs().max()


@needs_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(tt, dtype):
    model, ids = cuda_model(tt, "llama").to(dtype), tt.prompt(2, 200).to(DEVICE)
    expected = tt.logits(tt.own(model), tt.DynamicCache(config=model.config), ids, [190, 1, 9])
    found = tt.logits(tt.on(model, tt.kt.ATTENTION), tt.kt.Cache(model, "fp16"), ids, [190, 1, 9])
    assert found.dtype == dtype
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


@needs_device
def test_crop_forks_and_files(tt, tmp_path):
    model, ids = tt.on(cuda_model(tt, "gemma3"), tt.kt.ATTENTION), tt.prompt(2, 400).to(DEVICE)
    cache, same = tt.kt.Cache(model, "standard"), tt.kt.Cache(model.config, "standard", exact_prompt=True)
    mask = tt.padded(ids, [0, 5])
    more, longer = tt.prompt(2, 30, seed=4).to(DEVICE), torch.ones(2, 430, dtype=torch.long, device=DEVICE)
    longer[1, :5] = 0
    with torch.no_grad():
        for one in (cache, same):
            model(ids, attention_mask=mask, past_key_values=one)
        assert same.device == torch.device(DEVICE)  # it went where the keys were
        cache.activate_past_recording()
        model(more, attention_mask=longer, past_key_values=cache)
        cache.crop(-30)
        cache.save(tmp_path / "cache")
        caches = [cache, same, cache.fork(), tt.kt.Cache.load(tmp_path / "cache", model, "standard")]
        outputs = [model(more, attention_mask=longer, past_key_values=c).logits for c in caches]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@needs_device
def test_a_failed_call_can_be_taken_back(tt):
    model, ids = tt.on(cuda_model(tt, "llama"), tt.kt.ATTENTION), tt.prompt(1, 50).to(DEVICE)
    cache, same = tt.kt.Cache(model, "standard", check=True), tt.kt.Cache(model, "standard")
    tt.logits(model, cache, ids, [50])
    tt.logits(model, same, ids, [50])
    weight = model.model.layers[1].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(1e30)
        with refused(pytest, "beyond fp16", "values"):
            model(tt.prompt(1, 5).to(DEVICE), past_key_values=cache)
        weight.copy_(kept)
    assert cache._cache.tokens(0) == [55] and cache._cache.tokens(1) == [50]
    with refused(pytest, "option", "layer 0 holds 55 tokens, layer 1 50", "truncate(50)"), torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    cache.truncate(50)
    torch.testing.assert_close(tt.logits(model, cache, ids, [1]), tt.logits(model, same, ids, [1]), rtol=0, atol=0)


@needs_device
def test_other_devices_are_refused(tt):
    model, ids = tt.on(cuda_model(tt, "llama"), tt.kt.ATTENTION), tt.prompt(1, 9)
    cache = tt.kt.Cache(model, "fp16")
    with torch.no_grad():
        model(ids.to(DEVICE), past_key_values=cache)
        with refused(pytest, "option", "keys of layer 0", "on device 'cpu'", "expected 'cuda:0'", "several devices"):
            cache.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32), 0)
    with refused(pytest, "option", "recipe 'block32:8'", "'cuda:0'", "grids of keys by token"):
        tt.kt.Cache(model, "block32:8")
    with refused(pytest, "option", "recipe 'block32:8'", "'cuda:0'"):
        tt.kt.Cache(model.config, "block32:8").update(*(torch.zeros(1, 2, 3, 32, device=DEVICE),) * 2, 0)
    with refused(pytest, "option", "'fixed2'"):
        tt.kt.Cache(model, "standard", read="fixed2")


@needs_device
def test_a_step_of_decoding_waits_once(tt):
    """For the attention mask, if there is one; the rest of a step is started and not waited for."""
    model, ids = tt.on(cuda_model(tt, "llama"), tt.kt.ATTENTION), tt.prompt(2, 150).to(DEVICE)
    cache = tt.kt.Cache(model, "standard")
    with torch.no_grad():
        tt.logits(model, cache, ids, [148, 1])
        torch.cuda.set_sync_debug_mode("error")  # torch's own calls that wait raise
        try:
            model(ids[:, -1:], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache._cache.tokens() == [150, 150]
