"""A minimal training loop: three steps with the exact gradient on one document, with its perplexity
before and after.

python examples/train.py adapters/smollm2-8x README.md
"""

import sys
from pathlib import Path

import torch

import uiollms

folder, document = sys.argv[1:]
model, tokenizer = uiollms.MemoryLM.from_pretrained(folder), uiollms.load_tokenizer(folder)
chunk_size = model.memory_config.chunk_size
text = Path(document).read_text(encoding="utf-8")
ids = tokenizer(text, return_tensors="pt").input_ids[0, : 4 * chunk_size]
sample = uiollms.Sample.language_modeling(ids, chunk_size)

# The LoRA weights and two embeddings. The base is frozen.
parameters = list(model.trainable_parameters().values())
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
print(f"{len(ids)} tokens, perplexity {uiollms.score(model, ids, 'paper').perplexity:.2f}")
model.train()
for step in range(3):
    # estimator="uio", S=1 is the paper's. Gradients are added to .grad, so documents accumulate.
    result = uiollms.gradient_step(model, sample, estimator="exact")
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"step {step + 1}: loss {result.losses.sum():.4f}, encoded with a graph: chunks "
        f"{list(result.reencoded)}"
    )
model.eval()
print(f"perplexity {uiollms.score(model, ids, 'paper').perplexity:.2f}")
# model.save_pretrained("my-model") saves the result.
