"""The run with a target is the shipped recipe's."""

from experiments.leash_target import OVERRIDES

from ppolite import load_recipe


def test_settings_of_ppo_are_those_of_the_recipe() -> None:
    assert load_recipe("film", OVERRIDES).ppo == load_recipe("film_kl").ppo
