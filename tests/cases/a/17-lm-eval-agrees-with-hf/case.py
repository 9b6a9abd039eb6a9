"""Where texts are shorter than a chunk, memory has no part: log likelihoods (empty contexts, contexts ending in a space, BOS-writing
tokenizers, texts beginning with BOS), rolling likelihoods and greedy answers are those of lm-eval's own Hugging Face model."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *

wrong, at = [], work()
for name, tokenizer in {"no bos": byte_tokenizer(), "bos": byte_tokenizer(bos=True), "spaces": byte_tokenizer(bos=True, prefix_space=True)}.items():
    folder = at / name
    tiny(folder / "model", tokenizer=tokenizer, std=0.4, eos_token_id=[2, 40], rope_parameters=dict(rope_type="llama3", rope_theta=500.0, factor=8.0,
         low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64))
    workspace(folder, folder / "model", chunk=128, slots=8, train=dict(corpus=[dict(name="files:book*.txt", partition=1)]))
    code, out, err = run("train.py", "--env_conf", "env.json", "--quiet", cwd=folder)
    if code: verdict(False, f"train.py exit {code}: {last(err)}")
    os.chdir(folder)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from uiollms.evaluation.lm_eval_model import HarnessLM
    ours, theirs = HarnessLM("env.json", batch_size=3), HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32")
    pairs = [("", "A cat sat"), ("Where is it? ", "Here"), ("Where is it?", " Here"), ("Where is it?", " There, I think"), ("<s>Well", " then"), ("One two", " three four five")]
    def lot(kind, args): return [Instance(kind, {}, a, i) for i, a in enumerate(args)]
    for (a, x), (b, y), pair in zip(ours.loglikelihood(lot("loglikelihood", pairs), True), theirs.loglikelihood(lot("loglikelihood", pairs), True), pairs):
        if abs(a - b) > 1e-3 or x != y: wrong.append(f"{name} {pair}: {a:.4f} {x}, hf {b:.4f} {y}")
    asked = [(p, dict(until=["!", "\n"], max_gen_toks=12)) for p in ("Where is it?", "Well then", "A much longer prompt than the others")]
    for a, b in zip(ours.generate_until(lot("generate_until", asked), True), theirs.generate_until(lot("generate_until", asked), True)):
        if a != b: wrong.append(f"{name} answer {a!r}, hf {b!r}")
    if name == "no bos":
        texts = [("A text that is rolled over once.",), ("Another",)]
        for a, b in zip(ours.loglikelihood_rolling(lot("loglikelihood_rolling", texts), True), theirs.loglikelihood_rolling(lot("loglikelihood_rolling", texts), True)):
            if abs(a - b) > 1e-3: wrong.append(f"{name} rolling {a:.4f}, hf {b:.4f}")
verdict(not wrong, " | ".join(wrong[:4]) or "equal")
