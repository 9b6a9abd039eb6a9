"""Evaluate a model with memory on the tasks of test.json, or of another file that the config names
in the field `test`.

python test.py --demo
python test.py --env_conf smollm2-8x.json
python test.py --env_conf smollm2-8x.json --use_env_conf_tasks
python test.py --env_conf smollm2-8x.json --quiet --json | python -m json.tool
"""

import sys
import tempfile
from functools import partial

try:
    import uiollms.cli.common  # noqa: F401  # imports torch and transformers, too
except ImportError as error:
    how = "`make setup` and then .venv/bin/python, or `pip install -e .` in your own environment"
    sys.exit(f"{error}; run {how}: see Set-up in README.md")

from uiollms.build import describe_weights, find_weights, load_found_weights, load_memory_lm
from uiollms.cli.common import parse_arguments, reporting_errors
from uiollms.config.load import load_env_config
from uiollms.evaluation.evaluator import Evaluation
from uiollms.evaluation.saved_results import save_token_nlls
from uiollms.files.atomic import atomic_file, make_folder, reporting_write_errors
from uiollms.files.folders import run_folder
from uiollms.files.json_files import as_json
from uiollms.kernels.devices import gpus_of
from uiollms.planning.planner import choose_chunk_batch
from uiollms.plugins import plugin_versions
from uiollms.reports.plots import plot_results
from uiollms.reports.tables import print_results
from uiollms.runs.checks import check_evaluation
from uiollms.runs.environment import device_name, environment


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(__doc__, arguments, evaluation=True)
    check = partial(check_evaluation, path=args.env_conf, env_conf_tasks=args.use_env_conf_tasks)
    config = load_env_config(args.env_conf, args.set, check)
    tasks = check(config)
    config = choose_chunk_batch(config, args.env_conf)
    folder = run_folder(config.train.run_dir, config.model.save_ckp, args.env_conf)
    with reporting_write_errors(folder):  # checked now rather than after hours of scoring
        make_folder(folder)
        tempfile.NamedTemporaryFile(dir=folder).close()
    model, tokenizer = load_memory_lm(config, args.env_conf)
    weights = find_weights(config)
    if weights:
        load_found_weights(model, config, weights)
    args.output.print_text(describe_weights(weights, model))

    evaluation = Evaluation(model, tokenizer, tasks)
    scores = evaluation.run(
        lambda documents: args.output.bar(documents, desc="evaluate", leave=False)
    )
    results = [task.summarize() for task in scores]
    if args.output.prints_text:
        print_results(results)
    versions = environment() | {"dtype": str(model.dtype), "device": device_name(gpus_of(model))}
    versions |= plugin_versions(tasks)
    about = {
        "weights": weights and str(weights),
        "config": config.model_dump(mode="json"),
        "versions": versions,
    }
    contents = about | {"results": [result.as_json() for result in results]}
    args.output.print_json_line(as_json(contents))
    text = as_json(contents, indent=4) + "\n"
    with reporting_write_errors(folder):
        # Both files are complete before either replaces an older one. test.json is renamed first,
        # because it marks the folder as a run's.
        with (
            atomic_file(folder / "test-nll.safetensors") as work_nlls,
            atomic_file(folder / "test.json") as work,
        ):
            save_token_nlls(scores, work_nlls, test_json=text)
            work.write_text(text, encoding="utf-8")
        plot = plot_results(results, folder / "test.png")
    args.output.print_text(
        f"written to {folder}: test.json (all numbers), test-nll.safetensors (every token's NLL)"
        + ", test.png" * (plot is not None)
    )


if __name__ == "__main__":
    sys.exit(reporting_errors(main))
