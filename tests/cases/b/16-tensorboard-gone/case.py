"""The TensorBoard folder goes away (a clean-up script) or its disk is full: the run goes on, or ends as for every other file; no traceback of a writer thread, no iteration lost."""
from tiny import *
workspace(tasks=[], train_iters=8, save=4); import torch.utils.tensorboard
from uiollms.runs.log import RunLog
def run():
    real, n = RunLog.add, [0]
    def log(self, **values):
        real(self, **values); n[0] += 1
        if n[0] == 2: shutil.rmtree("out/tensorboard")
        time.sleep(0.3)
    RunLog.add = log
    import torch.utils.tensorboard as tb; w = tb.SummaryWriter
    class Quick(w):
        def __init__(self, *a, **k): super().__init__(*a, flush_secs=0, **k)
    tb.SummaryWriter = Quick
    return call("train.py", "--env_conf", "env.json")
code, text, _ = forked(run, timeout=60)
done = len(Path("out/metrics.jsonl").read_text().splitlines())
verdict("Traceback" not in text and (code == 0 or Path("out/checkpoints").exists() and any(Path("out/checkpoints").iterdir())), f"TensorBoard's folder deleted after iteration 2 of 8: exit {code} after {done} iterations, {'a traceback' if 'Traceback' in text else 'no traceback'}, checkpoints {sorted(os.listdir('out/checkpoints'))}")
