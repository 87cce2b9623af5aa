"""Commands for answers: drawn for people, rated by people, talked about with both models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from ppolite.cli.place import Recipe_, Run_, Set_, place_of, recipe_of
from ppolite.config import Data
from ppolite.types import Sampling, UserError


def sample(
    recipe: Recipe_,
    *,
    to: Path,
    prompts: int = 20,
    n: int = 4,
    model: str | None = None,
    data: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
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
        temperature: Of sampling; the recipe's ppo.temperature when left out.
        set: Change a key of the recipe. May be repeated.
    """
    place = place_of(recipe, None, set)
    config = place.recipe.ppo
    source = Data(path=data, held_out=0) if data else config.prompts if config else None
    if source is None:
        raise UserError(f"{recipe}: no `ppo.prompts` to take prompts from; name a file with --data")
    sampling = config.sampling if config else Sampling(max_new_tokens=128)
    given = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    sampling = replace(sampling, **{name: value for name, value in given.items() if value is not None})
    if min(prompts, n, sampling.max_new_tokens) < 1 or sampling.temperature <= 0:
        raise UserError("--prompts, --n, --max-new-tokens and --temperature must be above 0")

    from ppolite.stages.opening import round_folders
    from ppolite.stages.sample import sample as draw

    if model is None and Path(recipe).is_dir():
        rounds = [folder / "policy" for folder in reversed(round_folders(place.run_dir))]
        results = (*rounds, place.run_dir / "policy", place.run_dir / "sft")
        model = next((str(folder) for folder in results if folder.exists()), None)
    rows = draw(place.recipe, source, sampling, model=model, count=prompts, n=n, target=to)
    print(f"{rows} candidates in {to}; rate them with `ppolite score {to}`")


def score(file: Annotated[Path, tyro.conf.Positional]) -> None:
    """Rate candidates by hand: 0–9, s skips, u takes back, q leaves. Answers are saved one by one.

    Args:
        file: A jsonl file as `ppolite sample` writes it.
    """
    from ppolite.obs.rate import rate_file

    rate_file(file)


def chat(run: Run_, *, seed: int = 0) -> None:
    """Talk to the model before and after PPO, side by side.

    Args:
        run: A run folder.
        seed: The same seed and lines give the same answers.
    """
    recipe = recipe_of(run)
    from ppolite.stages.chat import chat as talk

    talk(recipe, run, seed=seed)
