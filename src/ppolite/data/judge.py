"""The independent judge of the film task: VADER, a sentiment lexicon that no stage of training sees.

The reward model learns from people's ratings; whether PPO's gain on it is real is asked of something else.
VADER (Hutto and Gilbert 2014) scores each text by rules and a lexicon. It was made by the people who
collected the ratings, yet from other texts and raters: the lexicon rates 7,500 words out of context.

It knows English alone: of other texts it thinks nothing, which is 0 and looks like a judgement.

    python -c "from ppolite.data.judge import vader_judge; print(vader_judge(['A lovely film.']))"
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

from ppolite.types import UserError

log = logging.getLogger("ppolite")


@cache
def _warn_once() -> None:
    log.warning(
        "evaluation.judge is vader, which knows English alone, but most of these texts are in other letters: its 0 "
        "means nothing; set evaluation.judge: none"
    )


def vader_judge(texts: Sequence[str]) -> list[float]:
    """VADER's compound score of each text, from −1 (most negative) to 1 (most positive)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "the independent judge needs vaderSentiment, which is not installed; run"
            " `pip install vaderSentiment`"
        ) from error
    letters = [c for text in texts for c in text if c.isalpha()]
    if 2 * sum(c.isascii() for c in letters) < len(letters):
        _warn_once()
    analyzer = SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]
