"""Train the memory of a frozen language model with UIO-TBPTT or another gradient estimator.

python train.py --demo
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
    import uiollms.cli.common  # noqa: F401  # imports torch and transformers, too
except ImportError as error:
    how = "`make setup` and then .venv/bin/python, or `pip install -e .` in your own environment"
    sys.exit(f"{error}; run {how}: see Set-up in README.md")

import torch

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
from uiollms.training.estimators import configured_estimator
from uiollms.training.failures import reporting_step_errors
from uiollms.training.optimizer import (
    apply_gradients,
    clip_gradients,
    gradient_norms,
    make_optimizer,
)
from uiollms.training.step import gradient_step
from uiollms.training.weighting import weigh_tokens
from uiollms.weights.adapters import load_weights


def main(arguments: list[str] | None = None) -> int | None:
    args = parse_arguments(__doc__, arguments)
    if args.dry_run:  # reads no data and writes nothing
        config = load_env_config(args.env_conf, args.set, partial(check_env, path=args.env_conf))
        return dry_run(config, args.env_conf, args.device_memory, args.output)
    check = partial(check_training, path=args.env_conf, resumes=args.resume is not None)
    with watching(number_of_processes() > 1) as watch:
        config = load_env_config(args.env_conf, args.set, check)
        compressor = check(config)
        with open_world(config, watch) as world:
            config = choose_chunk_batch(config, args.env_conf, world)
            with open_run(
                config, compressor, args.env_conf, args.resume, args.restart, world
            ) as run:
                run.log.echo = args.output.print_json_line
                output = args.output if world.is_main_process else SILENT
                fit(config, args.env_conf, run, world, output)
    return 0


def fit(config: EnvConfig, env_conf: str | Path, run: Run, world: World, output: Output) -> None:
    """Trains the model of `config`, from the start or from the checkpoint that the run resumes."""
    train = config.train
    model, tokenizer = load_memory_lm(config, env_conf)
    model.compile_encoder = train.compile_encoder
    if config.model.load_ckp:
        load_weights(model, config.model.load_ckp, any_sizes=True)
    samples = SampleStream(config, tokenizer, model, partial(weigh_tokens, model))
    estimator = configured_estimator(train)
    optimizer = make_optimizer(model, train)
    parameters = list(model.trainable_parameters().values())
    evaluation = Evaluation(model, tokenizer, train.tasks if world.is_main_process else ())
    trained, frozen = count_parameters(model)
    output.print_text(
        f"trained parameters {trained / 1e6:.1f} M, frozen {frozen / 1e6:.1f} M in {model.dtype}"
    )

    state = TrainingState(model, tokenizer, optimizer, samples)  # all that training changes
    run.begin(state)  # restores a checkpoint, if the run resumes one, in all processes
    schedule = run.schedule  # how many documents a step takes, and its learning rate
    progress = run.stack.enter_context(  # closed with the run, also after an error
        output.bar(
            None,
            desc="train",
            unit=f" {schedule.counts}",
            initial=state.iteration,
            total=train.train_iters,
            smoothing=0.1,
        )
    )

    def evaluate() -> None:
        try:
            if world.is_main_process:
                scores = evaluation.run(
                    lambda documents: output.bar(
                        run.signals.until_signal(documents), desc="evaluate", leave=False
                    )
                )
                results = [task.summarize() for task in scores]
                run.log.add(
                    iteration=state.iteration, eval=[result.as_json() for result in results]
                )
                plot_run(run.folder, train.loss, schedule.counts)
                progress.clear()
                if output.prints_text:
                    print_results(results)
        finally:
            # While the main process evaluates, the others wait for it here.
            run.signals.agree()
        run.signals.exit_if_agreed()

    model.train()
    if run.evaluation_missing(state.iteration):
        evaluate()
    # `iteration` is the number of documents that have been trained on at the end of the step.
    for iteration in run.log.timed(schedule.steps(state.iteration)):
        # ---- the algorithm -----------------------------------------------------------------------
        nll, scored, tokens, sources = 0.0, 0, 0, []
        stage, size = schedule.stage(iteration), schedule.size(iteration)
        with model.sized(size):  # chunk size and number of slots, if the stage varies them
            # This process takes its part of the step's documents, cut into chunks. Processes of
            # the same group `world.chunks` take the same documents and divide their chunks.
            documents = samples.take(schedule.documents, world.data, stage)
            for batch in pack_documents(documents, model.chunk_batch):
                batch_sources = [document.source for document in batch]
                with reporting_step_errors(", ".join(batch_sources), train):
                    # src/uiollms/training/step.py draws a weight matrix for each document (for
                    # "tbptt" and "uio" from a reservoir of S chunks) and then
                    # 1. encodes all chunks into memories, without a graph,
                    # 2. decodes each chunk with the memories of the chunks before it, computes the
                    #    losses, and their gradients at the memories' keys and values,
                    # 3. goes backward through the projections, to the decoder's LoRA and memories,
                    # 4. encodes the chunks whose weights are not zero again, with a graph, and goes
                    #    backward to the encoder's LoRA. All gradients are added to `.grad`.
                    results = gradient_step(
                        model,
                        [document.sample for document in batch],
                        estimator=estimator,
                        rng=[document.rng for document in batch],
                        scale=1 / schedule.documents,
                        report_all=False,
                        group=world.chunks,
                    )
                sources += batch_sources
                nll += float(torch.stack([result.nll for result in results]).sum())
                scored += sum(int(result.scored.sum()) for result in results)
                if world.chunks.is_main_process:  # so that each document counts once
                    tokens += sum(document.sample.num_tokens for document in batch)
        world.sum_gradients(parameters)  # over all processes
        nll, scored, tokens = world.sum(nll, scored, tokens)
        norms, lr = gradient_norms(model), schedule.learning_rate(iteration)
        grad_norm = clip_gradients(optimizer, train.clip_grad).item()
        mean_nll = nll / scored
        finite = math.isfinite(grad_norm) and math.isfinite(nll)
        if not finite:
            sources = [name for names in world.data.all_gather(sources) for name in names]
        with world.watch.uninterrupted():  # a signal takes effect after this block
            if finite:
                apply_gradients(optimizer, lr)
            else:
                optimizer.zero_grad()  # the step is skipped
            # --------------------------------------------------------------------------------------
            state.advance(iteration, finite)
            stage_fields = {"stage": stage + 1, "size": size} if train.stages else {}
            if finite:
                run.log.add(
                    iteration=iteration,
                    nll=mean_nll,
                    lr=lr,
                    grad_norm=grad_norm,
                    grad_norms=norms,
                    tokens=int(tokens),
                    **stage_fields,
                )
            else:
                run.log.add(iteration=iteration, skipped=sources, lr=lr, **stage_fields)
        words = step_text(mean_nll, lr, tokens, run.log.step_seconds)
        progress.set_postfix_str(words, refresh=False)
        progress.update(schedule.stride)

        run.signals.agree()  # all processes learn if one has received SIGINT or SIGTERM
        if run.should_save(state):  # also before the run stops
            run.save(state)
        run.stop_if_necessary(state, sources)  # after a signal, or too many steps not finite
        if run.should_evaluate(iteration):
            evaluate()
    progress.close()
    if world.is_main_process and not train.tasks:
        plot_run(run.folder, train.loss, schedule.counts)

    if samples.skipped:
        output.print_text(
            f"{samples.skipped} documents were skipped: they are blank or fit one chunk"
        )
    if left := schedule.left_over(state.iteration):
        output.print_text(
            f"the last {left} of {train.train_iters} documents do not fill a step and were left out"
        )
    if state.skipped_steps:
        output.print_text(
            f"{state.skipped_steps} steps were skipped: their loss or gradient was not finite"
        )
    output.print_text(
        f"metrics and curve.png are in {run.folder}, weights in "
        f"{config.model.save_ckp or 'no file (save_ckp is null)'}"
    )


if __name__ == "__main__":
    sys.exit(reporting_errors(main))
