"""examples/transformers/compare.py on a small model with random weights."""
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from support import REPOSITORY
from test_transformers import model_of, prompt
from transformers import DynamicCache

import kvplane.transformers as kt

sys.path.insert(0, str(REPOSITORY / "examples/transformers"))
import compare


def measured(kinds, tokens=300, decoded=140):
    comparison = compare.Comparison(model_of("llama"), kinds)
    with torch.inference_mode():
        comparison.window(prompt(1, tokens + 1), tokens - decoded)
    return comparison, {kind.name: kind.row(tokens) for kind in comparison.chosen}


def kind(name, recipe=None, fails_at=None):
    """A kind of cache, of which nothing is there from the token on that comes at `fails_at`."""
    def make(config):
        if fails_at == 0:
            raise ImportError("no such backend")
        cache = kt.Cache(config, recipe) if recipe else DynamicCache(config=config)
        update = cache.update

        def failing(keys, values, layer, *arguments, **options):
            if fails_at and cache.get_seq_length() + keys.shape[2] > fails_at:
                raise RuntimeError(f"ended\nat {fails_at}")
            return update(keys, values, layer, *arguments, **options)
        cache.update = failing
        return cache
    return compare.Kind(name, kt.ATTENTION if recipe else "sdpa", make)


def test_what_fails_is_left_out_and_the_rest_goes_on(capfd):
    comparison, rows = measured([kind("exact"), kind("same"), kind("absent", fails_at=0),
                                 kind("long prompt", "standard", fails_at=100),
                                 kind("later", "standard", fails_at=200), kind("good", "standard")])
    assert list(rows) == ["exact", "same", "good"]
    assert comparison.refused == {"absent": "no such backend", "long prompt": "ended at 100", "later": "ended at 200"}
    assert rows["exact"]["kl"] == 0 and rows["same"]["kl"] < 1e-9 < rows["good"]["kl"] < 1
    for row in rows.values():
        assert row["predictions"] == 140 and row["tokens_per_cpu_second"] > 0 and row["peak_mb"] > 0
        assert row["longest_step"] >= 1 / row["tokens_per_cpu_second"]
    assert abs(rows["exact"]["bits"] - 32) < 1e-6 and 4 < rows["good"]["bits"] < 10
    said = capfd.readouterr().err
    for line in ("exact: a prompt of 160 tokens ...", "decoded 140 of 140 tokens with each of 3 caches, 0 s left",
                 "later: left out, ended at 200"):
        assert line in said
    compare.print_table("title", list(rows.values()), comparison.refused, [300])
    printed = capfd.readouterr().out
    assert "| good | " in printed and "NOT MEASURED: later: ended at 200" in printed


def test_nothing_is_compared_where_the_first_fails():
    with pytest.raises(RuntimeError, match="at 200"):
        measured([kind("exact", fails_at=200), kind("good", "standard")])


def test_quantized_caches_are_measured_over_what_they_quantize_anew():
    pytest.importorskip("hqq")
    chosen = [k for k in compare.kinds([], "") if k.name in ("DynamicCache, float32", "QuantizedCache hqq, 4 bits")]
    _, rows = measured(chosen, tokens=400, decoded=2 * compare.PERIOD)
    row, cache = rows["QuantizedCache hqq, 4 bits"], chosen[1].cache
    # After 256 tokens, none of them are floats any more.
    assert cache.layers[0].keys.numel() == 0 and cache.get_seq_length() == 400
    assert row["longest_step"] > 2 / rows["DynamicCache, float32"]["tokens_per_cpu_second"]
    assert 4 < row["bits"] < 32 and 0 < row["kl"] < 1


def test_bad_options_are_refused(capsys, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    for options, words in (([tmp_path / "nothing"], "no such file"),
                           ([model, "--only", "nothing"], "'nothing' is in no name"),
                           ([model, "--policy", tmp_path / "nothing"], "no such file"),
                           ([model, "--windows", 0], "at least 1"),
                           ([model, "--contexts", 256], "more than the 256 tokens of --decode")):
        with pytest.raises(SystemExit) as refused:
            compare.options_of([str(option) for option in options])
        assert refused.value.code == 2 and words in capsys.readouterr().err
    assert compare.options_of([str(model), "--only", "standard"]).contexts == [2048, 4096]
