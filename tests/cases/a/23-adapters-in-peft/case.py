"""The folders of a checkpoint are PEFT adapters: loaded by peft on the base, the decoder's keys and values of any hidden state are the
product's own projections; the same after merge_and_unload; and nothing is warned to be missing."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *
import copy, warnings, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from uiollms.config.load import load_env_config
from uiollms.build import load_trained

at = work()
tiny(at / "model", "qwen2")
workspace(at, at / "model", "qwen2", train=dict(train_iters=4, max_lr=0.05))
code, out, err = run("train.py", "--env_conf", "env.json", "--quiet", cwd=at)
if code: verdict(False, f"train.py exit {code}: {last(err)}")
os.chdir(at)
model = load_trained(load_env_config("env.json"), "env.json")[0].eval()
wrong = []
for role, names in (("encoder", ("q_proj", "v_proj")), ("decoder", ("k_proj", "v_proj"))):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(at / "model", dtype=torch.float32), at / "out/ckp" / role)
    wrong += [str(w.message)[:80] for w in warned if "missing" in str(w.message)]
    for merge in (False, True):
        plain = (peft.merge_and_unload() if merge else peft.base_model.model).model.layers
        x = torch.randn(1, 5, 32)
        for i, (theirs, layer, lora) in enumerate(zip(plain, model.base.model.layers, getattr(model, role).layers)):
            for name in names:
                ours = getattr(layer.self_attn, name)(x) + lora[name](x)
                if not torch.allclose(ours, getattr(theirs.self_attn, name)(x), atol=1e-5): wrong.append(f"{role} {i} {name} {merge}")
moved = sum(p.norm().item() for n, p in model.trainable_parameters().items() if n.endswith("lora_B"))
verdict(not wrong and moved > 0, "; ".join(wrong[:4]) or "equal")
