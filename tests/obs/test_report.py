"""The page is parsed as a browser would: what is text stays text, and nothing is loaded from outside."""

import json
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ppolite.obs.plots import points, write_plots
from ppolite.obs.report import write_report
from ppolite.obs.sinks import MetricsLog
from ppolite.obs.token_view import load_rollouts, token_view
from ppolite.types import UserError

EVIL = '<script>alert("x")</script>&amp;\x1b[31m\u202e'
RESULTS = {
    "score_before": 0.1,
    "score_after": 1.83,
    "judge_before": 0.17,
    "judge_after": 0.49,
    "judge_gain_ci95": [0.26, 0.38],
    "kl_ref_seq": 6.2,
    "length_before": 21.6,
    "length_after": 23.2,
    "distinct2_before": 0.83,
    "distinct2_after": 0.74,
    "rm_spearman": 0.772,
    "rm_pair_accuracy": 0.889,
    "prompts": 256,
    "rm_calibration": [[-1.0, -1.1, 30], [1.0, 0.9, 30]],
    "samples": [
        {"prompt": EVIL, "before": EVIL, "after": "很好的电影", "score_before": -1.0, "score_after": 2.0}
    ],
}


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href"}:
                self.links.append(value)
            if name == "title":
                self.titles.append(value)

    def handle_data(self, data):
        self.text += data


def rollout(step, score, tokens=(" good", EVIL, "\n")):
    return {
        "step": step,
        "prompt": EVIL,
        "tokens": list(tokens),
        "logprobs": [-1.0] * len(tokens),
        "advantages": [0.5, -1.25, 0.0][: len(tokens)],
        "ratio": [1.2, 0.8, 1.05][: len(tokens)],
        "score": score,
    }


@pytest.fixture
def run(tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps(RESULTS))
    (tmp_path / "rollouts").mkdir()
    pq.write_table(pa.Table.from_pylist([rollout(1, 0.0), rollout(2, 1.0)]), tmp_path / "rollouts/a.parquet")
    with (
        MetricsLog(tmp_path, "ppo", tensorboard=False) as log,
        MetricsLog(tmp_path, "sft", tensorboard=False) as sft,
    ):
        for step in range(3):
            sft.log(step, {"loss/train": 4.0 - step})
            log.log(step, {"score/mean": 0.5 * step, "kl/ref_seq": float(step), "time/step_s": 20.0})
        log.log(2, {"heldout/score": 0.9, "heldout/kl_ref_seq": 2.1})
    return tmp_path


def test_all_text_is_escaped_and_controls_are_visible(run):
    raw = write_report(run).read_text(encoding="utf-8")
    page = Page(raw)
    assert "script" not in page.tags
    assert '<script>alert("x")</script>&amp;␛[31m⟨U+202E⟩' in page.text
    assert "\x1b" not in raw
    assert "\u202e" not in raw
    assert "很好的电影" in page.text


def test_nothing_comes_from_outside(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_the_table_shows_gain_interval_and_whose_number_it_is(run):
    text = " ".join(Page(write_report(run).read_text(encoding="utf-8")).text.split())
    assert "+1.73" in text
    assert "+0.320+0.260 … +0.380" in text
    assert "proxy" in text
    assert "independent judge" in text
    assert "256 held-out prompts" in text
    assert "6.20 nats a sequence" in text


def test_pictures_are_written_and_inlined(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    names = {"ppo.png", "stages.png", "reward_vs_kl.png", "rm_calibration.png"}
    assert {path.name for path in run.glob("*.png")} == names
    assert page.tags.count("img") == len(names)
    for name in names:
        Image.open(run / name).verify()


def test_where_old_samples_were_worn_out(run):
    before = len(write_report(run).read_bytes())
    with MetricsLog(run, "ppo", tensorboard=False) as log:
        log.log(1, {"ess/share": 1.0, "kl/behaviour_token": 0.0})
        log.log(2, {"ess/share": 0.7, "kl/behaviour_token": 0.1, "leash/beta": 0.04})
        log.log(3, {"ess/share": 0.412, "ess/worn": 0.412, "stopped": True})
    raw = write_report(run).read_text(encoding="utf-8")
    facts = Page(raw).text
    assert "2 PPO steps · stopped before step 3: the samples were worth only 0.41 of their number" in facts
    assert "last KL coefficient 0.04" in facts
    assert len(raw) > before  # two panels more


def test_an_empty_run_says_what_is_missing(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.text.count("Left out:") == 6
    assert "eval.json" in page.text
    assert "img" not in page.tags


def test_a_judge_that_was_not_asked_is_said_so(run):
    results = {k: v for k, v in RESULTS.items() if not k.startswith("judge")}
    (run / "eval.json").write_text(json.dumps(results))
    assert "stands on the proxy alone" in write_report(run).read_text(encoding="utf-8")


def test_a_wrong_folder_and_a_spoilt_eval_are_named(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "eval.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        write_report(tmp_path)


def test_tokens_carry_their_numbers_and_the_way_they_moved():
    raw = token_view([rollout(1, 1.0)])
    page = Page(raw)
    assert "advantage -1.250" in page.titles[1]
    assert "ratio π/π_old 0.800" in page.titles[1]
    assert "value" not in page.titles[1]  # no such column in this rollout
    assert raw.count('class="t p up"') == 1
    assert raw.count('class="t n down"') == 1
    assert "↵" in page.text


def test_first_and_last_step_best_middle_and_worst(tmp_path):
    for step in (3, 10, 7):
        records = [rollout(step, float(score)) for score in (5, 1, 9, 3, 7)]
        pq.write_table(pa.Table.from_pylist(records), tmp_path / f"step-{step}.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    shown, complaints = load_rollouts(tmp_path)
    assert [(r["step"], r["score"]) for r in shown] == [(3, 9), (3, 5), (3, 1), (10, 9), (10, 5), (10, 1)]
    assert len(complaints) == 1
    assert "torn.parquet" in complaints[0]


def test_points_need_both_coordinates():
    rows = [{"step": 0, "a": 1.0}, {"step": 1}, {"step": 2, "a": None}, {"step": 3, "a": 0.0}]
    assert points(rows, "step", "a") == ([0, 3], [1.0, 0.0])
    assert write_plots([], [], None) == {}
