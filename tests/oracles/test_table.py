"""docs/oracles.md says who vouches for what, and nothing public in `ops` is without two who do.

`make oracles ARGS=--write` writes its generated part again.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import ppolite.ops

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "oracles.md"
MARK = "<!-- From here on written by `make oracles ARGS=--write`, and compared by `make oracles`. -->\n"

# Oracles that `make test` runs: loops and identities in float64, hand arithmetic, torch.distributions.
ELSEWHERE = {
    "td": ("loop", "test_advantages.py::test_td_against_loops"),
    "monte_carlo": ("loop", "test_advantages.py::test_td_against_loops"),
    "td_lambda": ("loop", "test_advantages.py::test_td_lambda_and_gae_against_loops"),
    "gae": ("loop", "test_advantages.py::test_td_lambda_and_gae_against_loops"),
    "Steps": ("loop", "test_advantages.py::test_responses_against_loops"),
    "vtrace": ("loop", "test_advantages.py::test_vtrace_against_loops"),
    "log_weights": ("loop", "test_importance.py::test_against_loops"),
    "truncated_weights": ("hand", "test_importance.py::test_truncation"),
    "effective_sample_size": (
        "identity",
        "test_importance.py::test_effective_sample_size_is_that_of_the_coefficient_of_variation",
    ),
    "policy_gradient_loss": (
        "identity",
        "test_policy_gradient.py::test_on_fresh_data_it_is_the_gradient_of_the_return",
    ),
    "importance_weighted_loss": (
        "identity",
        "test_policy_gradient.py::test_which_weights_are_exact_on_another_policys_data",
    ),
    "clip_loss": ("identity", "test_losses.py::test_the_limits_of_both_are_the_unclipped_surrogate"),
    "kl_penalty_loss": ("loop", "test_losses.py::test_kl_penalty_from_samples_against_a_loop"),
    "value_loss": ("hand", "test_losses.py::test_value_loss_by_hand"),
    "explained_variance": ("hand", "test_losses.py::test_explained_variance"),
    "kl_estimate": ("hand", "test_kl.py::test_one_sample_by_hand"),
    "categorical_kl": ("torch", "test_kl.py::test_exact_divergences_against_pytorch"),
    "categorical_entropy": ("torch", "test_kl.py::test_exact_divergences_against_pytorch"),
    "gaussian_kl": ("torch", "test_kl.py::test_exact_divergences_against_pytorch"),
    "gaussian_entropy": ("torch", "test_kl.py::test_exact_divergences_against_pytorch"),
    "gaussian_logprob": ("torch", "test_kl.py::test_exact_divergences_against_pytorch"),
    "AdaptiveLeash": ("hand", "test_kl.py::test_adaptive_leash_by_hand"),
    "AdaptivePenalty": ("hand", "test_kl.py::test_adaptive_penalty_by_hand"),
    "masked_sum": ("hand", "test_masked.py::test_hand_arithmetic"),
    "masked_mean": ("loop", "test_masked.py::test_statistics_are_those_of_the_selected_values"),
    "masked_var": ("loop", "test_masked.py::test_statistics_are_those_of_the_selected_values"),
    "whiten": ("hand", "test_masked.py::test_whiten_by_hand"),
    "backward_sum": ("loop", "test_recurrence.py::test_any_length_against_loops"),
    "forward_sum": ("loop", "test_recurrence.py::test_any_length_against_loops"),
    "token_logprobs": ("loop", "test_logprobs.py::test_values_against_loops"),
    "bradley_terry_loss": ("hand", "test_preference.py::test_bradley_terry_by_hand"),
    "plackett_luce_loss": (
        "identity",
        "test_preference.py::test_probabilities_of_all_rankings_add_up_to_one",
    ),
    "regression_loss": ("hand", "test_preference.py::test_regression_by_hand"),
    "pair_accuracy": ("loop", "test_preference.py::test_pair_accuracy_against_loops"),
}
NO_NUMBERS = {
    "masked_zero",
    "places",
    "require_bool",
    "ahead",
    "even_batches",
    "token_batches",
    "common_prefix",
    "FixedLeash",
}


def public() -> list[str]:
    """Functions and classes of `ops` that others may call, in the order of the modules."""
    names: list[str] = []
    for info in pkgutil.iter_modules(ppolite.ops.__path__, "ppolite.ops."):
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            known = inspect.isfunction(thing) or inspect.isclass(thing)
            if known and not name.startswith("_") and thing.__module__ == info.name:
                names.append(name)
    return names


def libraries(marks: list[pytest.Mark], name: str) -> dict[str, set[str]]:
    """Library → the dtypes in which it was compared."""
    found: dict[str, set[str]] = {}
    for mark in marks:
        if any(f.__name__ == name for f in mark.kwargs["functions"]):
            found.setdefault(mark.kwargs["by"], set()).update(str(d)[6:] for d in mark.kwargs["dtypes"])
    return found


def generated(marks: list[pytest.Mark]) -> str:
    lines = ["| function | library (in the dtypes) | and in `tests/ops` |", "|---|---|---|"]
    for name in public():
        if name in NO_NUMBERS:
            continue
        named = [
            by if len(dtypes) == 2 else f"{by} ({', '.join(dtypes)})"
            for by, dtypes in libraries(marks, name).items()
        ]
        kind, test = ELSEWHERE.get(name, ("", ""))
        lines.append(f"| `{name}` | {', '.join(named)} | {kind}{f': `{test}`' if test else ''} |")
    lines += [
        "",
        "## Constants and conventions",
        "",
        "What the other does differently; a test asserts each.",
        "",
    ]
    for mark in marks:
        if note := mark.kwargs["note"]:
            names = ", ".join(f"`{f.__name__}`" for f in mark.kwargs["functions"])
            lines.append(f"- {names}, {mark.kwargs['by']}: {note}")
    return "\n".join(lines) + "\n"


def test_everything_public_has_two_oracles(witnesses):
    names = public()
    assert not {*ELSEWHERE, *NO_NUMBERS} - set(names), "the lists above name what is not there"
    poor = [
        name
        for name in names
        if name not in NO_NUMBERS and len(libraries(witnesses, name)) + (name in ELSEWHERE) < 2
    ]
    assert not poor, f"{', '.join(poor)}: fewer than two oracles"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_oracles_elsewhere_exist(name):
    """And the file of the test imports the function, if the test does not."""
    file, test = ELSEWHERE[name][1].split("::")
    tree = ast.parse((ROOT / "tests" / "ops" / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}


def test_the_page_is_true(witnesses, request):
    before, mark, after = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark
    if request.config.getoption("--write"):
        PAGE.write_text(before + MARK + generated(witnesses), encoding="utf-8")
    else:
        assert after == generated(witnesses), "docs/oracles.md is old: make oracles ARGS=--write"
