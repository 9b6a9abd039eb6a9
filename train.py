"""Train memory into a frozen language model with UIO-TBPTT.

python train.py --env_conf smollm2-8x.json
python train.py --env_conf smollm2-8x.json --set train.max_lr=5e-4 --set train.train_iters=100
python train.py --env_conf smollm2-8x.json --resume
"""

import math
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from uiollms.checkpoint import load_weights
from uiollms.cli import parse_arguments, reporting_errors
from uiollms.config import EnvConfig, load_env_config
from uiollms.estimators import make_estimator
from uiollms.evaluation import Evaluation
from uiollms.faults import training_on
from uiollms.pretrained import check_env, count_parameters, load_memory_lm
from uiollms.report import print_results
from uiollms.run import Run, open_run
from uiollms.run_state import TrainingState
from uiollms.step import gradient_step
from uiollms.training import Samples, learning_rate, make_optimizer


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(__doc__, arguments)
    config = load_env_config(args.env_conf, args.set)
    with open_run(config, check_env(config, args.env_conf), args.env_conf, args.resume, args.restart) as run:
        fit(config, args.env_conf, run)


def fit(config: EnvConfig, env_conf: str | Path, run: Run) -> None:
    train = config.train
    model, tokenizer = load_memory_lm(config, env_conf)
    if config.model.load_ckp:
        load_weights(model, config.model.load_ckp)
    samples = Samples(config, tokenizer, model)
    estimator = make_estimator(train.estimator, S=train.tbptt, compensate=train.compensate)
    optimizer = make_optimizer(model, train)
    parameters = list(model.trainable_parameters().values())
    draws = random.Random(train.seed)  # of reservoirs and LoRA dropout; data has its own
    evaluation = Evaluation(model, tokenizer, train.tasks)
    trained, frozen = count_parameters(model)
    print(f"trained parameters {trained / 1e6:.1f} M, frozen {frozen / 1e6:.1f} M in {model.dtype}")

    state = TrainingState(model, tokenizer, optimizer, samples, draws)  # all that changes from here on
    run.begin(state)  # at iteration 0, or where a checkpoint stands

    def evaluate() -> None:
        results = evaluation.run(lambda documents: tqdm(run.unless_stopped(documents), desc="evaluate", leave=False))
        run.log(iteration=state.iteration, eval=[r.summary() for r in results])
        run.plot()
        progress.clear()
        print_results(results)

    model.train()
    iterations = range(state.iteration, train.train_iters)
    progress = tqdm(iterations, desc="train", unit="it", smoothing=0.1, initial=state.iteration, total=train.train_iters)
    if run.evaluation_missing(state.iteration):
        evaluate()
    for iteration in progress:
        # ---- the algorithm -----------------------------------------------------------------------------------------
        nll, scored, sources = torch.zeros(()), 0, []
        for _ in range(train.accum_grad):
            sample = next(samples)  # a document, cut into chunks
            sources.append(samples.source)
            # Draw the window, encode, losses, gradients: see uiollms/step.py
            with training_on(samples.source, train):
                result = gradient_step(
                    model, sample, estimator=estimator, rng=draws, scale=1 / train.accum_grad, report_all=False
                )
            nll, scored = nll + result.nll.cpu(), scored + int(result.scored.sum())
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, train.clip_grad).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, train)
        good = math.isfinite(grad_norm) and math.isfinite(nll.item())
        if good:
            optimizer.step()
        optimizer.zero_grad()
        # ------------------------------------------------------------------------------------------------------------
        done = state.advance(good)
        lr, mean_nll = optimizer.param_groups[0]["lr"], nll.item() / scored
        if good:
            run.log(iteration=done, nll=mean_nll, lr=lr, grad_norm=grad_norm)
        else:
            run.log(iteration=done, skipped=sources, lr=lr)
        progress.set_postfix(nll=f"{mean_nll:.3f}", lr=f"{lr:.1e}")

        if run.saves(state):
            run.save(state)
        run.stop_if_asked(state, sources)
        if run.evaluates(done):
            evaluate()
    if not train.tasks:
        run.plot()

    if samples.skipped:
        print(f"{samples.skipped} documents that fit one chunk were skipped")
    if state.skipped_steps:
        print(f"{state.skipped_steps} steps were skipped, their loss or gradient was not finite")
    print(f"metrics and curve.png are in {run.folder}, weights in {config.model.save_ckp or 'no file (save_ckp is null)'}")


if __name__ == "__main__":
    sys.exit(reporting_errors(main))
