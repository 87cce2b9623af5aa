"""Reading a recipe's text, and what is said when it is wrong.

    read_tree        a YAML file as plain data
    read_override    KEY=VALUE of the command line;  put: into the data
    explain          one sentence on the first thing that does not fit, with the nearest known key
    recipe_text      the resolved recipe as YAML;  save_recipe: into a file
    run_folder       the place in runs/ that goes with a name;  at_home: a path with its ~

Shared by the recipes of language runs (this package) and of control runs (`control/config.py`).
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from ppolite.config.drafts import drafted
from ppolite.config.section import Section
from ppolite.config.sources import SOURCES, Source
from ppolite.config.strict_yaml import MOST_LEVELS, parse
from ppolite.types import UserError

RECIPES = Path(__file__).parent.parent / "recipes"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


ELSEWHERE = {
    "learning_rate": "lr", "gae_lambda": "lam", "kl_coef": "beta", "init_kl_coef": "beta", "clip_range": "clip",
    "cliprange": "clip", "clip_range_vf": "value_clip", "cliprange_value": "value_clip", "vf_coef": "value_coef",
    "ent_coef": "entropy_coef", "num_ppo_epochs": "epochs", "num_train_epochs": "epochs", "n_epochs": "epochs",
    "num_mini_batches": "minibatches", "response_length": "max_new_tokens", "max_length": "max_tokens",
    "total_timesteps": "steps", "total_episodes": "steps", "n_steps": "rollout", "n_envs": "count", "num_envs": "count",
    "lora_r": "lora_rank", "per_device_train_batch_size": "batch_size", "warmup_ratio": "warmup",
    "target_kl": "kl_target", "model_name_or_path": "model", "reward_model_path": "reward",
}  # fmt: skip
"""What TRL, stable-baselines3 and their neighbours call a key → its last word here."""


def _known_keys(section: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for before, key in zip((None, *path), path, strict=False):
        if isinstance(key, int) or (isinstance(before, int) and key in SOURCES):
            section = SOURCES.get(key, section) if isinstance(key, str) else section
            continue
        if key == "rewards":
            section = Source
            continue
        annotation = section.model_fields[key].annotation if key in section.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            return []
        section = found[0]
    return list(section.model_fields)


def _nearest_key(root: type[BaseModel], at: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """Path of the key that may be meant by `key` in the section `at`; empty where nothing is near.

    Of that name within the section, like one there, or of that name anywhere.
    """
    known, wanted = _known_keys(root, at), ELSEWHERE.get(key, key)
    if wanted in known:
        return (*at, wanted)
    below, anywhere = ([path for path in _paths(root, top) if path[-1] == wanted] for top in (at, ()))
    if below:
        return min(below, key=len)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return (*at, near[0]) if near else min(anywhere, key=len, default=())


def _spelt(path: tuple[Any, ...]) -> str:
    """A path as `--set` has it: an entry of a list of sources is followed by its kind, which no recipe spells there."""
    pairs = zip((None, *path), path, strict=False)
    return ".".join(str(key) for before, key in pairs if not (isinstance(before, int) and key in SOURCES))


def _paths(root: type[BaseModel], at: tuple[Any, ...]) -> Iterator[tuple[str, ...]]:
    """Every key of a section and of those in it, from the top."""
    for key in _known_keys(root, at):
        path = (*at, key)
        if key != "rewards" and not any(isinstance(part, int) for part in path):
            yield path
            yield from _paths(root, path)


def explain(
    error: ValidationError, where: str, root: type[BaseModel], overrides: Sequence[str] = ()
) -> UserError:
    """One sentence on the first thing that is wrong; unknown keys with the nearest one that `root` has.

    Of a key that one of `overrides` has set, that is named, and not `where`.
    """
    # A misspelt key also leaves its right name missing: the misspelling is the better news.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = first["loc"]
    dotted = _spelt(loc)
    for override in overrides:
        key = override.partition("=")[0]
        if dotted and f"{dotted}.".startswith(f"{key}."):
            where = f"--set {_cut(override)}"
    path = _cut(dotted)
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        kind = first.get("ctx", {}).get("tag")
        near = difflib.get_close_matches(str(kind), SOURCES, n=1, cutoff=0.4) if kind else []
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(SOURCES)}"
        return UserError(f"{where}: `{path}` has {f'the kind `{kind}`' if kind else 'no `kind`'}; {hint}")
    if first["type"] == "extra_forbidden":
        *at, key = loc
        near = _spelt(_nearest_key(root, tuple(at), str(key)))
        hint = f"did you mean `{near}`?" if near else f"known here: {', '.join(_known_keys(root, tuple(at)))}"
        return UserError(f"{where}: unknown key `{path}`; {hint}")
    if first["type"] == "missing":
        return UserError(f"{where}: `{path}` is missing; add it")
    if first["type"] == "value_error":
        prefix = f"{path}: " if path else ""
        return UserError(f"{where}: {prefix}{first.get('ctx', {})['error']}")
    found = _SHORT.repr(first["input"])
    if first["type"] == "model_type" and (inside := _known_keys(root, loc)):
        *keys, last = [f"`{path}.{key}`" for key in inside[:3]] + ["another key of it"] * (len(inside) > 3)
        keys = f"{', '.join(keys)} or {last}" if keys else last
        return UserError(f"{where}: `{path}` is {found}, but it is a section; set {keys}")
    return UserError(f"{where}: `{path}` is {found}; {first['msg'][0].lower()}{first['msg'][1:]}")


def _cut(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def read_override(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`, the value being YAML. Raises UserError."""
    key, eq, value = override.partition("=")
    if not eq or not all(key.split(".")) or key.count(".") > MOST_LEVELS:
        raise UserError(f"--set {_cut(override)}: expected KEY=VALUE, for instance --set ppo.steps=20")
    return key, parse(value, f"--set {_cut(override)}:")


def at_home(path: str) -> Path:
    """The path, with `~` for the home folder; as it stands where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place. Raises UserError where a part of it is no section."""
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {_cut(key)}: `{parent}` is no section; set it as a whole")
        tree = cast("dict[str, Any]", child)
    tree[last] = value


def read_tree(path: Path, names: list[str]) -> dict[str, Any]:
    """A YAML file of `key: value` lines as it stands. Raises UserError; `names` are what else could be given."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        control = (RECIPES / "control" / f"{path}.yaml").exists()
        hint = f"`ppolite control {path}` is meant, or a YAML file" if control else "give a YAML file"
        raise UserError(f"{path}: no such recipe; {hint} or one of {', '.join(names)}") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a NUL in the name
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: cannot be read as a text file ({reason}); give a YAML file in UTF-8"
        ) from None
    loaded = parse(text, str(path))
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else type(loaded).__name__
        raise UserError(f"{path}: expected `key: value` lines, found {found}; give a recipe")
    return cast("dict[str, Any]", loaded)


class _Dumper(yaml.SafeDumper):
    """Writes text that a terminal would obey, or that would reorder what one reads, as escapes."""


def _text(dumper: Any, text: str) -> Any:
    quoted = '"' if _OVERRIDES.search(text) or _BREAKS.search(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


_OVERRIDES = re.compile("[\u202a-\u202e\u2066-\u2069]")
_BREAKS = re.compile("[\x85\u2028\u2029]")
_Dumper.add_representer(str, _text)


def recipe_text(recipe: Section) -> str:
    """The resolved recipe as YAML, defaults included. It can be looked at and read again, whatever is in it."""
    return yaml_text(recipe.model_dump(mode="json"))


def yaml_text(value: Any, *, flow: bool = False) -> str:
    """Plain data as YAML; `flow`: on one line."""
    style: dict[str, Any] = {"default_flow_style": True, "width": 1 << 30} if flow else {}
    dump: Any = cast("Any", yaml).dump
    text: str = dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    # PyYAML escapes control characters, and line breaks in quotes, but takes overrides for letters.
    text = _OVERRIDES.sub(lambda found: f"\\u{ord(found[0]):04X}", text)
    return text.removesuffix("...\n").rstrip("\n") if flow else text


def save_recipe(recipe: Section, path: Path) -> None:
    """Write the resolved recipe, so that a later version can repeat the run. Whole or not at all."""
    with drafted(path) as draft:
        draft.write_text(recipe_text(recipe), encoding="utf-8")


def run_folder(name: str, source: object) -> Path:
    """`runs/NAME`. Raises UserError for a name that would lead elsewhere."""
    folder = Path("runs") / name
    inside = os.path.normpath(folder).startswith(f"runs{os.sep}") and not folder.is_absolute()
    if not inside or not name.isprintable():
        raise UserError(f"{source}: its name makes no folder inside runs/; say with --out where results go")
    return folder
