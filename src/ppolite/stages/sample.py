"""Several candidate answers a prompt, into a jsonl with an empty `score`: where human feedback enters.

Left out: several models in one file; sample twice and join the lines.

    ppolite sample recipes/film.yaml --prompts 20 --n 4 --to candidates.jsonl
    ppolite score candidates.jsonl
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from ppolite.config import Data, Recipe
from ppolite.config.drafts import draft_of, drafted
from ppolite.models.trunk import Body
from ppolite.obs.sinks import progress
from ppolite.stages.opening import open_model
from ppolite.stages.rows import load_prompts
from ppolite.stages.seeds import derive_seed
from ppolite.types import Sampling, UserError

log = logging.getLogger("ppolite")


def sample(
    recipe: Recipe,
    data: Data,
    sampling: Sampling,
    *,
    model: str | None,
    count: int,
    n: int,
    target: Path,
    round: int = 1,  # noqa: A002
) -> int:
    """Write `count` prompts × `n` candidates of `model` (default: the recipe's). Returns how many rows.

    Each round takes the next prompts, from the first again after the last, and draws anew.
    """
    if target.exists():
        raise UserError(f"{target}: is there already, perhaps with scores in it; name another file")
    if target.suffix != ".jsonl":
        raise UserError(f"{target}: candidates are written as JSON lines; give it the ending .jsonl")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft_of(target).touch()
        draft_of(target).unlink()
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written there ({error.strerror}); choose another place"
        ) from None
    opened = open_model(recipe, model)
    prompts, _ = load_prompts(data, opened, sampling.max_new_tokens, recipe.seed)
    first, most = (round - 1) * count, len(prompts)
    if most < count or (round > 1 and first + count > most):
        log.warning("%s: %d prompts to draw from; %d × %d are asked for", data.path, most, round, count)
    chosen = [prompts[i % most] for i in range(first, first + min(count, most)) for _ in range(n)]
    body = Body.of(opened.model, 0, dtype=opened.dtype)
    body.hold({})
    with progress("sample", total=len(chosen)) as tick:
        generator = opened.generator(body, tick=tick)
        seed = derive_seed(recipe.seed, "sample") + round - 1
        rollouts = generator.generate(chosen, sampling, seed=seed)
    rows = [
        {
            "prompt": list(r.prompt.messages) or r.prompt.text,
            "response": r.text,
            "score": None,
            "finish": r.finish,
            "model": opened.source,
        }
        for r in rollouts
    ]
    with drafted(target) as draft:
        draft.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    return len(rows)
