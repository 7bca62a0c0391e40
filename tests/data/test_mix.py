from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pekoe.config.base import read_toml
from pekoe.config.data import ProblemSection
from pekoe.config.recipes import RLConfig, dump_config, load_config
from pekoe.core.errors import UserError
from pekoe.core.types import Problem
from pekoe.data import DataReport, Tokenizer, gather_problems
from pekoe.demo.char_tokenizer import make_char_tokenizer

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(name: str, rows: Rows) -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def row(uid: str, prompt: str, answer: Any = "1") -> dict[str, Any]:
    return {"uid": uid, "prompt": prompt, "answer": answer}


def section(**keys: Any) -> ProblemSection:
    return ProblemSection.model_validate(keys)


def gather(seed: int = 0, tokenizer: Tokenizer | None = None, **keys: Any) -> tuple[list[Problem], DataReport]:
    return gather_problems(section(**keys), seed, tokenizer)


def uids(problems: list[Problem]) -> list[str]:
    return [problem.uid for problem in problems]


def reasons(report: DataReport) -> list[tuple[str, int, str | None, str]]:
    return [(drop.source, drop.row, drop.uid, drop.reason) for drop in report.dropped]


def test_one_clean_file_is_kept_as_it_is():
    save("a.jsonl", [row(str(i), f"{i}+1=") for i in range(5)])
    problems, report = gather(train="a.jsonl")
    assert uids(problems) == list("01234")
    assert report.dropped == []
    assert report.summary() == []


def test_all_long_prompts_are_named_and_what_a_tokenizer_says_is_said_once():
    tokenizer = Tokenizer(make_char_tokenizer("1+="))
    save("a.jsonl", [row(str(i), "1+1" * i) for i in range(1, 4)] + [row("x", "7"), row("y", "7")])
    with pytest.raises(UserError) as caught:
        gather(train="a.jsonl", max_prompt_tokens=6, tokenizer=tokenizer)
    first, second, third, advice = str(caught.value).splitlines()
    assert first.startswith("a.jsonl:2: problem '2': expected a prompt of at most 6 tokens")
    assert second.startswith("a.jsonl:3: problem '3': ")
    assert third.startswith("a.jsonl:4: problem 'x': tokenizer: expected characters of its vocabulary, got ['7']")
    assert "skip_malformed = true" in advice
    problems, report = gather(train="a.jsonl", max_prompt_tokens=6, tokenizer=tokenizer, skip_malformed=True)
    assert uids(problems) == ["1"]
    assert [drop.reason for drop in report.dropped] == ["too long", "too long", "malformed", "malformed"]


def test_columns_of_a_mix_and_of_its_sources():
    save("a.jsonl", [{"q": "a?", "gold": "1", "level": 3}])
    save("b.jsonl", [{"task": {"text": "b?"}, "gold": "2"}])
    sources = [
        {"name": "a", "path": "a.jsonl", "where": {"level": ["3"]}},
        {"name": "b", "path": "b.jsonl", "columns": {"prompt": "task.text", "answer": "gold"}},
    ]
    problems, report = gather(sources=sources, columns={"prompt": "q"})
    assert [(problem.messages[0]["content"], problem.gold) for problem in problems] == [("a?", "1"), ("b?", "2")]
    assert report.summary() == ["a: kept 1 of 1 problems", "b: kept 1 of 1 problems"]
    save("c.jsonl", [row("c", "q") | {"level": 1, "source": "x"}])
    assert gather(train="c.jsonl")[1].summary() == ["c.jsonl: columns that are not read: 'level', 'source'"]
    with pytest.raises(UserError, match=r"data\.columns\.promt: expected 'prompt', 'answer', 'uid' or 'kind'"):
        load_config({**RECIPE, "data": {"train": "a", "columns": {"promt": "q"}}}, kind=RLConfig)


def test_an_evaluation_set_may_repeat_itself():
    save("a.jsonl", [row("a", "What is the sum of one and one and one, please say"), row("b", "Other?")])
    save("eval.jsonl", [{"prompt": "What is the sum of one and one and one, please say", "answer": "3"}] * 2)
    assert uids(gather(train="a.jsonl", decontaminate=["eval.jsonl"])[0]) == ["b"]


def test_repeats_are_only_counted_unless_asked():
    save("a.jsonl", [row("a", "q"), row("b", " q "), row("c", "r", "1"), row("d", "r", "2")])
    problems, report = gather(train="a.jsonl")
    assert uids(problems) == list("abcd")
    assert "1 problems repeat an earlier prompt, and 2 have a prompt that occurs with different" in report.summary()[0]


def test_exact_repeats_and_conflicts_leave():
    save("a.jsonl", [row("a", "q"), row("b", " q "), row("c", "r", "1"), row("d", "r", "2"), row("e", "r", "1")])
    problems, report = gather(train="a.jsonl", dedup="exact")
    assert uids(problems) == ["a"]
    conflict = "conflicting answers"
    assert sorted(reasons(report)) == [
        ("a.jsonl", 2, "b", "duplicate"),
        *(("a.jsonl", i, uid, conflict) for i, uid in ((3, "c"), (4, "d"), (5, "e"))),
    ]
    assert report.dropped[0].detail == "repeats a.jsonl, row 1 (a)"
    assert report.dropped[1].detail == "a.jsonl, row 3 (c) says '1', a.jsonl, row 4 (d) says '2'"
    assert report.summary() == ["a.jsonl: kept 1 of 5 problems; skipped 1 duplicate, 3 conflicting answers"]
    assert uids(gather(train="a.jsonl", dedup="exact", conflicts="first")[0]) == ["a", "c"]


def test_repeats_are_found_across_sources():
    save("a.jsonl", [row("x", "q"), row("y", "r")])
    save("b.jsonl", [row("x", "r"), row("y", "s")])
    sources = [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]
    problems, report = gather(sources=sources, dedup="exact")
    assert uids(problems) == ["a/x", "a/y", "b/y"]
    assert reasons(report) == [("b", 1, "b/x", "duplicate")]
    assert report.summary() == ["a: kept 2 of 2 problems", "b: kept 1 of 2 problems; skipped 1 duplicate"]


def test_a_row_twice_is_a_repeat_or_else_malformed():
    save("a.jsonl", [row("a", "q"), row("b", "r"), row("a", "q")])
    with pytest.raises(UserError, match=r"a\.jsonl:3: uid 'a': expected a name of its own, got that of row 1"):
        gather(train="a.jsonl")
    problems, report = gather(train="a.jsonl", dedup="exact")
    assert uids(problems) == ["a", "b"]
    assert reasons(report) == [("a.jsonl", 3, "a", "duplicate")]
    save("b.jsonl", [row("a", "q"), row("a", "r")])
    with pytest.raises(UserError, match=r"b\.jsonl:2: uid 'a'"):
        gather(train="b.jsonl", dedup="exact")


def test_malformed_rows_stop_or_are_listed():
    save("a.jsonl", [row("a", "q"), {"promt": "p"}, row("b", "r")])
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*Did you mean 'prompt'"):
        gather(train="a.jsonl")
    problems, report = gather(train="a.jsonl", skip_malformed=True)
    assert uids(problems) == ["a", "b"]
    assert reasons(report) == [("a.jsonl", 2, None, "malformed")]
    assert "Did you mean 'prompt'" in report.dropped[0].detail
    assert report.summary() == ["a.jsonl: kept 2 of 3 problems; skipped 1 malformed"]


def test_long_prompts_stop_or_are_listed():
    tokenizer = Tokenizer(make_char_tokenizer("1+="))  # each prompt within two markers
    save("a.jsonl", [row("a", "1+1="), row("b", "1+1+1=")])
    with pytest.raises(UserError, match=r"a\.jsonl:2: problem 'b': expected a prompt of at most 6 tokens .*, got 8"):
        gather(train="a.jsonl", max_prompt_tokens=6, tokenizer=tokenizer)
    problems, report = gather(train="a.jsonl", max_prompt_tokens=6, skip_malformed=True, tokenizer=tokenizer)
    assert uids(problems) == ["a"]
    assert reasons(report) == [("a.jsonl", 2, "b", "too long")]


def test_contaminated_problems_are_named_one_by_one():
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    save("a.jsonl", [row("a", f"So: {text}?"), row("b", "Something else"), row("c", "Short one?")])
    save("eval.jsonl", [row("e1", text), row("e2", "short one")])
    problems, report = gather(train="a.jsonl", decontaminate=["eval.jsonl"])
    assert uids(problems) == ["b"]
    assert reasons(report) == [("a.jsonl", 1, "a", "contaminated"), ("a.jsonl", 3, "c", "contaminated")]
    assert report.dropped[0].detail.startswith("eval.jsonl: e1: one two three")
    report.write("data.jsonl")
    lines = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "source": "a.jsonl",
        "row": 3,
        "uid": "c",
        "reason": "contaminated",
        "detail": "eval.jsonl: e2: short one",
    }
    with pytest.raises(UserError, match=r"evil\.jsonl: expected"):
        gather(train="a.jsonl", decontaminate=["evil.jsonl"])
    with pytest.raises(UserError, match=r"a\.jsonl: expected problems, got none that can be used \(3 contaminated\)"):
        gather(train="a.jsonl", decontaminate=["a.jsonl"])


def test_near_repeats_leave():
    pytest.importorskip("datasketch", reason="pip install 'pekoe[data]'")
    text = (
        "A farmer has 12 sheep and buys some more at the market, until the number of his sheep has doubled. How many?"
    )
    save("a.jsonl", [row("a", text), row("b", text.replace("sheep", "cows")), row("c", text.replace("some", "a few"))])
    problems, report = gather(train="a.jsonl", dedup="near", dedup_threshold=0.7)
    assert uids(problems) == ["a", "b"]
    assert report.dropped[0].detail == "nearly a.jsonl, row 1 (a)"


class TestWeights:
    @pytest.fixture
    def source(self) -> dict[str, Any]:
        return {"name": "a", "path": save("a.jsonl", [row(str(i), f"{i}+1=") for i in range(100)])}

    def drawn(self, seed: int = 0, **source: Any) -> list[str]:
        return uids(gather(seed, sources=[source])[0])

    def test_half(self, source: dict[str, Any]):
        half = self.drawn(**source, weight=0.5)
        assert len(set(half)) == 50
        assert half == sorted(half, key=lambda uid: int(uid.removeprefix("a/")))
        assert half == self.drawn(**source, weight=0.5)
        assert half != self.drawn(**source, weight=0.5, seed=1)
        assert half != [f"a/{i}" for i in range(50)]

    def test_twice_and_a_half(self, source: dict[str, Any]):
        drawn = self.drawn(**source, weight=2.5)
        assert len(set(drawn)) == 250
        copies = Counter(uid.partition("#")[2] for uid in drawn)
        assert copies == {"": 100, "2": 100, "3": 50}

    def test_copies_are_the_problem_under_another_name(self, source: dict[str, Any]):
        problems, report = gather(sources=[{**source, "weight": 2}])
        again = next(problem for problem in problems if problem.uid == "a/7#2")
        assert again.messages[0]["content"] == "7+1="
        assert report.summary() == ["a: kept 100 of 100 problems; an epoch draws 200"]

    def test_limit(self, source: dict[str, Any]):
        assert len(self.drawn(**source, limit=7)) == 7
        assert len(set(self.drawn(**source, limit=7, weight=2))) == 14
        assert len(self.drawn(**source, limit=1000)) == 100
        assert len(self.drawn(**source, limit=3, weight=0.01)) == 1
        report = gather(sources=[{**source, "limit": 7}])[1]
        assert report.summary() == ["a: kept 7 of 100 problems; skipped 93 not drawn"]

    def test_two_sources_draw_their_own_halves(self, source: dict[str, Any]):
        both = uids(gather(sources=[{**source, "weight": 0.5}, {**source, "name": "b", "weight": 0.5}])[0])
        assert {uid[2:] for uid in both[:50]} != {uid[2:] for uid in both[50:]}

    def test_one_source_does_not_move_another(self, source: dict[str, Any]):
        other = {"name": "b", "path": save("b.jsonl", [row("x", "?")])}
        alone = self.drawn(**source, weight=0.5)
        assert uids(gather(sources=[other, {**source, "weight": 0.5}])[0]) == ["b/x", *alone]


def test_where_reads_some_rows_only():
    rows = [{"problem": f"p{i}", "answer": i, "source": "aime" if i % 3 else "other"} for i in range(9)]
    save("a.jsonl", [*rows, {"nonsense": 1}])
    source = {"name": "a", "path": "a.jsonl", "where": {"source": ["aime"]}}
    problems, report = gather(sources=[source])
    assert [problem.gold for problem in problems] == ["1", "2", "4", "5", "7", "8"]
    assert report.num_read == {"a": 6}
    with pytest.raises(UserError, match=r"a\.jsonl: expected problems, got none"):
        gather(sources=[{**source, "where": {"source": ["amie"]}}])


def test_names_that_collide_after_all():
    save("a.jsonl", [row("b/c", "q")])
    save("b.jsonl", [row("c", "r")])
    sources = [{"name": "a", "path": "a.jsonl"}, {"name": "a/b", "path": "b.jsonl"}]
    with pytest.raises(UserError, match=r"data\.sources: expected different uids, got 'a/b/c' twice"):
        gather(sources=sources)


RECIPE: dict[str, Any] = {"num_steps": 1, "run": {"dir": "r"}, "model": {"path": "m"}}


class TestConfig:
    def refused(self, data: dict[str, Any]) -> str:
        with pytest.raises(UserError) as caught:
            load_config({**RECIPE, "data": data}, kind=RLConfig)
        return str(caught.value)

    def test_train_or_sources(self):
        source = {"name": "a", "path": "p"}
        assert "expected either train (one set) or sources (several), got neither" in self.refused({})
        assert "got both" in self.refused({"train": "t", "sources": [source]})
        assert "expected a name of its own" in self.refused({"sources": [source, source]})

    def test_a_misspelt_key_of_a_source(self):
        message = self.refused({"sources": [{"name": "a", "path": "p", "wieght": 2}]})
        assert "unknown key 'data.sources.0.wieght'. Did you mean 'weight'?" in message

    def test_overrides_and_round_trip(self):
        source = '[{name = "a", path = "p", where = {source = ["x"]}}]'
        config = load_config({**RECIPE, "data": {}}, [f"data.sources={source}", "data.dedup=exact"])
        assert config.data.sources[0].where == {"source": ["x"]}
        Path("config.toml").write_text(dump_config(config))
        assert load_config("config.toml") == config


FORMATS: dict[str, Rows] = {
    "deepscaler": [
        {"problem": f"DeepScaleR asks for the value of {i} squared.", "answer": str(i * i), "solution": "s"}
        for i in range(2)
    ],
    "orz": [
        {
            "0": {"from": "human", "value": f"ORZ asks {i}."},
            "1": {"from": "assistant", "ground_truth": {"value": str(i)}},
        }
        for i in range(2)
    ],
    "light-r1": [
        {"conversations": [{"from": "user", "value": "L?"}, {"from": "assistant", "value": "so \\boxed{5}"}]},
    ],
    "dapo": [
        {"prompt": "DAPO?", "reward_model": {"ground_truth": "34"}, "extra_info": {"index": "9a"}},
        {"prompt": "ORZ asks 1.", "reward_model": {"ground_truth": "7"}, "extra_info": {"index": "9b"}},  # a conflict
    ],
    "numina": [
        {"source": "olympiads", "problem": "N?", "solution": "\\boxed{3}", "messages": []},
        {"source": "olympiads", "problem": "Prove it.", "solution": "Trivial.", "messages": []},  # no answer
        {"source": "cn_k12", "problem": "Too easy?", "solution": "\\boxed{3}", "messages": []},
    ],
    "zebra": [
        {"id": "z", "puzzle": "Houses.", "question": "Who?", "choices": ["Eric", "Bob"], "answer": "Bob"},
    ],
}


def test_the_release_s_mix_on_small_files_of_the_same_formats(repository: Path):
    """`recipes/boba-data.toml` with each hub name replaced by a file."""
    pytest.importorskip("datasketch", reason="pip install 'pekoe[data]'")
    data = read_toml(repository / "recipes/boba-data.toml")["data"]
    assert [source["name"] for source in data["sources"]] == list(FORMATS)
    assert all(source["path"].startswith("hf:") for source in data["sources"])
    for source in data["sources"]:
        source["path"] = save(f"{source['name']}.jsonl", FORMATS[source["name"]])
    gpqa = {"Question": "G?", "Correct Answer": "r", **{f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)}}
    math500 = {"problem": "DeepScaleR asks for the value of 1 squared.", "answer": "1", "unique_id": "m"}
    data["decontaminate"] = [save("gpqa.jsonl", [gpqa]), save("math500.jsonl", [math500])]
    problems, report = gather(**data)
    assert Counter(uid.partition("/")[0] for uid in uids(problems)) == dict.fromkeys(FORMATS, 1)
    assert Counter(drop.reason for drop in report.dropped) == {
        "conflicting answers": 2,
        "malformed": 1,
        "contaminated": 1,
    }
