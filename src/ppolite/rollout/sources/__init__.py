"""Who scores, where `ppo.rewards` says so: each source is a `Scorer`, `combine.py` makes one of them."""
