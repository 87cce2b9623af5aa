"""The mathematics of policy optimisation, for control and for language: functions on tensors, no I/O.

    masked           sums, means, variances and whitening over the places that count
    logprobs         token log-probs and entropies from hidden states, without the logits of a batch
    kl               KL from samples and exact, entropies, and the three ways to steer a KL coefficient
    recurrence       sums along a row that start afresh where an episode ends
    importance       weights π_θ/μ: of a step, so far, of a trajectory; truncated; the effective sample size
    advantages       TD(0), n-step, Monte Carlo, TD(λ), GAE, V-trace; a termination is no truncation
    policy_gradient  A2C and REINFORCE; the same on another policy's data, importance-weighted
    losses           PPO-clip, PPO-KL, and the critic's; both take data from a third policy
    preference       reward-model losses: pairs, rankings, scores; and how often pairs are ordered rightly
    packing          micro-batches by token budget; the prefix that sequences share

Conventions. A mask is bool, True counts; what stands at masked places is never read, not even when it is NaN.
A loss is a sum divided by one count: the number of True places, or `denom` when the caller works a batch off
in parts (then losses, gradients and diagnostics of the parts add up to those of the batch). KL and log-probs
are in nats. Functions take float32 or float64 and answer in the same.

Axes, as suffixes: B sequences, R response tokens, N tokens of a batch, V vocabulary, D hidden size, K ranks.
"""
