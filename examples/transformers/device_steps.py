"""Steps of decoding on a CUDA device: a Llama of random weights with kvplane's caches, and what of a step is the host's
time in kvplane's layers.

    python device_steps.py [RECIPES]
"""
import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvplane
import kvplane.transformers

WARM, STEPS, LAYERS = 8, 32, 16


class Stopwatch:
    """Adds up the time that is spent in a function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function):
        def call(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begin
        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE",
                        default=["fp16", "standard", "key_favored:4:4", "latent:3:3"])
    recipes = parser.parse_args().recipes
    if not kvplane.cuda_devices():
        raise SystemExit("device_steps.py: no CUDA device, or a build without CUDA (README.md, On a CUDA device)")
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=LAYERS,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=65536)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.set_attn_implementation(kvplane.transformers.ATTENTION)
    stopwatch = Stopwatch()
    for name in ("update", "attend"):
        layer = kvplane.transformers.CacheLayer
        setattr(layer, name, stopwatch.around(getattr(layer, name)))
    print(f"{torch.cuda.get_device_name()}; {LAYERS} layers of 32 heads over 8 of 64, bfloat16")
    print(f"{'batch':>5} {'tokens':>6} {'recipe':20} {'bits':>6} {'prompt':>11} {'step':>9} {'host, a layer':>13}")
    for batch, tokens in ((1, 2048), (1, 16000), (8, 4096)):
        for recipe in recipes:
            cache = kvplane.transformers.Cache(model, recipe)
            ids = torch.randint(1, config.vocab_size, (batch, tokens), device="cuda")
            with torch.no_grad():
                begin = time.perf_counter()
                model(ids, past_key_values=cache, logits_to_keep=1)
                torch.cuda.synchronize()
                prompt = time.perf_counter() - begin
                last = ids[:, :1]
                for step in range(WARM + STEPS):
                    if step == WARM:
                        torch.cuda.synchronize()
                        stopwatch.seconds, begin = 0.0, time.perf_counter()
                    last = model(last, past_key_values=cache).logits[:, -1:].argmax(-1)
                torch.cuda.synchronize()
                each = (time.perf_counter() - begin) / STEPS
            print(f"{batch:5} {tokens:6} {recipe:20} {cache.bits_per_element:6.2f} {prompt * 1e3:8.1f} ms "
                  f"{each * 1e3:6.2f} ms {stopwatch.seconds / STEPS / LAYERS * 1e6:10.1f} us", flush=True)


if __name__ == "__main__":
    main()
