"""Talk to the SFT model and the trained policy at once, side by side; each keeps its own history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ppolite.config import Recipe
from ppolite.data.chat import encode_prompt
from ppolite.obs.visible import visible
from ppolite.stages.evaluate import finished
from ppolite.types import Message, Prompt, Rollout

HELP = "Enter sends, /new forgets the conversation, /quit (or Ctrl-D) leaves."


def chat(recipe: Recipe, run_dir: Path, *, ask: Callable[[str], str] = input, seed: int = 0) -> None:
    """Read a line, show both answers, until /quit or end of input."""
    run = finished(recipe, run_dir)
    opened, roles, held = run.opened, run.roles, run.held
    assert recipe.ppo is not None
    room = opened.context - recipe.ppo.max_new_tokens
    plain = not (held and held[0].messages)
    system = [m for m in (held[0].messages if held else ()) if m["role"] == "system"]
    speakers = {
        name: opened.generator(body)
        for name, body in {"before (SFT)": roles.reference, "after (PPO)": roles.policy}.items()
    }
    console = Console()
    console.print(HELP)
    if held:
        console.print(f"A prompt of the kind it was trained on: {escape(visible(held[0].last))}")
    histories: dict[str, list[Message]] = {name: list(system) for name in speakers}
    turn = 0
    while (line := _line(ask)) is not None:
        if line == "/new":
            histories = {name: list(system) for name in speakers}
            continue
        if not line:
            continue
        table = Table(*speakers, expand=True)
        answers = []
        for name, generator in speakers.items():
            turns, dropped = histories[name], 0
            prompt = _prompt(turns, line, plain)
            while len(encode_prompt(opened.tokenizer, prompt)) > room and len(turns) > len(system):
                turns = [*system, *turns[len(system) + 2 :]]  # without the oldest question and its answer
                dropped += 1
                prompt = _prompt(turns, line, plain)
            if len(encode_prompt(opened.tokenizer, prompt)) > room:
                answers.append(
                    f"(too long: the model takes {opened.context:,} tokens, the answer's among them)"
                )
                continue
            rollout: Rollout = generator.generate([prompt], recipe.ppo.sampling, seed=seed + turn)[0]
            said: Message = {"role": "user", "content": line}
            histories[name] = [*turns, said, {"role": "assistant", "content": rollout.text}]
            forgot = f"({dropped} older turns forgotten)\n" if dropped else ""
            answers.append(escape(forgot + visible(rollout.text)))
        table.add_row(*answers)
        console.print(table)
        turn += 1


def _prompt(turns: list[Message], line: str, plain: bool) -> Prompt:
    return Prompt(text=line) if plain else Prompt(messages=(*turns, {"role": "user", "content": line}))


def _line(ask: Callable[[str], str]) -> str | None:
    try:
        line = ask("you> ").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line
