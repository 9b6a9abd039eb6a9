"""Evaluates text files with memory, without memory and with the raw context, and prints a table
and the same numbers as JSON.

python examples/evaluate.py adapters/smollm2-8x README.md CONTRIBUTING.md
"""

import json
import sys

from uiollms import Evaluation, MemoryLM, TaskEntry, load_tokenizer, print_results

folder, *documents = sys.argv[1:]
model, tokenizer = MemoryLM.from_pretrained(folder), load_tokenizer(folder)
tasks = [
    TaskEntry(
        task_type="perplexity",
        task_name=f"files:{document}",
        num_instance=1,
        truncation=4 * model.memory_config.chunk_size,
        compare=("window", "raw"),
        protocols=("paper", "document"),
    )
    for document in documents
]
results = [scores.summarize() for scores in Evaluation(model, tokenizer, tasks).run()]
print_results(results)
print(json.dumps([result.as_json() for result in results])[:300], "...")
