"""Whatever bytes, rows, texts and trees there are: a result, or one sentence that names the place."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.faults.kit import COMMANDED, check_sentence
from tests.faults.tables import CSV, GOOD, LINES

from ppolite.config import (
    Recipe,
    load_recipe,
    parse_recipe,
    put,
    read_override,
    recipe_text,
    run_folder,
)
from ppolite.config.strict_yaml import parse
from ppolite.control.config import load_control
from ppolite.data.readers import read_examples, read_preferences, read_prompts, read_rankings, read_scored
from ppolite.data.tables import read_rows
from ppolite.obs.sinks import read_metrics
from ppolite.obs.visible import visible
from ppolite.types import UserError

quick = settings(
    max_examples=40, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = ["prompt", "completion", "response", "score", "chosen", "rejected", "first", "second", "preferred", "responses",
         "scores", "messages", "margin", "origin", "role", "content", "from", "value"]  # fmt: skip
row = st.dictionaries(st.sampled_from(NAMES), json_values | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "", 3]), "content": json_values}), max_size=3
), max_size=6)  # fmt: skip


def refused_or_fine(path: Path, read: Any) -> Any:
    try:
        return read(str(path))
    except UserError as error:
        check_sentence(str(error), path)
        return None


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
@quick
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes(ending: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    path.write_bytes(content)
    refused_or_fine(path, read_rows)


def good_bytes(ending: str, folder: Path) -> bytes:
    if ending != "parquet":
        return {"jsonl": LINES, "json": json.dumps(GOOD), "csv": CSV, "tsv": CSV.replace(",", "\t")}[
            ending
        ].encode()
    pq.write_table(pa.Table.from_pylist(GOOD), folder / "good.parquet")
    return (folder / "good.parquet").read_bytes()


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
@quick
@given(data=st.data())
def test_sound_files_with_wounds(ending: str, data: st.DataObject, tmp_path: Path) -> None:
    path, sound = tmp_path / f"x.{ending}", bytearray(good_bytes(ending, tmp_path))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(sound) - 1))
        sound[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(sound[: data.draw(st.integers(0, len(sound)))])
    refused_or_fine(path, read_examples)


@pytest.mark.parametrize("read", [read_examples, read_scored, read_preferences, read_rankings, read_prompts])
@settings(quick, max_examples=30)
@given(made=st.lists(row, min_size=1, max_size=4), plain=st.booleans())
def test_any_rows(read: Any, made: list[Any], plain: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    result = refused_or_fine(path, lambda source: read(source, plain=plain))
    if result:
        items, report = result
        assert len(items) == report.used == report.rows - len(report.problems)
        assert not any(COMMANDED.search(visible(line, keep="")) for line in report.lines())


@quick
@given(text=st.text(max_size=200) | st.text(alphabet="{}[]&*!:-#'\"|>%@\n\t a1<", max_size=60))
def test_any_text_as_a_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for load in (load_recipe, load_control):
        refused_or_fine(path, load)


KEYS = st.sampled_from([*Recipe.model_fields, "data", "path", "prompts", "optim", "lr", "kl", "beta", "rewards", "kind",
                        "columns", "held_out", "split", "steps", "algorithms", "env"])  # fmt: skip
trees = st.recursive(
    json_values,
    lambda inner: st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=2),
    max_leaves=12,
)


@quick
@given(tree=st.dictionaries(KEYS, trees, max_size=5))
def test_any_tree_as_a_recipe(tree: dict[str, Any]) -> None:
    try:
        parse_recipe(tree, where="r.yaml")
    except UserError as error:
        check_sentence(str(error), "r.yaml")


@quick
@given(text=st.text(max_size=60) | st.text(alphabet=string.ascii_lowercase + ".=[]{}&*!:", max_size=30))
def test_any_override(text: str) -> None:
    tree: dict[str, Any] = {"ppo": {"steps": 3, "rewards": [1]}, "seed": 1}
    try:
        put(tree, *read_override(text))
    except UserError as error:
        check_sentence(str(error), "--set ")


@quick
@given(text=st.text(max_size=60))
def test_any_text_is_visible_and_stays_so(text: str) -> None:
    seen = visible(text)
    assert not COMMANDED.search(seen.replace("\t", ""))
    assert visible(seen) == seen


@settings(quick, max_examples=25)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
)
def test_any_text_in_a_recipe_is_saved_without_force_and_read_again(text: str) -> None:
    data = {"path": text, "columns": {text: text}}
    recipe = parse_recipe({"sft": {"data": data}, "ppo": {"prompts": {"path": "x"}, "start": text}})
    saved = recipe_text(recipe)
    assert not COMMANDED.search(saved)
    assert parse_recipe(parse(saved, "saved")) == recipe


@quick
@given(name=st.text(alphabet="./\\ab:~\n\0\x1b", max_size=12) | st.text(max_size=12))
def test_any_name_stays_inside_runs(name: str, tmp_path: Path) -> None:
    try:
        folder = tmp_path / run_folder(name, "r")
    except UserError:
        return
    assert (tmp_path / "runs") in folder.resolve().parents


@quick
@given(lines=st.lists(json_values | st.fixed_dictionaries(
    {"stage": json_values, "step": json_values}, optional={"score/mean": json_values}), max_size=3))  # fmt: skip
def test_any_metrics(lines: list[Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused_or_fine(tmp_path, read_metrics)
