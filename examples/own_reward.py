"""PPO with a reward of your own: the policy learns to begin its words with an s.

python examples/own_reward.py [RECIPE] [STEPS]
"""

import sys

from ppolite import PPO, load_recipe


def alliteration(text: str) -> float:
    """Share of words that begin with an s."""
    words = text.split()
    return sum(word.startswith("s") for word in words) / max(len(words), 1)


source = sys.argv[1] if len(sys.argv) > 1 else "film"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

recipe = load_recipe(source, [f"ppo.steps={steps}", "sft=null", "reward=null"])
ppo = PPO(recipe, "runs/own_reward")
for step in range(1, steps + 1):
    rollouts = ppo.generate(ppo.next_prompts())
    rewards = [alliteration(rollout.text) for rollout in rollouts]
    metrics = ppo.step(rollouts, rewards)
    print(f"step {step}: reward {metrics['score/mean']:.3f}, {metrics['kl/ref_seq']:.1f} nats from the start")
print("saved in", ppo.save())
