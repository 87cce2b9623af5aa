"""Examines a recipe or a run before it costs hours. A check is a function that returns a `Finding`.

finding.py   verdict, figure, remedy
place.py     rights, disk, memory, packages    rows.py     the data as files
model.py     weights, dropout, split           chat.py     tokens and chat template
reward.py    the reward model by its scores    probe.py    one small round of PPO
quick.py     before every training             full.py     `ppolite doctor RECIPE|RUN`
"""
