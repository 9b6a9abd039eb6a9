"""Train memory into a frozen language model with UIO-TBPTT.

python train.py --env_conf smollm2-8x.json
python train.py --env_conf smollm2-8x.json --set train.max_lr=5e-4 --set train.train_iters=100
python train.py --env_conf 32x.json --dry_run --device_memory 24GiB,24GiB
"""

import random
import sys

import torch
from tqdm import tqdm

from uiollms.checkpoint import load_weights, save_weights
from uiollms.cli import parse_arguments, reporting_errors
from uiollms.config import load_env_config
from uiollms.estimators import make_estimator
from uiollms.evaluation import Evaluation
from uiollms.plan import dry_run
from uiollms.pretrained import count_parameters, load_memory_lm
from uiollms.report import plot_training, print_results
from uiollms.step import gradient_step
from uiollms.training import Run, Samples, learning_rate, make_optimizer


def main(arguments: list[str] | None = None) -> int | None:
    args = parse_arguments(__doc__, arguments)
    config = load_env_config(args.env_conf, args.set)
    if args.dry_run:
        return dry_run(config, args.env_conf, args.device_memory)
    train = config.train

    model, tokenizer = load_memory_lm(config, args.env_conf)
    if config.model.load_ckp:
        load_weights(model, config.model.load_ckp)
    samples = Samples(config, tokenizer, model)
    estimator = make_estimator(train.estimator, S=train.tbptt, compensate=train.compensate)
    optimizer = make_optimizer(model, train)
    parameters = list(model.trainable_parameters().values())
    draws = random.Random(train.seed)  # of reservoirs and LoRA dropout; data has its own
    evaluation = Evaluation(model, tokenizer, train.tasks)
    run = Run(config, args.env_conf)
    trained, frozen = count_parameters(model)
    print(f"trained parameters {trained / 1e6:.1f} M, frozen {frozen / 1e6:.1f} M in {model.dtype}")

    model.train()
    progress = tqdm(range(train.train_iters), desc="train", unit="it", smoothing=0.1)
    for iteration in progress:
        # ---- the algorithm -----------------------------------------------------------------------------------------
        nll, scored = torch.zeros(()), 0
        for _ in range(train.accum_grad):
            sample = next(samples)  # a document, cut into chunks
            # Draw the window, encode, losses, gradients: see uiollms/step.py
            result = gradient_step(model, sample, estimator=estimator, rng=draws, scale=1 / train.accum_grad, report_all=False)
            nll, scored = nll + result.nll.cpu(), scored + int(result.scored.sum())
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, train.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, train)
        optimizer.step()
        optimizer.zero_grad()
        # ------------------------------------------------------------------------------------------------------------
        done = iteration + 1
        mean_nll = nll.item() / scored
        run.log(iteration=done, nll=mean_nll, lr=optimizer.param_groups[0]["lr"], grad_norm=grad_norm.item())
        progress.set_postfix(nll=f"{mean_nll:.3f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}")

        last = done == train.train_iters
        if config.model.save_ckp and (done % train.save == 0 or last):
            save_weights(model, config.model.save_ckp)
        if train.tasks and (done % train.eval == 0 or last):
            results = evaluation.run(lambda documents: tqdm(documents, desc="evaluate", leave=False))
            run.log(iteration=done, eval=[r.summary() for r in results])
            progress.clear()
            print_results(results)
        if last or done % train.save == 0:
            plot_training(run.folder)

    if samples.skipped:
        print(f"{samples.skipped} documents that fit one chunk were skipped")
    print(f"metrics and curve.png are in {run.folder}, weights in {config.model.save_ckp or 'no file (save_ckp is null)'}")


if __name__ == "__main__":
    sys.exit(reporting_errors(main))
