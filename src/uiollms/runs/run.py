"""A training run in its folder: where it begins, when it saves and evaluates, and when it ends.

Only the first of a run's processes touches the folder, and only one run at a time may use it.

<run folder>/config.json, versions.json   the config with all defaults written out; versions, git
                                          revision and machine
             log.txt, metrics.jsonl       events; one line for every step and every evaluation
             tensorboard/, curve.png      the same numbers for TensorBoard and as a plot
             trackers.json, wandb/        the run's names in other trackers (train.log_with), and
                                          wandb's files
             checkpoints/step-00000120/   see state.py
             earlier-1/ ...               files of earlier runs, and files newer than the checkpoint
                                          from which a run was resumed
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from uiollms.config.sections import EnvConfig, MemoryConfig
from uiollms.distributed.groups import World
from uiollms.distributed.watch import LostProcess
from uiollms.files.atomic import (
    clear_leftovers,
    make_folder,
    remove,
    replace_text,
    reporting_write_errors,
    work_path,
)
from uiollms.files.errors import ConfigError
from uiollms.files.folders import run_folder
from uiollms.files.json_files import as_json
from uiollms.kernels.devices import gpus_of
from uiollms.plugins import plugin_versions
from uiollms.runs.checks import check_can_save
from uiollms.runs.environment import device_name, environment
from uiollms.runs.log import RunLog
from uiollms.runs.metrics import ITERATIONS, perplexities, read_metrics
from uiollms.runs.run_files import LOCK, RUN_FILES, locked, next_earlier, put_back, set_aside
from uiollms.runs.signals import StopSignals
from uiollms.runs.state import (
    CheckpointInfo,
    TrainingState,
    all_fields,
    check_same_run,
    is_whole,
    load_state,
    read_info,
    save_state,
    saved_steps,
    seed_generators,
    share_state,
    step_of,
)
from uiollms.training.schedule import Schedule
from uiollms.weights.adapters import save_weights

log = logging.getLogger("uiollms")


@contextmanager
def open_run(
    config: EnvConfig,
    compressor: MemoryConfig,
    env_conf: str | Path,
    resume: str | None,
    restart: bool,
    world: World,
) -> Iterator[Run]:
    """Locks the run folder, and finds and checks the checkpoint to resume from. `Run.begin` then
    changes the folder. If the block ends with a signal or because another process was lost, the
    last whole step is saved.

    resume:  the path of a checkpoint; "" for the newest of the folder, if there is one; None for a
             new run
    restart: begin a new run even if the folder contains an unfinished one

    Raises ConfigError if the folder cannot be used, the checkpoint is damaged or belongs to
    another run, or an unfinished run would be abandoned.
    """
    folder = run_folder(config.train.run_dir, config.model.save_ckp, env_conf)
    with ExitStack() as stack:
        if not world.is_main_process:
            yield Run(folder, config, compressor, None, True, stack, world)
            return
        with reporting_write_errors(folder):
            make_folder(folder)
            fault = "another process is training in this folder; choose another train.run_dir"
            stack.enter_context(locked(folder / LOCK, f"{folder}: {fault}"))
            put_back(folder)
        check_can_save(config.model.save_ckp, stack)
        run = Run(folder, config, compressor, resume, restart, stack, world)
        try:
            yield run
        except (SystemExit, LostProcess):
            run.save_last_step()
            raise


class Run:
    """One training run, which `open_run` makes and `begin` starts. Every process of a run has a
    `Run` and makes the same calls."""

    def __init__(
        self,
        folder: Path,
        config: EnvConfig,
        compressor: MemoryConfig,
        resume: str | None,
        restart: bool,
        stack: ExitStack,
        world: World,
    ) -> None:
        self.folder, self.config, self.compressor = folder, config, compressor
        self.stack, self.world, self.watch = stack, world, world.watch
        self.log, self.signals = RunLog(folder, config.train.loss), StopSignals(world)
        self.checkpoints = folder / "checkpoints"
        self.state: TrainingState | None = None  # set by `begin`
        # The checkpoint from which the run is resumed, and its state.json; None for a new run.
        self.origin: Path | None = None
        self.origin_info: CheckpointInfo | None = None
        saved = saved_steps(self.checkpoints)
        if resume is not None:
            self.origin = Path(resume) if resume else saved[-1] if saved else None
        if self.origin:
            self.origin_info = self.read_checkpoint(self.origin, saved)
            self.changes = check_same_run(self.origin_info, config, compressor, self.origin)
        elif saved and resume is None and not restart:
            self.refuse_unfinished(saved[-1])
        counts, borders = world.broadcast(
            (self.origin_info.counts, self.origin_info.borders)
            if self.origin_info
            else ("documents", ())
        )
        documents = config.train.accum_grad * world.data.size
        self.schedule = Schedule(config.train, documents, counts, borders)

    def read_checkpoint(self, path: Path, saved: list[Path]) -> CheckpointInfo:
        """Checks the files of a checkpoint and returns its state.json. Raises ConfigError, which
        offers the newest whole checkpoint before it, if the checkpoint is damaged."""
        try:
            return read_info(path)
        except ConfigError as error:
            older = [other for other in saved if step_of(other) < step_of(path)]
            whole = next((other for other in reversed(older) if is_whole(other)), None)
            remedy = f"the one before it is whole: --resume {whole}"
            if whole is None:
                remedy = "no other whole checkpoint is there"
            raise ConfigError(f"{error}; {remedy}") from None

    def refuse_unfinished(self, newest: Path) -> None:
        """Raises ConfigError if the run of the folder has not reached its end."""
        progress, finished = str(step_of(newest)), False
        with suppress(ConfigError):  # a run whose newest checkpoint is damaged is not finished
            schedule = read_info(newest).schedule
            progress += f" of {schedule.train.train_iters} {schedule.counts}"
            finished = not schedule.steps(step_of(newest))
        if not finished:
            raise ConfigError(
                f"{self.folder}: contains an unfinished run, {progress} done; continue it with "
                "--resume, or begin a new run with --restart (the files of the unfinished one then "
                f"move to {next_earlier(self.folder).name}/)"
            )

    def begin(self, state: TrainingState) -> None:
        """Gives all processes the state of the checkpoint, or that of the first process in a new
        run, and opens the folder's files. From here on SIGINT and SIGTERM let the step finish."""
        seed_generators(self.config.train.seed)
        if self.origin and self.origin_info:
            load_state(state, self.origin, self.origin_info)
        share_state(state, self.world)
        state.take_snapshot()
        if self.world.is_main_process:
            self.open_files(state)
        self.state = state
        self.watch.begin()

    def open_files(self, state: TrainingState) -> None:
        """Moves files that do not belong to this run out of the way, and writes those that describe
        it."""
        with reporting_write_errors(self.folder):
            if self.origin and self.origin.resolve().parent == self.checkpoints.resolve():
                saved = saved_steps(self.checkpoints)
                others = [path for path in saved if step_of(path) > state.iteration]
            else:
                others = [self.folder / name for name in RUN_FILES if (self.folder / name).exists()]
            if others:
                target = set_aside(self.folder, others)
                log.info("moved %s to %s", ", ".join(path.name for path in others), target)
            make_folder(self.checkpoints)
            clear_leftovers(self.checkpoints)
        self.stack.callback(self.log.close)
        self.log.gpus = gpus_of(state.model)
        self.environment = environment() | {
            "dtype": str(state.model.dtype),
            "device": device_name(self.log.gpus),
            "processes": str(self.world.size),
            **plugin_versions(self.config.train.tasks, self.config.train),
        }
        constants = all_fields(self.config, self.compressor)
        constants |= {f"environment.{name}": value for name, value in self.environment.items()}
        resumed, log_with = self.origin is not None, self.config.train.log_with
        self.log.open(state.iteration, resumed, log_with, constants)
        with reporting_write_errors(self.folder):
            replace_text(self.folder / "config.json", self.config.model_dump_json(indent=4) + "\n")
            versions = as_json(self.environment | {ITERATIONS: self.schedule.counts}, indent=4)
            replace_text(self.folder / "versions.json", versions + "\n")
        if self.origin_info:
            self.log_changes(self.origin_info.environment, state.iteration)

    def log_changes(self, before: dict[str, str | None], iteration: int) -> None:
        """Logs what differs from the checkpoint: fields of the config, versions and machine."""
        total, counts = self.config.train.train_iters, self.schedule.counts
        log.info("resumed from %s after %d of %d %s", self.origin, iteration, total, counts)
        changes = [
            f"{name}: {before.get(name)} -> {now}"
            for name, now in self.environment.items()
            if before.get(name) != now
        ]
        for change in (*self.changes, *changes):
            log.info("changed since the checkpoint: %s", change)

    # ---- saving and evaluating -------------------------------------------------------------------

    def should_evaluate(self, iteration: int) -> bool:
        """Whether an evaluation follows the step that ended at `iteration`: it does at the first
        step that reaches a multiple of `eval`, and at the end."""
        train, schedule = self.config.train, self.schedule
        return bool(train.tasks) and (
            schedule.reaches(iteration, train.eval) or not schedule.steps(iteration)
        )

    def evaluation_missing(self, iteration: int) -> bool:
        """Whether the run was stopped between a checkpoint and the evaluation that follows it."""
        missing = False
        if self.origin_info and self.config.train.tasks:
            # A step of the earlier process may have had another number of documents.
            last = replace(self.schedule, documents=self.origin_info.documents)
            due = last.reaches(iteration, self.config.train.eval) or not self.schedule.steps(
                iteration
            )
            lines = [line for line in read_metrics(self.folder) if line["iteration"] == iteration]
            missing = due and not any("eval" in line for line in lines)
        return self.world.broadcast(missing)

    def should_save(self, state: TrainingState) -> bool:
        """Whether a checkpoint follows the step, which is the same in all processes: it does at the
        first step that reaches a multiple of `save`, before an evaluation, at the end, and before
        the run stops."""
        iteration, schedule = state.iteration, self.schedule
        return (
            not schedule.steps(iteration)
            or schedule.reaches(iteration, self.config.train.save)
            or self.should_evaluate(iteration)
            or self.must_stop(state)
        )

    def save(self, state: TrainingState) -> None:
        """Writes the weights to `save_ckp`, then the whole state to a checkpoint, and delete older
        checkpoints beyond `keep_last`. Raises ConfigError if the disk is full; the older
        checkpoints then stay."""
        if self.world.is_main_process:
            with self.watch.uninterrupted():
                self.write_checkpoint(state)

    def write_checkpoint(self, state: TrainingState) -> None:
        if self.config.model.save_ckp:
            save_weights(state.model, self.config.model.save_ckp)
        self.log.sync()  # no checkpoint is ahead of metrics.jsonl
        save_state(
            state, self.schedule, self.checkpoints, self.config, self.compressor, self.environment
        )
        saved = saved_steps(self.checkpoints)
        best = self.best(saved) if self.config.train.keep_best else None
        with reporting_write_errors(self.checkpoints):
            for path in saved[: -self.config.train.keep_last]:
                if path != best:
                    discarded = work_path(self.checkpoints)
                    path.rename(discarded)  # a partly removed folder is no checkpoint
                    remove(discarded)

    def best(self, saved: list[Path]) -> Path | None:
        """The checkpoint with the lowest perplexity of the first task, None if none has one."""
        perplexity = perplexities(self.folder)
        evaluated = [path for path in saved if step_of(path) in perplexity]
        return min(evaluated, key=lambda path: perplexity[step_of(path)], default=None)

    # ---- stopping --------------------------------------------------------------------------------

    def must_stop(self, state: TrainingState) -> bool:
        """Whether the run ends now, after a signal or too many bad steps in a row."""
        return (
            self.signals.agreed is not None or state.bad_in_a_row >= self.config.train.max_bad_steps
        )

    def stop_if_necessary(self, state: TrainingState, sources: list[str]) -> None:
        """Raises SystemExit after a signal, or ConfigError after too many bad steps in a row, which
        names the last step's documents `sources`. All processes must call this, after a save."""
        if not self.must_stop(state):
            return
        # Launchers end all processes once one has ended, so all wait until the first has saved.
        self.world.barrier()
        if state.bad_in_a_row >= self.config.train.max_bad_steps:
            raise ConfigError(
                f"{self.folder}: the loss or gradient of {state.bad_in_a_row} steps in a row was "
                f"not finite, the last at iteration {state.iteration} on {', '.join(sources)}; "
                "none of them changed the weights, which are saved; lower train.max_lr, or look at "
                "the documents that metrics.jsonl names"
            )
        self.signals.exit_if_agreed()

    def save_last_step(self) -> None:
        """Saves the last whole step, if it is not saved yet, before the first process exits, and
        log how the run can be continued."""
        self.watch.leaving = True
        state, saved = self.state, saved_steps(self.checkpoints)
        if state and state.iteration > (step_of(saved[-1]) if saved else 0):
            try:
                self.save(state)
            except ConfigError as error:  # the signal or loss that ended the run is reported too
                log.warning("%s", error)
            else:
                log.info("saved iteration %d, the last whole step", state.iteration)
        self.signals.log_signal(resumable=state is not None)
