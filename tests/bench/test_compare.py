"""Comparisons: who loses where, whether answers agree, and servers that the tool starts and stops itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.conftest import Scripted
from tests.command_line import trtqwen
from tests.triton.conftest import repository  # noqa: F401
from tests.waiting import wait_for
from trtqwen.bench.agreement import Answers, ask_for_answers, compare_answers
from trtqwen.bench.compare import Side, find_losses
from trtqwen.bench.contender import Contender, find_contender, find_vocabulary, serving, with_vocabulary
from trtqwen.bench.figures import Rate, figures
from trtqwen.bench.records import RequestRecord
from trtqwen.bench.visits import JOURNAL
from trtqwen.demo import MODEL
from trtqwen.diagnostics import InputError, ServerError
from trtqwen.recipe import recipe_names


def side(name: str, first: float, startup: float, noise: float = 0.0) -> Side:
    """A contender whose requests take `first` seconds to the first token and 0.1 for the second."""
    repeats = []
    for turn in range(3):
        records = []
        for index in range(10):
            begin, late = float(index), noise * (turn - 1)
            record = RequestRecord(index, begin, 2, begin, [(begin + first + late, 1), (begin + first + 0.1, 1)])
            record.ended, record.output_tokens = begin + first + 0.1, 2
            records.append(record)
        repeats.append(tuple(records))
    rate = Rate("sec", startup, 0.5, (startup,) * 3)
    found = {"chat": figures(repeats, [])}
    return Side(Contender(name), {}, rate, None, None, found, {"chat": tuple(repeats)}, None)


def test_losses_are_named_with_their_factor() -> None:
    losses = {(loss.contender, loss.metric): loss for loss in find_losses([side("a", 0.2, 10), side("b", 0.3, 5)])}
    assert losses["b", "time_to_first_token p50"].factor == pytest.approx(1.5)
    assert losses["a", "startup"].factor == pytest.approx(2)
    assert ("a", "time_to_first_token p50") not in losses
    assert ("b", "success_rate") not in losses


def test_noise_is_no_loss() -> None:
    losses = find_losses([side("a", 0.2, 10, noise=0.05), side("b", 0.21, 10, noise=0.05)])
    assert not [loss for loss in losses if loss.metric.startswith("time_to_first_token p50")]


def test_answers_agree_up_to_the_first_difference() -> None:
    one = Answers(((1, 2, 3), (4, 5), (6,)), ((-0.1, -0.2, -0.3), (-0.1, -0.1), (-0.5,)), 10.0)
    other = Answers(((1, 2, 9), (4, 5), (6, 7)), ((-0.1, -0.3, -0.3), (-0.1, -0.1), (-0.5, -1.0)), 11.0)
    agreement = compare_answers(one, other)
    assert agreement.first_difference == (2, None, 1)
    assert agreement.same_answers == 1
    assert agreement.same_tokens == pytest.approx(5 / 7)
    assert agreement.log_prob_difference == pytest.approx(0.1 / 5)


@pytest.mark.slow
@pytest.mark.triton
def test_a_repository_is_served_asked_and_stopped(repository: Path, tmp_path: Path) -> None:  # noqa: F811
    """The perplexity that comes over the interface is the model's own."""
    import torch
    from transformers import AutoModelForCausalLM

    from trtqwen.bench.agreement import TEXT

    contender = find_contender(f"mine={repository}", tmp_path)
    tokenizer, config = find_vocabulary([contender], None)
    with serving(contender, tmp_path / "log") as running:
        answers = ask_for_answers(with_vocabulary(running, config, tokenizer.stop_ids), tokenizer, 8, 20)
        memory = running.memory
        pid = running.pid
    assert running.startup is not None
    assert running.startup > 0.5
    assert memory is not None
    assert memory["host_gib"] > 0.1
    assert not Path(f"/proc/{pid}").exists()
    assert all(len(ids) == len(values) for ids, values in zip(answers.token_ids, answers.log_probs, strict=True))
    ids = torch.tensor([tokenizer.encode(TEXT)[:21]])
    model = AutoModelForCausalLM.from_pretrained(MODEL).float()
    with torch.inference_mode():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert answers.perplexity == pytest.approx(float((-log_probs.mean()).exp()), rel=1e-3)


def test_addresses_are_compared(scripted: Callable[..., Scripted], tmp_path: Path) -> None:
    slow, fast = scripted(first=0.2, gap=0.001), scripted(first=0.02, gap=0.001)
    words = ["compare", f"slow={slow.url}", f"fast={fast.url}", "--workload", "smoke", "--requests", "6"]
    words += ["--concurrency", "3", "--tokenizer", str(MODEL), "--output", str(tmp_path), "--json"]
    done = trtqwen(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "compare.json").read_text())
    assert report["agreement_with_the_first"]["fast"]["same_answers"] == 8
    first = [side["workloads"]["smoke"]["time_to_first_token"]["min"] for side in report["contenders"]]
    assert first[0] >= 200
    assert first[1] < first[0]  # a busy machine hides the loss in its noise: `find_losses` is tested above
    assert (tmp_path / "compare.html").read_text().count("<svg") == 3
    assert "| slow | fast |" in (tmp_path / "compare.md").read_text()


def test_a_killed_comparison_goes_on_where_it_was(scripted: Callable[..., Scripted], tmp_path: Path) -> None:
    one, other = scripted(first=0.05, gap=0.001), scripted(first=0.02, gap=0.001)
    words = ["compare", f"one={one.url}", f"other={other.url}", "--workload", "smoke", "--requests", "4", "--json"]
    words += ["--concurrency", "2", "--answer-tokens", "4", "--tokenizer", str(MODEL), "--output", str(tmp_path)]
    journal = tmp_path / JOURNAL
    with subprocess.Popen([sys.executable, "-m", "trtqwen", *words], stderr=subprocess.DEVNULL) as process:
        assert wait_for(lambda: journal.exists() and journal.read_text().count("\n") >= 4, 100)
        process.kill()
    assert not (tmp_path / "compare.json").exists()
    kept = journal.read_text().rpartition("\n")[0].count("\n")
    journal.write_text(journal.read_text() + '{"contender": "one", "tu')  # a kill in the middle of a line

    refused = trtqwen(*words, "--seed", "5")
    assert refused.returncode == 2
    assert "is of another comparison, which was stopped" in refused.stderr

    done = trtqwen(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("measured before") == kept
    report = json.loads(done.stdout)
    for contender in report["contenders"]:
        assert len(contender["workloads"]["smoke"]["output_token_throughput"]["repeats"]) == 3
        assert contender["workloads"]["smoke"]["request_count"]["repeats"] == [4, 4, 4]
    assert report["agreement_with_the_first"]["other"]["same_answers"] == 8
    assert not journal.exists()


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no model repository"):
        find_contender(recipe_names()[0], tmp_path)
    with pytest.raises(InputError, match="reports its tokenizer"):
        find_vocabulary([Contender("a", url="http://127.0.0.1:9")], None)
    with (
        pytest.raises(ServerError, match="does not answer"),
        serving(Contender("a", url="http://127.0.0.1:9"), tmp_path),
    ):
        pass
