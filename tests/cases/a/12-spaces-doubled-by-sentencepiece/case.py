"""A tokenizer that puts a space in front of every text it is given (Llama 2, the paper's base): pieces tokenised alone and joined must
read as the text they stand for, with no second space, and without a space that the text does not have."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *
import random, torch, uiollms
from uiollms.data import Document, NewsDocument
from uiollms.data.retrieval import make_trials
from uiollms.data.builder import SampleBuilder

at = work()
base, tokenizer = tiny(at / "model", tokenizer=byte_tokenizer(bos=True, prefix_space=True), max_position_embeddings=1024)
model = uiollms.MemoryLM(base, uiollms.MemoryConfig(num_memory=2, chunk_size=64, lora_rank=2, lora_alpha=4))
def text(sample, rows=None):
    ids = torch.cat([row.input_ids for row in (rows or sample.rows)]).tolist()
    return "".join(tokenizer.convert_ids_to_tokens([i for i in ids if i > 2])).replace("\u2581", " ").strip()
trial = make_trials("needle", [Document("x" * 3000, "d")], tokenizer, 400, 64, 1, (0.5,))[0]
found = {"needle": text(trial.sample)[-40:]}
wrong = {}
if "  " in text(trial.sample): wrong["needle"] = text(trial.sample)[-36:]
qa = SampleBuilder(model, tokenizer).make(Document("y" * 70 + "\nAnswer:", "d", " kettle", task="question answering"), None, random.Random(0))
if not text(qa).endswith("Answer: kettle"): wrong["question answering, ' kettle'"] = text(qa)[-20:]
qa = SampleBuilder(model, tokenizer).make(Document("y" * 70 + "\nAnswer: ket", "d", "tle", task="question answering"), None, random.Random(0))
if not text(qa).endswith("Answer: kettle"): wrong["question answering, 'tle'"] = text(qa)[-20:]
news = NewsDocument("z" * 130, "d", task="news qa summation", questions=(("What?", "kettle"),), distractor="w" * 200)
row = SampleBuilder(model, tokenizer).make(news, None, random.Random(0)).rows[0]
if not text(None, [row]).endswith("Answer: kettle"): wrong["news"] = text(None, [row])[-20:]
verdict(not wrong, "; ".join(f"{k} reads {v!r}" for k, v in wrong.items()) or "all read as written")
