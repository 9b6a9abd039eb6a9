"""A tokenizer set to put EOS behind every text (add_eos_token, common in fine-tuned Llama folders): a question's prompt must not end
with EOS before its answer, nor a passkey's or a chat's; a text that is cut is not ended either."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *
import random, torch, uiollms
from uiollms.data import Document
from uiollms.data.retrieval import make_trials
from uiollms.data.builder import SampleBuilder

at = work()
base, tokenizer = tiny(at / "model", tokenizer=byte_tokenizer(bos=True, eos=True))
model = uiollms.MemoryLM(base, uiollms.MemoryConfig(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4))
sample = SampleBuilder(model, tokenizer).make(Document("Where is the ship? It is far out. Answer:", "d", " at sea", task="question answering"), None, random.Random(0))
asked = torch.cat([row.input_ids for row in sample.rows]).tolist()
trial = make_trials("passkey", [Document(TEXT * 20, "d")], tokenizer, 400, 16, 1, (0.5,))[0]
hidden = torch.cat([row.input_ids for row in trial.sample.rows]).tolist()
wrong = [name for name, ids in (("question answering", asked), ("passkey", hidden)) if 2 in ids[:-1]]
where = {name: ids.index(2) for name, ids in (("question answering", asked), ("passkey", hidden)) if 2 in ids[:-1]}
verdict(not wrong, f"EOS inside: {where} (question answering has its answer from token {len(asked) - 7})" if wrong else "no EOS inside")
