"""Qwen2.5's and Qwen3's model cards say to switch YaRN on with rope_scaling factor 4, original 32,768, leaving max_position_embeddings
at 32,768. transformers then serves factor * original positions; the capacity and mode "raw" should know them."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *

at = work()
tiny(at / "model", "qwen2", max_position_embeddings=64)
file = at / "model" / "config.json"
config = json.loads(file.read_text())
config.pop("rope_parameters", None)
file.write_text(json.dumps(config | dict(rope_theta=10000.0, rope_scaling=dict(factor=4.0, original_max_position_embeddings=64, type="yarn"))))
workspace(at, at / "model", "qwen2", task=dict(num_instance=1, truncation=200, compare=["raw"], protocols=["document"]))
code, out, err = run("test.py", "--env_conf", "env.json", "--quiet", "--json", cwd=at)
modes = json.loads(out)["results"][0] if code == 0 else {}
raw = "raw" in json.dumps(modes)
from uiollms.build import load_memory_lm
from uiollms.weights.base_models import base_config
from uiollms.config.load import load_env_config
os.chdir(at)
model = load_memory_lm(load_env_config("env.json"), "env.json")[0]
want = 121 * 16 + 14  # 121 full chunks of 16, and 14 tokens behind 242 slots
verdict(raw and model.capacity == want, f"exit {code}, raw of 200 tokens {'scored' if raw else 'left out'}, capacity {model.capacity} (256 positions allow {want}, the last partial chunk counted); {last(err)}")
