#!/usr/bin/env python3
"""KV caches of transformers side by side on real models: true bits, perplexity, KL divergence, speed, memory.

A prompt goes through the model at once, then tokens are decoded one by one, a step of every cache in turn, so that what
else the machine does meets all of them. Predictions of these tokens are compared with those over the unquantized cache.
QuantizedCache quantizes everything anew every 128 tokens, and kvplane makes a page of 128 tokens: so bits and speed are
averages over the last 128 steps, which have one such step of each.
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

try:
    import gguf
    import torch
    import transformers
    from transformers import DynamicCache, QuantizedCache

    import kvplane
    import kvplane.transformers
    missing = None
except ImportError as error:  # --help takes none of them
    missing = error

HERE = pathlib.Path(__file__).resolve().parent
TEXT = HERE / "../data/northanger_abbey.txt"
PERIOD = 128  # QuantizedCache's residual_length, and kvplane's tokens of a page


def say(line):
    print(f"  {line}", file=sys.stderr, flush=True)


def clocks():
    """Seconds, and seconds of CPU time."""
    return time.perf_counter(), time.process_time()


class Timed:
    """Says what begins, and on the same line how long it took."""

    def __init__(self, line):
        print(f"  {line} ...", end="", file=sys.stderr, flush=True)
        self.begun = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        print(" failed" if kind else f" {time.monotonic() - self.begun:.1f} s", file=sys.stderr, flush=True)


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
        self.divergence, self.loss, self.bits, self.seconds, self.peak = [], [], [], [], 0

    def begin(self, model):
        model.set_attn_implementation(self.attention)
        self.cache = self.make(model.config)
        if not isinstance(self.cache, kvplane.transformers.Cache):
            self._watch()

    def _watch(self):
        """Counts the floats that update() makes of a layer, beside what is stored; counting is not timed."""
        update = self.cache.update

        def watched(keys, values, layer, *arguments, **options):
            all_keys, all_values = update(keys, values, layer, *arguments, **options)
            begun = clocks()
            stored = tensors_of([vars(self.cache.layers[layer])], {})
            self.made = max(self.made, sum(x.untyped_storage().nbytes() for x in (all_keys, all_values)
                                           if x.untyped_storage().data_ptr() not in stored))
            self.counting = [sum_ + end - begin for sum_, end, begin in zip(self.counting, clocks(), begun)]
            return all_keys, all_values
        self.cache.update = watched

    def prefill(self, model, ids):
        model.set_attn_implementation(self.attention)
        self.made, self.counting = 0, (0.0, 0.0)
        model(ids, cache=self.cache, logits_to_keep=1)
        self.peak = max(self.peak, self.bytes())  # a prompt is attended to as floats, whatever the cache

    def decode(self, model, ids):
        """Log-probabilities of the next token."""
        model.set_attn_implementation(self.attention)
        self.made, self.counting, begun = 0, (0.0, 0.0), clocks()
        logits = model(ids, cache=self.cache, logits_to_keep=1).logits[0, -1]
        self.seconds.append([end - begin - not_timed for end, begin, not_timed in zip(clocks(), begun, self.counting)])
        held = self.bytes()
        self.peak = max(self.peak, held + self.made)
        self.bits.append(8 * held / self.elements(model.config))
        return torch.log_softmax(logits.double(), -1)

    def bytes(self):
        if isinstance(self.cache, kvplane.transformers.Cache):
            return self.cache.bytes
        return sum(tensors_of([vars(layer) for layer in self.cache.layers], {}).values())

    def elements(self, config):
        count, tokens = 0, self.cache.get_seq_length()
        for layer in kvplane.transformers.layers_of(config):
            count += layer.kv_heads * (layer.head_dim + layer.value_head_dim) * (
                min(tokens, layer.sliding_window) if layer.sliding_window else tokens)
        return count

    def row(self, context):
        """What was measured, as a line of the table."""
        period = range(max(0, len(self.seconds) - PERIOD), len(self.seconds))
        wall, cpu = (statistics.fmean(self.seconds[i][clock] for i in period) for clock in (0, 1))
        return {"cache": self.name, "context": context, "bits": statistics.fmean(self.bits[i] for i in period),
                "perplexity": math.exp(statistics.fmean(self.loss)), "kl": statistics.fmean(self.divergence),
                "predictions": len(self.divergence), "tokens_per_second": 1 / wall, "tokens_per_cpu_second": 1 / cpu,
                "longest_step": max(self.seconds[i][1] for i in period), "peak_mb": self.peak / 1e6}


def kinds(policies, model_name):
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
    for path in policies:
        yield Kind(f"kvplane policy `{path.name}`", "kvplane",
                   lambda config, path=path: kvplane.transformers.Cache(config, policy=path, name=model_name))


class Comparison:
    """Kinds of caches on one model at one context; the first of them is what the others are compared with. What fails
    is left out from there on, with the reason in `refused`."""

    def __init__(self, model, chosen):
        self.model, self.chosen, self.refused = model, chosen, {}

    def attempt(self, kind, call):
        """call(), or None and one kind less."""
        try:
            return call()
        except Exception as error:  # a backend that is not installed, a model that it does not take, a bug in it
            if kind is self.chosen[0]:
                raise
            self.refused[kind.name] = " ".join(str(error).split()) or type(error).__name__
            self.chosen = [other for other in self.chosen if other is not kind]
            say(f"{kind.name}: left out, {self.refused[kind.name]}")
            return None

    def window(self, ids, prompt):
        def prefill(kind):
            kind.begin(self.model)
            with Timed(f"{kind.name}: a prompt of {prompt} tokens"):
                kind.prefill(self.model, ids[:, :prompt])
        for kind in self.chosen:
            self.attempt(kind, lambda: prefill(kind))
        steps, begun = ids.shape[1] - 1 - prompt, time.monotonic()
        for step in range(steps):
            at, exact = prompt + step, None
            target = ids[0, at + 1]
            for kind in self.chosen:
                guess = self.attempt(kind, lambda: kind.decode(self.model, ids[:, at:at + 1]))
                if guess is None:
                    continue
                exact = guess if exact is None else exact
                kind.divergence.append(max(0.0, float((exact.exp() * (exact - guess)).sum())))
                kind.loss.append(float(-guess[target]))
            if (step + 1) % 32 == 0 or step in (0, steps - 1):
                took = (time.monotonic() - begun) / (step + 1)
                say(f"decoded {step + 1} of {steps} tokens with each of {len(self.chosen)} caches, "
                    f"{took * (steps - step - 1):.0f} s left")


def compare(model, path, tokens, bos, options):
    """One model at all contexts: rows of the table, and of what was not measured the reasons."""
    rows, refused = [], {}
    for context in options.contexts:
        chosen = [kind for kind in kinds(options.policy, name_in(path))
                  if not options.only or "DynamicCache" in kind.name or any(w in kind.name for w in options.only)]
        comparison = Comparison(model, chosen)
        for window in range(options.windows):
            say(f"{path.name}, {context} tokens" + (f", window {window + 1} of {options.windows}" if
                                                     options.windows > 1 else ""))
            first = window * context
            ids = torch.tensor([bos + tokens[first:first + context + 1 - len(bos)]])
            comparison.window(ids, context - options.decode)
        rows += [kind.row(context) for kind in comparison.chosen]
        refused.update(comparison.refused)
        del comparison, chosen
        gc.collect()
    return rows, refused


def print_table(title, rows, refused, contexts):
    print(f"\n{title}\n")
    by = {(row["cache"], row["context"]): row for row in rows}
    columns = [f"bits at {c} | perplexity | KL" for c in contexts]
    print("| cache | " + " | ".join(columns) + " | tokens/s | tokens/CPU s | longest step, ms | peak MB |")
    print("|" + "---|" * (3 * len(contexts) + 5))
    for name in dict.fromkeys(row["cache"] for row in rows):
        cells = [name]
        for context in contexts:
            row = by.get((name, context))
            cells += [f"{row['bits']:.2f}", f"{row['perplexity']:.2f}", f"{row['kl']:.5f}"] if row else [""] * 3
        last = by.get((name, contexts[-1]))
        cells += [f"{last['tokens_per_second']:.1f}", f"{last['tokens_per_cpu_second']:.1f}",
                  f"{1000 * last['longest_step']:.0f}", f"{last['peak_mb']:.1f}"] if last else [""] * 4
        print("| " + " | ".join(cells) + " |")
    for reason in dict.fromkeys(refused.values()):
        names = ", ".join(name for name, why in refused.items() if why == reason)
        print(f"\nNOT MEASURED: {names}: {reason}")
    sys.stdout.flush()


def name_in(path):
    """The model's name as its GGUF file has it, which policies are for."""
    field = gguf.GGUFReader(path).get_field("general.name")
    return field.contents() if field else "unnamed"


def options_of(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path, help="GGUF files")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096], help="tokens, the prompt included")
    parser.add_argument("--decode", type=int, default=2 * PERIOD, help="how many of these are decoded one by one")
    parser.add_argument("--windows", type=int, default=1, help="contexts of the text that are averaged over")
    parser.add_argument("--only", nargs="+", default=[], help="words of the caches' names; standard: all")
    parser.add_argument("--policy", nargs="+", type=pathlib.Path, default=[],
                        help="files of the engine's program `tune`, also to be measured")
    parser.add_argument("--threads", type=int, default=0, help="of torch and of kvplane; 0: torch's own choice")
    parser.add_argument("--json", type=pathlib.Path, help="also writes all numbers there")
    options = parser.parse_args(arguments)
    for path in options.models + options.policy:
        if not path.is_file():
            parser.error(f"'{path}': no such file")
    names = [kind.name for kind in kinds(options.policy, "")]
    for word in options.only:
        if not any(word in name for name in names):
            parser.error(f"--only: '{word}' is in no name; there are: {', '.join(names)}")
    if options.windows < 1 or options.decode < 1 or options.threads < 0:
        parser.error("--windows and --decode: expected at least 1, --threads: at least 0")
    if min(options.contexts) <= options.decode:
        parser.error(f"--contexts: {min(options.contexts)}, expected more than the {options.decode} tokens of --decode")
    return options


def main():
    options = options_of(sys.argv[1:])
    if missing:
        sys.exit(f"compare.py: {missing}; expected the environment that `bash examples/run.sh transformers` sets up")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = TEXT.read_text(encoding="utf8")
    everything = {}
    for path in options.models:
        with Timed(f"{path.name}: the tokenizer and the text"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        say(f"{path.name}: the model")
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                                  dtype=torch.float32).eval()
        needed = options.windows * max(options.contexts) + 1
        if len(tokens) < needed:
            sys.exit(f"--windows: the text has {len(tokens)} tokens, expected at least {needed}")
        bos = [tokenizer.bos_token_id] if model.config.model_type.startswith("gemma") else []
        with torch.inference_mode():
            rows, refused = compare(model, path, tokens, bos, options)
        everything[path.name] = {"rows": rows, "refused": refused, "threads": torch.get_num_threads()}
        print_table(f"{path.name}: bits, perplexity and KL divergence of {rows[0]['predictions']} tokens that are "
                    f"decoded up to each context; tokens a second, the longest step (CPU time) and memory at "
                    f"{options.contexts[-1]}; threads: {torch.get_num_threads()}", rows, refused, options.contexts)
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1))
        del model


if __name__ == "__main__":
    main()
