"""Writes gemma3_reference.* and qwen2_reference.* beside this file: what transformers makes of the same GGUF file, in
fp32 on the CPU. It was run once, with transformers 5.24.0 and torch 2.15.0:

    pip install torch transformers gguf sentencepiece accelerate
    python3 tests/data/write_engine_reference.py gemma3 models/gemma-3-270m-q4_k_m.gguf
    python3 tests/data/write_engine_reference.py qwen2 models/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf

Logits are those of every 64th token of the vocabulary; the likelihoods of the targets have a part in all others.
"""
import json
import pathlib
import sys

import numpy
import torch
import transformers
from safetensors.numpy import save_file

name, model_file = sys.argv[1], pathlib.Path(sys.argv[2])
here = pathlib.Path(__file__).parent
text = (here / "../../examples/data/northanger_abbey.txt").read_text(encoding="utf8")
tokenizer = transformers.AutoTokenizer.from_pretrained(model_file.parent, gguf_file=model_file.name)


def encode(piece):
    return tokenizer(piece, add_special_tokens=False)["input_ids"]


cases = [
    "", "Hello world", "The quick brown fox jumps over the lazy dog.", "  two  spaces   three    four",
    "line\n\nline\n\n\n\nthird\n", "tab\tand\r\nreturn", "don't we'll I'D they'Re CAN'T", "12345 3.14 1,000",
    "naïve café Übergröße", "Привет мир", "日本語のテキスト", "emoji 🙂 👩‍👩‍👧", "def f(x):\n    return x**2  # square\n",
    "(a)?! ... b", '{"key": [1, 2, 3]}', "The secret code of Alice is 48213.\n", "x" * 40, "½ Ⅷ ²", "a\u00a0b\u3000c",
    "\x01\x02 \x7f", "trailing   ", " leading", "\n\n  indented\n\tmixed \t spaces", "C++ && Rust; $x = @y#z", "ſ ǅ ﬁ",
]
cases += {
    "gemma3": ["<start_of_turn>user\nHi<end_of_turn>\n", "<table><tr>x</tr></table>", "<unused5>", "<0x0A>"],
    "qwen2": ["<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "<tool_call>x</tool_call>"],
}[name]
cases.append(text[3000:5000])
with open(here / f"{name}_reference.json", "w") as out:
    json.dump({"transformers": transformers.__version__,
               "tokenizer_cases": [{"text": case, "ids": encode(case)} for case in cases]}, out, indent=0)

if name == "gemma3":  # longer than a window
    count, rows = 640, [0, 1, 100, 511, 512, 513, 600, 639]
    ids = [tokenizer.bos_token_id] + encode(text)[:count - 1]
else:
    count, rows = 160, [0, 1, 5, 50, 40, 80, 158, 159]
    ids = encode(text)[:count]
model = transformers.AutoModelForCausalLM.from_pretrained(
    model_file.parent, gguf_file=model_file.name, dtype=torch.float32, attn_implementation="eager").eval()
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0]
likelihoods = torch.log_softmax(logits.double(), -1)[torch.arange(count - 1), torch.tensor(ids[1:])]
save_file({
    "token_ids": numpy.array([ids], numpy.int32),
    "rows": numpy.array([rows], numpy.int32),
    "logits_of_every_64th_token": numpy.ascontiguousarray(logits[rows][:, ::64].numpy()),
    "target_log_likelihood": likelihoods.float().numpy()[None],
}, here / f"{name}_reference_logits.safetensors")
