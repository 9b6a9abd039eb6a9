"""train.py is killed right after any one of its renames. If weights were whole at save_ckp before, what then evaluates or uses the run must not silently take no weights (or the released ones)."""
from tiny import *
workspace(save=1, tasks=[])
import uiollms.runs.run
bad, tried = [], 0
def killed(k):
    def run():
        seen = [0]
        def wrap(real):
            def rename(source, target, *rest, **more):
                result = real(source, target, *rest, **more)
                seen[0] += 1
                if seen[0] == k: os.kill(os.getpid(), signal.SIGKILL)
                if Path(os.fsdecode(target)).name == "ckp": Path("whole").touch()
                return result
            return rename
        os.rename, os.replace = wrap(os.rename), wrap(os.replace)
        return call("train.py", "--env_conf", "env.json")
    return run
for k in range(1, 25):
    shutil.rmtree("out", ignore_errors=True); Path("whole").unlink(missing_ok=True)
    code, text, _ = forked(killed(k), timeout=60)
    if code == 0: break
    if not Path("whole").exists(): continue
    tried += 1
    code, text, _ = forked(lambda: call("test.py", "--env_conf", "env.json"), timeout=60)
    said = next((l for l in text.splitlines() if l.startswith("weights")), last(text))
    if code == 0 and "untrained" in said: bad.append(k)
verdict(tried > 0 and not bad, f"killed after each of the renames that follow whole weights ({tried} of them): after {bad or 'none'} test.py evaluates 'untrained' with exit 0")
