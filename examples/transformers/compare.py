#!/usr/bin/env python3
"""KV caches of transformers side by side on real models: true bits, perplexity, KL divergence, speed, memory.

A prompt goes through the model at once, then the next tokens in chunks of 32; predictions of these are compared with
those over the unquantized cache. Then a few tokens are decoded one by one, a step of every cache in turn, so that what
else the machine does meets all of them.
"""
from __future__ import annotations

import argparse
import gc
import json
import math
import pathlib
import statistics
import sys
import time

import torch
import transformers
from transformers import DynamicCache, QuantizedCache

import kvplane
import kvplane.transformers

HERE = pathlib.Path(__file__).resolve().parent
TEXT = HERE / "../data/northanger_abbey.txt"
CHUNK = 32
PREDICTIONS = 96  # with the decoded tokens fewer than QuantizedCache holds back until it quantizes everything anew
STEPS = 24


def tensors_of(thing, found):
    """All torch tensors in a cache's layer, those inside tensors of optimum-quanto and HQQ too, by their memory."""
    if isinstance(thing, torch.Tensor):
        if hasattr(thing, "__tensor_flatten__") and type(thing) is not torch.Tensor:
            for name in thing.__tensor_flatten__()[0]:
                tensors_of(getattr(thing, name), found)
        elif thing.numel() > 0:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for value in thing.values():
            tensors_of(value, found)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            tensors_of(value, found)
    return found


class Kind:
    """A kind of cache, its attention implementation, and what it takes."""

    def __init__(self, name, attention, make):
        self.name, self.attention, self.make = name, attention, make

    def begin(self, model):
        model.set_attn_implementation(self.attention)
        self.cache, self.divergence, self.loss, self.seconds, self.peak = self.make(model.config), [], [], [], 0
        if not isinstance(self.cache, kvplane.transformers.Cache):
            self._watch()
        return self

    def _watch(self):
        """Counts the floats that update() makes of a layer, beside what is stored."""
        update = self.cache.update

        def watched(keys, values, layer, *arguments, **options):
            all_keys, all_values = update(keys, values, layer, *arguments, **options)
            stored = tensors_of([vars(self.cache.layers[layer])], {})
            self.made = max(self.made, sum(x.untyped_storage().nbytes() for x in (all_keys, all_values)
                                           if x.untyped_storage().data_ptr() not in stored))
            return all_keys, all_values
        self.cache.update = watched

    def run(self, model, ids, keep):
        model.set_attn_implementation(self.attention)
        self.made = 0
        logits = model(ids, cache=self.cache, logits_to_keep=keep).logits[0]
        # A prompt is attended to as floats, whatever the cache.
        self.peak = max(self.peak, self.bytes() + (self.made if ids.shape[1] <= CHUNK else 0))
        return logits

    def bytes(self):
        if isinstance(self.cache, kvplane.transformers.Cache):
            return self.cache.bytes
        return sum(tensors_of([vars(layer) for layer in self.cache.layers], {}).values())

    def bits(self, config):
        elements = 0
        for layer in kvplane.transformers.layers_of(config):
            tokens = self.cache.get_seq_length()
            elements += layer.kv_heads * (layer.head_dim + layer.value_head_dim) * (
                min(tokens, layer.sliding_window) if layer.sliding_window else tokens)
        return 8 * self.bytes() / elements


def kinds():
    yield Kind("DynamicCache, float32", "sdpa", lambda config: DynamicCache(config=config))
    # The axes that transformers' documentation recommends for each backend.
    for backend, axis in (("quanto", 0), ("hqq", 1)):
        for bits in (4, 2):
            yield Kind(f"QuantizedCache {backend}, {bits} bits", "sdpa",
                       lambda config, backend=backend, axis=axis, bits=bits: QuantizedCache(
                           backend, config, nbits=bits, axis_key=axis, axis_value=axis))
    # key_favored:6:4 takes as many bits as QuantizedCache with 4.
    for recipe in ("key_favored:6:4", "standard", "compact", "smallest", "latent:3:3"):
        yield Kind(f"kvplane `{recipe}`", "kvplane",
                   lambda config, recipe=recipe: kvplane.transformers.Cache(config, recipe))


def compare(model, tokens, bos, context, windows, wanted, report):
    """One model at one context. Prints a row for each kind of cache."""
    chosen, refused = [], []
    for kind in kinds():
        if wanted and "DynamicCache" not in kind.name and not any(word in kind.name for word in wanted):
            continue
        try:
            chosen.append(kind.begin(model))
        except Exception as error:  # a backend that is not installed, a model that it does not take
            refused.append((kind.name, " ".join(str(error).split())))
    results = {kind.name: {"kl": [], "loss": []} for kind in chosen}
    for window in range(windows):
        first = window * context
        ids = torch.tensor([bos + tokens[first:first + context - len(bos) + STEPS]])
        prompt = context - PREDICTIONS
        for kind in list(chosen):
            kind.begin(model)
            begun = time.monotonic()
            try:
                kind.run(model, ids[:, :prompt], 1)
            except Exception as error:
                refused.append((kind.name, " ".join(str(error).split())))
                chosen.remove(kind)
                continue
            report(f"{kind.name}: prompt of {prompt} in {time.monotonic() - begun:.0f} s")
        for at in range(prompt, context, CHUNK):
            targets = ids[0, at + 1:at + CHUNK + 1]
            exact = None
            for kind in chosen:
                guess = torch.log_softmax(kind.run(model, ids[:, at:at + CHUNK], CHUNK).double(), -1)
                exact = guess if exact is None else exact
                results[kind.name]["kl"] += (exact.exp() * (exact - guess)).sum(-1).clamp(min=0).tolist()
                results[kind.name]["loss"] += (-guess.gather(1, targets[:, None])[:, 0]).tolist()
    rows = []
    for kind in chosen:
        kind.true_bits = kind.bits(model.config)
    for step in range(STEPS):
        for kind in chosen:
            token = ids[:, context + step - 1:context + step]
            begun = time.perf_counter(), time.process_time()
            kind.run(model, token, 1)
            kind.seconds.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    for kind in chosen:
        of = results[kind.name]
        rows.append({"cache": kind.name, "context": context, "bits": kind.true_bits,
                     "perplexity": math.exp(statistics.mean(of["loss"])), "kl": statistics.mean(of["kl"]),
                     "predictions": len(of["kl"]),
                     "tokens_per_second": 1 / statistics.median(wall for wall, _ in kind.seconds[2:]),
                     "tokens_per_cpu_second": 1 / statistics.median(cpu for _, cpu in kind.seconds[2:]),
                     "peak_mb": kind.peak / 1e6})
    return rows, refused


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path, help="GGUF files")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--windows", type=int, default=2, help="contexts of the text that are averaged over")
    parser.add_argument("--only", nargs="+", default=[], help="words of the caches' names; standard: all")
    parser.add_argument("--threads", type=int, default=0, help="of torch and of kvplane; 0: torch's own choice")
    parser.add_argument("--json", type=pathlib.Path, help="also writes all numbers there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = TEXT.read_text(encoding="utf8")
    everything = {}

    def report(line):
        print(f"  {line}", file=sys.stderr, flush=True)

    for path in options.models:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                                  dtype=torch.float32).eval()
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = [tokenizer.bos_token_id] if model.config.model_type.startswith("gemma") else []
        rows, refused = [], {}
        with torch.inference_mode():
            for context in options.contexts:
                report(f"{path.name}, {context} tokens")
                more, not_served = compare(model, tokens, bos, context, options.windows, options.only, report)
                rows += more
                refused.update(not_served)
                gc.collect()
        everything[path.name] = {"rows": rows, "refused": refused}
        print(f"\n{path.name}: perplexity and KL divergence of {rows[0]['predictions']} predictions at each context, "
              f"tokens a second and memory at {options.contexts[-1]}, on {torch.get_num_threads()} threads\n")
        by = {(row["cache"], row["context"]): row for row in rows}
        columns = [f"bits at {c} | perplexity | KL" for c in options.contexts]
        print("| cache | " + " | ".join(columns) + " | tokens/s | tokens/CPU s | peak MB |")
        print("|" + "---|" * (3 * len(options.contexts) + 4))
        for name in dict.fromkeys(row["cache"] for row in rows):
            cells = [name]
            for context in options.contexts:
                row = by.get((name, context))
                cells += [f"{row['bits']:.2f}", f"{row['perplexity']:.3f}", f"{row['kl']:.5f}"] if row else [""] * 3
            last = by.get((name, options.contexts[-1]))
            measured = ("tokens_per_second", "tokens_per_cpu_second", "peak_mb")
            cells += [f"{last[x]:.1f}" if last else "" for x in measured]
            print("| " + " | ".join(cells) + " |")
        for reason in dict.fromkeys(refused.values()):
            names = ", ".join(name for name, why in refused.items() if why == reason)
            print(f"\nNOT MEASURED: {names}: {reason}")
        sys.stdout.flush()
        del model
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
