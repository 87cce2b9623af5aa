"""The guide keeps its word: its code runs and prints what stands there, its links lead somewhere, its commands exist.

A ```python block is run as it stands, the blocks of a page one after another in one namespace. Every line that it
prints must be shown: one with ` | ` in it as the beginning of a row of a table on the page, the others, in order, as
comments of the block:

    print(f"{loss:.2f}")  # → −0.12

A ```sh block is read by the command line's own parser and its `--set` by the recipe's; nothing of it is run.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
from matplotlib.mathtext import MathTextParser

from ppolite import cli
from ppolite.config import load_recipe
from ppolite.control.config import load_control

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide"
PAGES = sorted(GUIDE.rglob("*.md"))
CHAPTERS = [page for page in PAGES if page.name != "README.md"]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"^\$\$\n(.*?)^\$\$$", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"# → (.*)$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(GUIDE)))
each_chapter = pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: str(page.relative_to(GUIDE)))


def blocks(text: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(text) if name == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def plain(text: str) -> str:
    """The minus sign of the prose is the hyphen of `print`."""
    return text.replace("−", "-").strip()


# ---- code --------------------------------------------------------------------------------------------------


def check_code(text: str) -> None:
    """Runs a page's blocks. Raises AssertionError where they print something else than the page shows."""
    space: dict[str, Any] = {"__name__": "guide"}
    tables = [plain(line) for line in prose(text).splitlines() if line.startswith("| ")]
    for code in blocks(text, "python"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "guide", "exec"), space)
        printed = [plain(line) for line in out.getvalue().splitlines()]
        rows = [line for line in printed if " | " in line]
        assert [plain(line) for line in SHOWN.findall(code)] == [x for x in printed if x not in rows]
        assert contains(tables, rows), f"no table of the page has these rows, one under another: {rows}"


def contains(tables: list[str], rows: list[str]) -> bool:
    """Whether `rows` begin consecutive lines of `tables`."""
    starts = range(len(tables) - len(rows) + 1)
    return any(all(tables[i + j].startswith(f"| {row} |") for j, row in enumerate(rows)) for i in starts)


@each_page
def test_code_prints_what_is_shown(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # some read docs/results
    check_code(page.read_text(encoding="utf-8"))


def page_of(code: str, table: str = "") -> str:
    return f"{table}\n\n```python\n{code}\n```\n"


@pytest.mark.parametrize(
    "text",
    [
        page_of("print(0.1 + 0.2)  # → 0.3"),  # another number
        page_of("print(1)"),  # not shown
        page_of("x = 1  # → 1"),  # not printed
        page_of("print(1)  # → 1\nprint(2)  # → 3"),  # the second one
        page_of("for x in (1, 2): print(f'{x} | {x * x}')", "| 1 | 1 |\n| 2 | 5 |"),
        page_of("for x in (1, 2): print(f'{x} | {x * x}')", "| 2 | 4 |\n| 1 | 1 |"),  # another order
        page_of("for x in (1, 2): print(f'{x} | {x * x}')"),  # no table
        page_of("assert 1 == 2"),
    ],
)
def test_a_wrong_page_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        check_code(text)


def test_a_right_page_passes() -> None:
    check_code(
        page_of("print(-1)  # → −1\nprint(f'{1} | {-2}')", "| x | y | z |\n|---|---|---|\n| 1 | −2 | so |")
    )


# ---- commands ----------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The lines of a page's ```sh blocks as words, without comments."""
    code = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


def parsed(command: str, words: list[str]) -> dict[str, Any]:
    """What a command's function would be called with. Raises SystemExit where the parser would refuse."""
    function = getattr(cli, command, None) or getattr(cli, f"{command}_")
    given: Callable[..., dict[str, Any]] = functools.wraps(function)(lambda **arguments: arguments)
    return tyro.cli(given, args=words)


def check_command(words: list[str]) -> None:
    match words:
        case ["ppolite", command, *rest]:
            arguments = parsed(command, rest)
            sets = arguments.get("set", ())
            if command == "control":
                load_control(arguments["env"], algorithm=arguments["algorithm"], overrides=sets)
            else:
                source = str(arguments.get("recipe", "film"))
                load_recipe("film" if source.startswith("runs/") else source, sets)
        case ["python", "-m", module, *options]:
            script = ROOT / f"{module.replace('.', '/')}.py"
            shared = (ROOT / "experiments" / f"{name}.py" for name in ("result", "training"))
            known = "".join(path.read_text(encoding="utf-8") for path in (script, *shared))
            assert all(f'"{option}"' in known for option in options if option.startswith("--")), words
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case _:
            raise AssertionError(f"{shlex.join(words)}: no command that this test knows")


@each_page
def test_commands_exist(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "ppolite fly",
        "ppolite run film --fast",
        "ppolite run",
        "ppolite ppo film --set ppo.objectives=kl",
        "ppolite ppo film --set ppo.objective=trpo",
        "ppolite run recipes/nowhere.yaml",
        "ppolite control CartPole-v1 --algorithm trpo",
        "python -m experiments.nowhere",
        "python -m experiments.leash --faster",
        "make coffee",
        "rm -r runs",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((AssertionError, AttributeError, OSError, SystemExit, cli.UserError)):
        check_command(shlex.split(line))


# ---- links, formulas, parts --------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def defines(source: Path, name: str) -> bool:
    pattern = rf"^\s*(def|class) {name}\b|^\s*{name}\b\s*[:=]"
    return re.search(pattern, source.read_text(encoding="utf-8"), re.MULTILINE) is not None


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """To files and headings that are there; and `name` to a Python file that defines it."""
    for _, label, target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), target
        name = re.fullmatch(r"`(\w+)`", label)
        if name and file.suffix == ".py":
            assert defines(file, name[1]), f"{target} defines no {name[1]}"


@each_page
def test_formulas_are_well_formed(page: Path) -> None:
    """As far as matplotlib can tell; and without what GitHub's Markdown swallows or refuses."""
    text = prose(page.read_text(encoding="utf-8"))
    assert "```" not in text, "a block is not closed"
    parser = MathTextParser("path")
    for formula in FORMULA.findall(text):
        assert not re.search(r"\\[^a-zA-Z]|\\operatorname", formula), formula
        parser.parse(f"${' '.join(formula.split())}$")
    without = re.sub(r"`[^`]*`", "", FORMULA.sub("", text))
    assert "$" not in without, "formulas stand between lines of $$"


@each_chapter
def test_a_chapter_has_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    rest = prose(text)
    assert FORMULA.search(rest)
    assert blocks(text, "python")
    assert re.search(r"^\|---", rest, re.MULTILINE)
    links = [(mark, target) for mark, _, target in LINK.findall(rest)]
    assert any(mark and "docs/results" in str((page.parent / to).resolve()) for mark, to in links)
    assert any("/src/ppolite/ops/" in target for _, target in links)
    assert re.search(r"^## (What people get wrong|.*误)", rest, re.MULTILINE)


@pytest.mark.parametrize("folder", [GUIDE, GUIDE / "zh"], ids=["en", "zh"])
def test_every_figure_is_shown(folder: Path) -> None:
    """What an experiment draws and no chapter shows, nobody sees."""
    pages = "".join(page.read_text(encoding="utf-8") for page in folder.glob("*.md"))
    figures = sorted(path.name for path in (ROOT / "docs" / "results").glob("*.png"))
    assert figures
    assert [name for name in figures if f"docs/results/{name})" not in pages] == []


def test_both_languages_have_every_chapter() -> None:
    english = {page.name for page in GUIDE.glob("*.md")}
    assert english == {page.name for page in (GUIDE / "zh").glob("*.md")}
    assert len(english) == 7


def loss_of(ratio: float, advantage: float, page: Path) -> str:
    """The loss in the row of the chapter's table that begins with ratio and advantage."""
    rows = [
        [plain(cell) for cell in line.strip("|").split("|")] for line in page.read_text("utf-8").splitlines()
    ]
    return next(row[2] for row in rows if row[:2] == [str(ratio), str(advantage)])


@pytest.mark.parametrize("folder", [GUIDE, GUIDE / "zh"], ids=["en", "zh"])
def test_the_worked_example(folder: Path) -> None:
    """R = .6, V = .5, ε = .2, by hand: −min(ρA, clip(ρ, .8, 1.2) A); at ρ = .7 it is −.07, not −.08."""
    page = folder / "5-ppo2-clip.md"
    assert loss_of(1.3, 0.1, page) == "-0.12"
    assert loss_of(0.7, 0.1, page) == "-0.07"
    assert loss_of(0.7, -0.1, page) == "0.08"
    assert loss_of(1.3, -0.1, page) == "0.13"
    assert ("Recommend a book" if folder == GUIDE else "推荐一本书") in page.read_text(encoding="utf-8")
