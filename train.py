"""Train memory into a frozen language model with UIO-TBPTT.

python train.py --env_conf smollm2-8x.json
python train.py --env_conf smollm2-8x.json --set train.max_lr=5e-4 --set train.train_iters=100
python train.py --env_conf smollm2-8x.json --resume
python train.py --env_conf smollm2-8x.json --quiet --json > metrics.jsonl
torchrun --nproc_per_node 2 train.py --env_conf smollm2-8x.json
python train.py --env_conf 32x.json --dry_run --device_memory 24GiB,24GiB
python train.py --env_conf 32x.json --dry_run --json
"""

import math
import sys
from functools import partial
from pathlib import Path

try:
    import uiollms.cli.common  # noqa: F401  # and with it torch and transformers
except ImportError as error:
    how = "`make setup` and then .venv/bin/python, or `pip install -e .` in an environment of yours"
    sys.exit(f"{error}; run {how}: see Set-up in README.md")

import torch
from torch.nn.utils import clip_grad_norm_

from uiollms.build import check_env, count_parameters, load_memory_lm
from uiollms.cli.common import SILENT, Output, parse_arguments, reporting_errors, step_text
from uiollms.cli.dry_run import dry_run
from uiollms.config.load import load_env_config
from uiollms.config.sections import EnvConfig
from uiollms.data.stream import SampleStream, pack_documents
from uiollms.distributed.groups import World, number_of_processes, open_world
from uiollms.distributed.watch import watching
from uiollms.evaluation.evaluator import Evaluation
from uiollms.planning.planner import choose_chunk_batch
from uiollms.reports.curves import plot_run
from uiollms.reports.tables import print_results
from uiollms.runs.checks import check_training
from uiollms.runs.run import Run, open_run
from uiollms.runs.state import TrainingState
from uiollms.training.estimators import make_estimator
from uiollms.training.failures import reporting_step_errors
from uiollms.training.optimizer import gradient_norms, make_optimizer
from uiollms.training.step import gradient_step
from uiollms.training.weighting import weigh_tokens
from uiollms.weights.adapters import load_weights


def main(arguments: list[str] | None = None) -> int | None:
    args = parse_arguments(__doc__, arguments)
    if args.dry_run:  # reads no data, writes nothing
        config = load_env_config(args.env_conf, args.set, partial(check_env, path=args.env_conf))
        return dry_run(config, args.env_conf, args.device_memory, args.output)
    check = partial(check_training, path=args.env_conf, going_on=args.resume is not None)
    with watching(number_of_processes() > 1) as watch:
        config = load_env_config(args.env_conf, args.set, check)
        compressor = check(config)
        config = choose_chunk_batch(config, args.env_conf)
        with (
            open_world(config, watch) as world,
            open_run(config, compressor, args.env_conf, args.resume, args.restart, world) as run,
        ):
            run.echo = args.output.print_json_line
            fit(config, args.env_conf, run, world, args.output if world.is_main_process else SILENT)
    return 0


def fit(config: EnvConfig, env_conf: str | Path, run: Run, world: World, output: Output) -> None:
    train = config.train
    model, tokenizer = load_memory_lm(config, env_conf)
    if config.model.load_ckp:
        load_weights(model, config.model.load_ckp)
    samples = SampleStream(config, tokenizer, model, partial(weigh_tokens, model))
    estimator = make_estimator(train.estimator, S=train.tbptt, compensate=train.compensate)
    optimizer = make_optimizer(model, train)
    parameters = list(model.trainable_parameters().values())
    evaluation = Evaluation(model, tokenizer, train.tasks if world.is_main_process else ())
    trained, frozen = count_parameters(model)
    output.print_text(
        f"trained parameters {trained / 1e6:.1f} M, frozen {frozen / 1e6:.1f} M in {model.dtype}"
    )

    state = TrainingState(model, tokenizer, optimizer, samples)  # all that changes from here on
    run.begin(state)  # at document 0, or where a checkpoint stands; in all processes alike
    schedule = run.schedule  # which documents make a step, and its learning rate: schedule.py

    def evaluate() -> None:
        try:
            if world.is_main_process:
                scores = evaluation.run(
                    lambda documents: output.bar(
                        run.until_signal(documents), desc="evaluate", leave=False
                    )
                )
                results = [task.summarize() for task in scores]
                run.log(iteration=state.iteration, eval=[result.as_json() for result in results])
                plot_run(run.folder, train.loss, schedule.counts)
                progress.clear()
                if output.prints_text:
                    print_results(results)
        finally:
            run.agree_on_signals()  # here the other processes wait for the first
        run.exit_if_signalled()

    model.train()
    shown = dict(
        desc="train", unit=f" {schedule.counts}", initial=state.iteration, total=train.train_iters
    )
    progress = run.stack.enter_context(output.bar(None, **shown, smoothing=0.1))
    if run.evaluation_missing(state.iteration):
        evaluate()
    for done in run.timed(schedule.steps(state.iteration)):  # documents, this step's included
        # ---- the algorithm -----------------------------------------------------------------------
        nll, scored, tokens, sources = 0.0, 0, 0, []
        # Of the step's documents this process's, cut into chunks; each is shared by the
        # world.chunks.
        stage, size = schedule.stage(done), schedule.size(done)
        with model.sized(size):  # the compressor config's, or one that the stage draws
            taken = samples.take(schedule.documents, world.data, stage)
            for documents in pack_documents(taken, model.chunk_batch):
                names = [document.source for document in documents]
                # Draw the windows, encode, losses, gradients: see uiollms/training/step.py
                with reporting_step_errors(", ".join(names), train):
                    results = gradient_step(
                        model,
                        [document.sample for document in documents],
                        estimator=estimator,
                        rng=[document.rng for document in documents],
                        scale=1 / schedule.documents,
                        report_all=False,
                        group=world.chunks,
                    )
                sources += names
                nll += float(torch.stack([result.nll for result in results]).sum())
                scored += sum(int(result.scored.sum()) for result in results)
                tokens += (
                    sum(document.sample.num_tokens for document in documents)
                    * world.chunks.is_main_process
                )
        world.sum_gradients(parameters)
        nll, scored, tokens = world.sum(nll, scored, tokens)
        norms = gradient_norms(model)
        grad_norm = clip_grad_norm_(parameters, train.clip_grad or math.inf).item()
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(done)
        good = math.isfinite(grad_norm) and math.isfinite(nll)
        lr, mean_nll = optimizer.param_groups[0]["lr"], nll / scored
        if not good:
            sources = [name for names in world.data.all_gather(sources) for name in names]
        with world.watch.undisturbed():  # what follows is done as a whole, or not at all
            if good:
                optimizer.step()
            optimizer.zero_grad()
            # --------------------------------------------------------------------------------------
            state.advance(done, good)
            part = dict(stage=stage + 1, size=size) if train.stages else {}
            if good:
                run.log(
                    iteration=done,
                    nll=mean_nll,
                    lr=lr,
                    grad_norm=grad_norm,
                    grad_norms=norms,
                    tokens=int(tokens),
                    **part,
                )
            else:
                run.log(iteration=done, skipped=sources, lr=lr, **part)
        said = step_text(mean_nll, lr, tokens, run.step_seconds)
        progress.set_postfix_str(said, refresh=False)
        progress.update(schedule.stride)

        run.agree_on_signals()
        if run.saves(state):
            run.save(state)
        run.stop_if_asked(state, sources)
        if run.evaluates(done):
            evaluate()
    progress.close()
    if world.is_main_process and not train.tasks:
        plot_run(run.folder, train.loss, schedule.counts)

    if samples.skipped:
        output.print_text(
            f"{samples.skipped} documents that are blank or fit one chunk were skipped"
        )
    if left := schedule.left_over(state.iteration):
        output.print_text(
            f"the last {left} of {train.train_iters} documents fill no step and were left out"
        )
    if state.skipped_steps:
        output.print_text(
            f"{state.skipped_steps} steps were skipped, their loss or gradient was not finite"
        )
    output.print_text(
        f"metrics and curve.png are in {run.folder}, weights in "
        f"{config.model.save_ckp or 'no file (save_ckp is null)'}"
    )


if __name__ == "__main__":
    sys.exit(reporting_errors(main))
