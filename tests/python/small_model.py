"""A llama model of two layers with random weights as a GGUF file, which the C++ engine and transformers both load, and
the policies that the engine's program `tune` makes for it, with keys in latents and in shaped channels:

    python3 tests/python/small_model.py build/release/examples/engine/tune

writes tests/data/small_llama_latent.policy and small_llama_shaped.policy. It was run once, with numpy 2.4 and gguf
0.19.
"""
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

NAME = "Small llama"
POLICIES = {keys: pathlib.Path(__file__).resolve().parents[1] / f"data/small_llama_{keys}.policy"
            for keys in ("latent", "shaped")}
VOCABULARY = 258
LAYERS, WIDTH, QUERY_HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, ROPE_BASE, CONTEXT = 2, 64, 4, 2, 16, 96, 1000.0, 2048


def byte_tokens():
    """Characters that stand for bytes, as GPT-2 has them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def write_gguf(path):
    import gguf
    random = np.random.RandomState(20261127)  # a stream that numpy keeps
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(NAME)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(QUERY_HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(byte_tokens() + ["he", "<|end|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(257)

    def add(name, rows, columns, scale=1.0, of_rows=None):
        weights = scale * random.standard_normal((rows, columns)) / np.sqrt(columns)
        if of_rows is not None:
            weights *= of_rows[:, None]
        writer.add_tensor(name, weights.astype(np.float32))
    add("token_embd.weight", VOCABULARY, WIDTH, 8.0)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        writer.add_tensor(block + "attn_norm.weight", np.ones(WIDTH, np.float32))
        writer.add_tensor(block + "ffn_norm.weight", np.ones(WIDTH, np.float32))
        # Channels of very different size, so that it matters which is which.
        large = np.tile(np.geomspace(6, 0.05, HEAD_DIM), KV_HEADS)
        add(block + "attn_q.weight", QUERY_HEADS * HEAD_DIM, WIDTH, 1.5)
        add(block + "attn_k.weight", KV_HEADS * HEAD_DIM, WIDTH, 1.0, large)
        add(block + "attn_v.weight", KV_HEADS * HEAD_DIM, WIDTH, 2.0)
        add(block + "attn_output.weight", WIDTH, QUERY_HEADS * HEAD_DIM, 2.0)
        add(block + "ffn_gate.weight", FEED_FORWARD, WIDTH)
        add(block + "ffn_up.weight", FEED_FORWARD, WIDTH)
        add(block + "ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text(characters=3000):
    return bytes(np.random.RandomState(1).randint(ord("a"), ord("z") + 1, characters).tolist()).decode()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_gguf(folder / "model.gguf")
        (folder / "text.txt").write_text(text())
        for keys, policy in POLICIES.items():
            subprocess.run([sys.argv[1], "--model", folder / "model.gguf", "--text", folder / "text.txt", "--tokens",
                            "1000", "--scan", "600", "--context", "1024", "--budget", "5", "--keys", keys, "--out",
                            policy, "--threads", "1"], check=True)
