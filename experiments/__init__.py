"""Experiments: each module is one question, a fixed command, a JSON and a figure in docs/results/.

python -m experiments.how_far
"""
