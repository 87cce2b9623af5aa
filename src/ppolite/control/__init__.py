"""CartPole to MuJoCo, learned with the same `ops` as language: A2C, importance sampling, PPO-KL, PPO-clip.

config     the recipe of a control run, importable without torch
envs       Gymnasium's environments, side by side;  units: observations and rewards in running units
nets       policy, critic, and the distributions over actions
policy     what is kept of a run: acts, is saved and loaded
rounds     T steps in N environments, made into a batch
learn      what a batch teaches: epochs × minibatches of one of four losses
train      the loop;  process: its random streams and threads
evaluate   deterministic episodes, and a GIF of one
run        all of it, into a folder; the page about it is `obs/control_report`

ppolite control CartPole-v1 --algorithm ppo-clip
"""
