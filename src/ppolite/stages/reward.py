"""The reward model: one scalar for prompt + response, read at the last token.

    scores     (s + b − y)²                               regression on what people gave
    pairs      −log σ(s_chosen − s_rejected − margin)     Bradley–Terry
    rankings   −Σ_k log softmax(s_k, s_k+1, …)_k          Plackett–Luce

All three on the same head, which has no bias. For scores the intercept b is the batch's best one, mean(y −
s): like the other two losses, this one cannot be lowered by moving all scores together. Without it, that
shared motion is most of the gradient (the hidden state at the last token is nearly the same in every row)
and drowns the rest: held-out Spearman 0.27 instead of 0.52 after 640 film ratings. The result is a sequence
classifier in `RUN/reward`; beside it `agreement.json` says how well it agrees with people on held-out rows,
and the config carries its mean and standard deviation on the SFT model's own samples, which PPO uses to
normalise the reward.

    ppolite reward recipes/film.yaml
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppolite.config import Recipe
from ppolite.data.chat import encode_example
from ppolite.models.export import classifier, save_reward
from ppolite.models.load import load_reward
from ppolite.models.roles import Norm, reward_body, trainable
from ppolite.models.sequences import micro_batches
from ppolite.models.trunk import Body, Sequences
from ppolite.obs.metrics import calibration, pearson, spearman
from ppolite.ops.preference import bradley_terry_loss, pair_accuracy, plackett_luce_loss, regression_loss
from ppolite.rollout.experience import over_batches
from ppolite.stages.checkpoint import State
from ppolite.stages.doctor.quick import before_fit
from ppolite.stages.learner import Fitting, Learner, Skips, put_weights, step_together
from ppolite.stages.opening import after_sft, open_model, open_trunk
from ppolite.stages.rows import batches, count_batches, load_split, shuffled
from ppolite.stages.seeds import derive_seed, fingerprint_of
from ppolite.stages.session import Session
from ppolite.types import Preference, Prompt, Ranking, Sampling, Scored, UserError

log = logging.getLogger("ppolite")

ITEMS = {"scores": "scored", "pairs": "preferences", "rankings": "rankings"}


@dataclass(frozen=True)
class Row:
    """Responses to one prompt that are judged together, best first; `target` is a score or a margin."""

    prompt: Prompt
    encoded: tuple[tuple[list[int], list[int]], ...]
    target: float
    origin: str = ""

    @property
    def size(self) -> int:
        """Tokens, as if all responses were as long as the longest."""
        return len(self.encoded) * max(len(p) + len(r) for p, r in self.encoded)


class RewardModel:
    """One reward-model run: `RewardModel(recipe, run_dir).run()`. Starts from `RUN/sft` when there is one."""

    def __init__(self, recipe: Recipe, run_dir: str | Path) -> None:
        if recipe.reward is None:
            raise UserError("this recipe has no `reward` section; add one with its `data`")
        self.recipe, self.config, self.run_dir = recipe, recipe.reward, Path(run_dir)
        self.data = self.config.source
        self.opened = open_model(recipe, after_sft(recipe, self.run_dir))
        # Needed at the end, refused at the beginning.
        classifier(self.opened.model.config, trust_remote_code=recipe.trust_remote_code)
        train, held = load_split(self.data, ITEMS[self.config.kind], recipe.seed)
        self.first = [(item.prompt, responses_of(item)[0][0]) for item in train[:8]]
        self.left_out = 0
        self.train = self.encode(train, self.data.limit)
        self.held = self.encode(held, self.config.eval_examples)
        if not self.train or len(self.held) < 8:
            raise UserError(
                f"reward.data {self.data.path}: {len(self.train)} rows to train on, {len(self.held)} "
                "held out; at least 1 and 8 are needed (see data.held_out and max_tokens)"
            )
        self.trunk = open_trunk(
            recipe, self.opened, [p + r for p, r in (row.encoded[0] for row in self.train[:4])]
        )
        self.body = self._body()
        self.trunk.hold()
        for body in (self.body, self.trunk.top):
            body.hold({})
        self.mean, self.scale = self._target_units()
        self._pairs_apart()
        self.reads = fingerprint_of((self.train, self.held))
        total = count_batches(len(self.train), self.config.batch_size, self.config.epochs)
        self.learner = Learner(self.body.trained(), self.config.optim, total)
        self.skips, self.fitting = Skips(), Fitting(self.config.optim.micro_batch_tokens)
        self.found: dict[str, Any] = {}
        """The agreement, once the last update is done."""

    def _body(self) -> Body:
        top = self.trunk.top
        score = nn.Linear(self.opened.model.config.hidden_size, 1, bias=False)
        generator = torch.Generator().manual_seed(derive_seed(self.recipe.seed, "reward-head"))
        nn.init.normal_(score.weight, std=1 / math.sqrt(score.in_features + 1), generator=generator)
        base = top.clone(embed=self.trunk.split == 0, score=score.to(self.opened.device))
        body, _ = trainable(base, self.recipe.train, own=True)
        assert body.score is not None
        body.score.requires_grad_(True)
        return body

    def _target_units(self) -> tuple[float, float]:
        """Mean and standard deviation of the training scores; the head learns in these units."""
        if self.config.kind != "scores":
            return 0.0, 1.0
        targets = torch.tensor([row.target for row in self.train])
        spread = float(targets.std(correction=0))
        if spread == 0:
            raise UserError(f"reward.data {self.data.path}: every score is {targets[0]:g}; nothing to learn")
        return float(targets.mean()), spread

    def _pairs_apart(self) -> None:
        """The figure that PPO will ask for must exist once training is over."""
        if self.config.kind != "scores":
            return
        targets = [row.target for row in self.held]
        spread = max(targets) - min(targets)
        try:
            self._pair_accuracy(targets)
        except ValueError:
            raise UserError(
                f"reward.data {self.data.path}: the {len(targets)} held-out scores are at most "
                f"{spread:g} apart, so no pair counts with reward.pair_gap {self.config.gap:g}; lower "
                "it, or hold out more rows"
            ) from None

    def _pair_accuracy(self, predicted: Sequence[float]) -> float:
        """Of the held-out rows. In float64, as their scores were read."""
        scores, targets = (
            torch.tensor(x, dtype=torch.float64) for x in (predicted, [row.target for row in self.held])
        )
        return float(pair_accuracy(scores, targets, self.config.gap))

    @property
    def limit(self) -> int:
        """Most tokens of a prompt with one of its responses."""
        return min(self.config.max_tokens, self.opened.context)

    def encode(self, items: Sequence[Scored | Preference | Ranking], most: int | None) -> list[Row]:
        """Token ids of the first `most` after shuffling; rows over the limit are reported and left out."""
        rows: list[Row] = []
        for item in shuffled(items, derive_seed(self.recipe.seed, "reward")):
            if len(rows) == most:
                break
            responses, target = responses_of(item)
            encoded = tuple(encode_example(self.opened.tokenizer, item.prompt, r) for r in responses)
            longest = max(len(p) + len(r) for p, r in encoded)
            if longest > self.limit:
                log.warning("%s: %d tokens, limit %d; left out", item.prompt.source, longest, self.limit)
                self.left_out += 1
                continue
            origin = item.origin if isinstance(item, Preference) else ""
            rows.append(Row(item.prompt, encoded, target, origin))
        return rows

    def sequences(self, rows: Sequence[Row]) -> Sequences:
        flat = [pair for row in rows for pair in row.encoded]
        seqs = Sequences.of([p for p, _ in flat], [r for _, r in flat], self.opened.device)
        return self.trunk.bottom(seqs, self.config.optim.micro_batch_tokens)

    def _targets(self, rows: Sequence[Row]) -> Tensor:
        """Scores of the rows in the head's units."""
        return torch.tensor(
            [(row.target - self.mean) / self.scale for row in rows], device=self.opened.device
        )

    def _loss(self, rows: Sequence[Row], scores_M: Tensor, intercept: Tensor) -> Tensor:
        """Mean loss of these rows; `scores_M` has one entry for each response, rows one after another."""
        if self.config.kind == "scores":
            return regression_loss(scores_M + intercept, self._targets(rows))
        counts = [len(row.encoded) for row in rows]
        scores_BK = nn.utils.rnn.pad_sequence(list(scores_M.split(counts)), batch_first=True)
        if self.config.kind == "pairs":
            margin = torch.tensor([row.target for row in rows], device=scores_M.device)
            return bradley_terry_loss(scores_BK[:, 0], scores_BK[:, 1], margin)
        mask_BK = torch.arange(scores_BK.shape[1]) < torch.tensor(counts)[:, None]
        return plackett_luce_loss(scores_BK, mask_BK.to(scores_M.device))

    def _intercept(self, micros: Sequence[Sequence[Row]], scores: Sequence[Tensor]) -> Tensor:
        """mean(y − s) over all rows, the best b for the squared error; 0 where only differences count."""
        if self.config.kind != "scores":
            return torch.zeros((), device=self.opened.device)
        return torch.cat([self._targets(m) - s for m, s in zip(micros, scores, strict=True)]).mean()

    def loss(self, rows: Sequence[Row]) -> float:
        """Mean loss of these rows; gradients are accumulated."""
        total = 0.0
        parts = micro_batches([row.size for row in rows], self.fitting.tokens, packed=self.trunk.packed)
        micros = [[rows[i] for i in part] for part in parts]
        seqs = [self.sequences(micro) for micro in micros]
        intercept = None
        if self.config.kind == "scores" and len(micros) > 1:
            # It belongs to the whole batch, so that the result does not depend on the micro-batches.
            with torch.no_grad():
                intercept = self._intercept(micros, [self.body.scores(s) for s in seqs])
        for micro, seq in zip(micros, seqs, strict=True):
            scores_M = self.body.scores(seq)
            shift = self._intercept([micro], [scores_M.detach()]) if intercept is None else intercept
            loss = self._loss(micro, scores_M, shift) * (len(micro) / len(rows))
            loss.backward()
            total += float(loss.detach())
        return total

    def gradients(self, rows: Sequence[Row]) -> float:
        """Those of one update. Returns its loss."""
        return self.fitting.run(lambda: self.loss(rows), self.learner.clear)

    def update(self, rows: Sequence[Row], loss: float) -> dict[str, float]:
        """Apply the gradients of these rows, or skip and count them where they or the loss are not finite."""
        row = {"lr": self.learner.lr}
        norms = step_together(self.learner, sound=math.isfinite(loss))
        if norms is None:
            self.skips.add("the loss or its gradient was not finite", [self.text(row) for row in rows])
        else:
            self.skips.clear()
            row["grad_norm"] = norms[0]
        return row | {"loss/train": loss, "update/skipped": self.skips.total}

    def text(self, row: Row) -> dict[str, Any]:
        texts = [[str(self.opened.tokenizer.decode(ids)) for ids in pair] for pair in row.encoded]
        return {"prompt": texts[0][0], "responses": [response for _, response in texts], "target": row.target}

    @torch.no_grad()
    def predict(self, rows: Sequence[Row]) -> list[list[float]]:
        """Scores in people's units (for pairs and rankings: the head's own), a list for each row."""
        budget = self.config.optim.micro_batch_tokens
        raw = over_batches(self.sequences(rows), budget, self.body.scores) * self.scale + self.mean
        return [part.tolist() for part in raw.split([len(row.encoded) for row in rows])]

    def _fit_mean(self) -> None:
        """Give the predictions the right mean: on training rows, as the offset is part of the model."""
        if self.config.kind != "scores":
            return
        rows = self.train[: self.config.norm_samples]
        error = [row.target - predicted[0] for row, predicted in zip(rows, self.predict(rows), strict=True)]
        self.mean += sum(error) / len(error)

    def agreement(self) -> dict[str, Any]:
        """How well held-out rows are judged: pairwise accuracy always, correlations for scores.

        Pairs of several origins also get `by_origin`: accuracy and number of rows of each.
        """
        predicted = self.predict(self.held)
        if self.config.kind == "scores":
            flat = [p[0] for p in predicted]
            targets = [row.target for row in self.held]
            return {
                "spearman": _finite(spearman(flat, targets)),
                "pearson": _finite(pearson(flat, targets)),
                "pair_accuracy": self._pair_accuracy(flat),
                "calibration": [list(group) for group in calibration(flat, targets)],
                "held_out": len(targets),
            }
        result: dict[str, Any] = {"pair_accuracy": _right(predicted), "held_out": len(self.held)}
        origins = {row.origin: [] for row in self.held}
        for row, scores in zip(self.held, predicted, strict=True):
            origins[row.origin].append(scores)
        if set(origins) != {""}:
            result["by_origin"] = {k: [_right(part), len(part)] for k, part in sorted(origins.items())}
        return result

    def take(self, folder: Path) -> None:
        """Put a finished reward model in the place of the one to be trained, to ask it about held-out rows again."""
        model, score, norm = load_reward(
            str(folder), self.opened.device, trust_remote_code=self.recipe.trust_remote_code
        )
        self.body = reward_body(self.trunk, model, score)
        self.body.hold({})
        self.mean, self.scale = norm.offset, 1.0

    def run(self, *, allow_changes: bool = False) -> dict[str, Any]:
        """Train, measure, save `RUN/reward`; an interrupted run goes on. Returns the agreement on held-out rows."""
        before_fit("reward", self)
        with Session("reward", self, self.learner.total, allow_changes=allow_changes) as session:
            for step, rows in zip(session, islice(self.stream(), session.step, None), strict=True):
                with session.untouched():
                    loss = self.gradients(rows)
                row = self.update(rows, loss)
                if step == session.total:
                    row |= self._measure()
                session.log(row, f"loss {row['loss/train']:.3f}")
            if not self.found:  # the last updates were skipped, and the run went back to other weights
                session.metrics.log(session.total, self._measure())
            self._save(self.found)
        return self.found

    def _measure(self) -> dict[str, float]:
        """Fit the mean, look at held-out rows. Returns what is to be logged."""
        self._fit_mean()
        self.found = self.agreement()
        return {f"heldout/{k}": v for k, v in self.found.items() if isinstance(v, float)}

    def stream(self) -> Iterator[list[Row]]:
        """The batches of all epochs."""
        size, epochs, seed = (
            self.config.batch_size,
            self.config.epochs,
            derive_seed(self.recipe.seed, "reward-order"),
        )
        return batches(self.train, size, epochs, seed, length=lambda row: row.size)

    def state(self) -> State:
        return {
            "weights": self.body.trained_by_name(),
            "learner": self.learner.state(),
            "fitting": self.fitting.state(),
            "mean": self.mean,
            "found": self.found,
        }

    def restore(self, state: State) -> None:
        self.go_back(state)
        self.learner.done = state["learner"]["done"]
        self.fitting.restore(state["fitting"])

    def go_back(self, state: State) -> None:
        put_weights(self.body, state["weights"])
        self.learner.restore_moments(state["learner"])
        self.mean, self.found = state["mean"], state["found"]

    def _save(self, agreement: dict[str, Any]) -> None:
        assert self.body.score is not None
        with torch.no_grad():
            self.body.score.weight.mul_(self.scale)
        offset = self.mean
        mean, std = self.on_samples(offset)
        norm = Norm(mean, std, offset)
        save_reward(
            self.body,
            norm,
            self.opened.tokenizer,
            self.run_dir / "reward",
            agreement,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    @torch.no_grad()
    def on_samples(self, offset: float) -> tuple[float, float]:
        """Mean and standard deviation of the score over the SFT model's own answers to training prompts."""
        rows = self.train[: self.config.norm_samples]
        generator = self.opened.generator(self.trunk.top)
        longest = max(len(r) for row in rows for _, r in row.encoded)
        room = self.opened.context - max(len(p) for row in rows for p, _ in row.encoded)
        rollouts = generator.generate(
            [row.prompt for row in rows],
            Sampling(max_new_tokens=min(longest, room)),
            seed=derive_seed(self.recipe.seed, "reward-norm"),
        )
        seqs = Sequences.of(
            [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], self.opened.device
        )
        budget = self.config.optim.micro_batch_tokens
        scores_B = over_batches(self.trunk.bottom(seqs, budget), budget, self.body.scores) + offset
        return float(scores_B.mean()), max(float(scores_B.std(correction=0)), 1e-6)


def _right(predicted: Sequence[Sequence[float]]) -> float:
    """Share of the pairs in rows, best first, whose better one has the higher score; a tie counts ½."""
    right = [
        1.0 if better > worse else 0.5 if better == worse else 0.0
        for scores in predicted
        for better, worse in combinations(scores, 2)
    ]
    return sum(right) / len(right)


def _finite(value: float) -> float | None:
    """A correlation with something that does not vary is no number, and JSON has no NaN."""
    return value if math.isfinite(value) else None


def responses_of(item: Scored | Preference | Ranking) -> tuple[tuple[str, ...], float]:
    """Best first, and what is learned from them: a score, or a margin."""
    if isinstance(item, Scored):
        if item.score is None:
            raise UserError(f"{item.prompt.source}: `score` is empty; rate it first (`ppolite score FILE`)")
        return (item.response,), item.score
    if isinstance(item, Preference):
        return (item.chosen, item.rejected), item.margin
    return item.responses, 0.0
