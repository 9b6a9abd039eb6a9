"""Compresses a document once, saves its memory, asks two questions about it, and asks about it
together with another document.

python examples/compress_and_ask.py adapters/smollm2-8x README.md
"""

import sys
import tempfile
from pathlib import Path

import torch

from uiollms import Memory, MemoryLM, continuation_ids, join, load_tokenizer

folder, document = sys.argv[1:]
model, tokenizer = MemoryLM.from_pretrained(folder), load_tokenizer(folder)


def ask(memory: Memory, question: str) -> str:
    # The question goes on from the document, so it has no BOS.
    ids = torch.tensor([continuation_ids(tokenizer, f"\n\nQuestion: {question}\nAnswer:")])
    output = model.generate(ids, state=memory.state(model), do_sample=False, max_new_tokens=20)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


memory = model.compress(Path(document).read_text(encoding="utf-8"), tokenizer, source=document)
print(
    f"{memory.num_tokens} tokens: {memory.num_slots} slots per layer and {len(memory.open_ids)} "
    "uncompressed tokens"
)

with tempfile.TemporaryDirectory() as cache:
    path = Path(cache) / "document.mem"
    memory.save(path)
    memory = Memory.load(path, model)  # an error if another model made it

for question in ("What is this about?", "How does it begin?"):
    print(f"{question} {ask(memory, question)}")

note = model.compress(
    "The note on the fridge says that the milk is gone. ", tokenizer, source="note"
)
print(f"What does the note say? {ask(join([memory, note]), 'What does the note say?')}")
