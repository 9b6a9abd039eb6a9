"""A tiny random model, a workspace, and trials in forked children. Run from the project's root (or set UIO_ROOT)."""
import json, os, sys, time, signal, tempfile, traceback, shutil, importlib.util
from pathlib import Path
ROOT = Path(os.environ.get("UIO_ROOT") or os.getcwd()).resolve()
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
import torch
torch.set_num_threads(1)
import tqdm.std
tqdm.std.TqdmDefaultWriteLock.mp_lock = None  # forked children would share it: one killed while it holds it stops all others
SHAPE = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=128, eos_token_id=2, bos_token_id=1, pad_token_id=0)

def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>", bos_token="<s>", pad_token="<pad>")

def make_base_folder(folder, **changes):
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | changes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Path(folder)

def env_of(model_folder, **train):
    task = dict(task_type="perplexity", task_name="files:book*.txt", num_instance=2, truncation=100)
    return dict(
        model=dict(model_name=str(model_folder), model_dtype="fp32", model_structure="llama", config="memory.json",
                   save_ckp="out/ckp", device_map="cpu"),
        train=dict(tbptt=2, train_iters=3, max_lr=1e-2, warmup=0.3, save=2, eval=3, run_dir="out",
                   corpus=[dict(name="files:book*.txt", partition=1, truncation=80)], tasks=[task]) | train)

def workspace(folder=None, model_folder=None, **train):
    """Makes and enters a working directory; returns its path."""
    folder = Path(folder or tempfile.mkdtemp(prefix="uio-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    model_folder = model_folder or make_base_folder(folder / "base")
    text = "It was a bright cold day, and the clocks were striking. " * 8
    for i in range(4):
        Path(f"book{i}.txt").write_text(f"{i}: {text}")
    Path("memory.json").write_text(json.dumps(dict(num_memory=2, chunk_size=16, lora_rank=2, lora_alpha=4)))
    env = env_of(model_folder, **train)
    Path("env.json").write_text(json.dumps(env))
    Path("test.json").write_text(json.dumps(dict(tasks=env["train"]["tasks"] or [dict(task_type="perplexity", task_name="files:book*.txt", num_instance=2, truncation=100)])))
    return folder

def loaded(command):
    spec = importlib.util.spec_from_file_location(f"command_{Path(command).stem}", ROOT / command)
    m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)
    return m

def call(command, *arguments):
    """train.py / test.py / a module name with main(list) in this process, with the commands' error handling: exit code."""
    from uiollms.cli.common import reporting_errors
    if command.endswith(".py"):
        return reporting_errors(lambda: loaded(command).main(list(arguments)))
    import importlib
    return reporting_errors(lambda: importlib.import_module(command).main(list(arguments)))

def forked(function, timeout=20.0, stdin=None, cwd=None):
    """(code or "HANG", what it printed, seconds); code < 0: a signal; 70: an exception nothing caught."""
    out = tempfile.NamedTemporaryFile(prefix="uio-out-", delete=False)
    began = time.time()
    child = os.fork()
    if not child:
        try:
            os.setpgid(0, 0)
            if cwd: os.chdir(cwd)
            os.dup2(out.fileno(), 1); os.dup2(out.fileno(), 2)
            r = os.open(stdin or os.devnull, os.O_RDONLY); os.dup2(r, 0)
            sys.stdin = os.fdopen(0, "r", closefd=False)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(1), "w", buffering=1) for _ in range(2))
            code = 70
            try:
                code = function() or 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else (0 if stop.code is None else 1)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(); sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 70)
    code = None
    while time.time() - began < timeout:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status); break
        time.sleep(0.002 if time.time() - began < 0.5 else 0.02)
    if code is None:
        os.kill(child, signal.SIGKILL); os.waitpid(child, 0); code = "HANG"
    text = Path(out.name).read_bytes().decode(errors="replace")
    out.close(); os.unlink(out.name)
    return code, text, time.time() - began

def warm():
    """Slow imports once, before forks."""
    import matplotlib.figure, matplotlib.pyplot, torch.utils.tensorboard, datasets, peft  # noqa
    import uiollms, uiollms.__main__, uiollms.cli.report, uiollms.runs.run, uiollms.weights.model_folder, uiollms.evaluation.lm_eval_model, uiollms.data  # noqa
    from uiollms.runs.environment import environment
    environment()

def verdict(ok, line):
    print(("right: " if ok else "WRONG: ") + line)
    sys.exit(0 if ok else 1)

def last(text):
    lines = [l for l in text.strip().splitlines() if l.strip()]
    return lines[-1][:220] if lines else ""
