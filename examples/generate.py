"""Generates with a model with memory, by the `generate` of transformers: streaming, a batch of
prompts of different lengths, sampling, and several continuations of one state.

python examples/generate.py adapters/smollm2-8x README.md
"""

import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from uiollms import MemoryLM, load_tokenizer

folder, document = sys.argv[1:]
model, tokenizer = MemoryLM.from_pretrained(folder), load_tokenizer(folder)
tokenizer.padding_side = "left"
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

# The document may have up to model.capacity tokens. Full chunks are compressed, also while
# generating.
ids = tokenizer(Path(document).read_text(encoding="utf-8"), return_tensors="pt").input_ids
model.generate(
    ids, do_sample=False, max_new_tokens=20, streamer=TextStreamer(tokenizer, skip_prompt=True)
)

# A batch of prompts of different lengths.
prompts = tokenizer(
    ["The chair", "My fellow citizens, the state of the"], padding=True, return_tensors="pt"
)
torch.manual_seed(0)
for row in model.generate(**prompts, do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=10):
    print(tokenizer.decode(row, skip_special_tokens=True))

# The state after a document. Generating from it does not change it, so it can be reused.
with torch.no_grad():
    state = model(ids, logits_to_keep=1).past_key_values
for ending in (" In short,", " But"):
    more = tokenizer(ending, return_tensors="pt", add_special_tokens=False).input_ids
    print(tokenizer.decode(model.generate(more, state=state, do_sample=False, max_new_tokens=8)[0]))
