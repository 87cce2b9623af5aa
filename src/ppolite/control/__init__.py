"""CartPole to MuJoCo, learned with the same `ops` as language: A2C, importance sampling, PPO-KL, PPO-clip.

config     the recipe of a control run, importable without torch
envs       Gymnasium's vector environments, observations and rewards in running units
nets       policy and critic: two small nets, or one with two heads
policy     what is kept of a run: acts, is saved and loaded
rounds     T steps in N environments, as a batch to learn from
train      the loop
evaluate   deterministic episodes, and a GIF of one
report     the page about a run

ppolite control CartPole-v1 --algorithm ppo-clip
"""
