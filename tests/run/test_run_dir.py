"""What config.toml holds: the date that chat templates print, fixed when a run begins (I5), and perhaps secrets."""

import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from pekoe.config import SFTConfig, load_config
from pekoe.core import UserError
from pekoe.data import Tokenizer
from pekoe.run import run_dir
from pekoe.run.run_dir import RunDir, with_date
from tests.run.conftest import checkpoint_in_name

TEMPLATE = (
    b"{% for message in messages %}<|user|>{{ message.content }}{% endfor %}<|assistant|>{{ strftime_now('%d%m%Y') }}"
)
QUESTION = [{"role": "user", "content": "1+2="}]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": "model", "template": {}},
        "data": {"train": "demonstrations.jsonl"},
    }


def begin(recipe: dict[str, Any], day: date, monkeypatch: pytest.MonkeyPatch) -> SFTConfig:
    """Start the run of `recipe`, or resume it, on `day`; gives the resolved config."""

    class Day(date):
        @classmethod
        def today(cls) -> date:
            return day

    monkeypatch.setattr(run_dir, "date", Day)
    config = with_date(load_config(recipe, kind=SFTConfig))
    with RunDir(config) as run:
        checkpoint_in_name(run.path, 1)
    return config


def test_a_run_prompts_the_same_on_the_next_day(recipe, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch):
    files = Tokenizer.load(tiny_dir / "model").files | {"chat_template.jinja": TEMPLATE}
    configs = [begin(recipe, date(2026, 1, day), monkeypatch) for day in (30, 31)]
    prompts = [Tokenizer(files).with_template(config.model.template).encode_prompt(QUESTION) for config in configs]
    assert prompts[0].tolist() == prompts[1].tolist() == Tokenizer(files).encode("<|user|>1+2=<|assistant|>30012026")


def test_a_run_directory_without_a_date_takes_todays(recipe, monkeypatch: pytest.MonkeyPatch):
    config = begin(recipe, date(2026, 1, 30), monkeypatch)
    file = Path(config.run.dir) / "config.toml"
    file.write_text(file.read_text().replace('date = "2026-01-30"\n', ""))
    assert begin(recipe, date(2026, 1, 31), monkeypatch).model.template.date == "2026-01-31"
    assert begin(recipe, date(2026, 2, 1), monkeypatch).model.template.date == "2026-01-31"


def test_another_date_is_another_run(recipe, monkeypatch: pytest.MonkeyPatch):
    begin(recipe, date(2026, 1, 30), monkeypatch)
    recipe["model"]["template"]["date"] = "2026-01-31"
    with pytest.raises(UserError, match=r"holds a run with model\.template\.date = '2026-01-30', got '2026-01-31'"):
        begin(recipe, date(2026, 1, 31), monkeypatch)


def test_a_date_may_be_tomls_own_or_text(recipe, tmp_path: Path):
    for written in ("2026-01-31", '"2026-01-31"'):
        config = load_config(recipe, [f"model.template.date={written}"], SFTConfig)
        assert with_date(config) == config
        assert config.model.template.date == "2026-01-31"
    with pytest.raises(UserError, match=r"model\.template\.date.*expected a date such as 2026-01-31, got 'today'"):
        load_config(recipe, ["model.template.date=today"], SFTConfig)


@pytest.mark.parametrize(("env", "mode"), [({"HF_TOKEN": "s3cret"}, 0o600), ({"HF_HOME": "/x"}, 0o644)])
def test_a_config_with_secrets_is_its_owners_alone(tmp_path: Path, env: dict[str, str], mode: int):
    before = os.umask(0o022)
    try:
        recipe = {"run": {"dir": str(tmp_path)}, "model": {"path": "m"}, "data": {"train": "t"}, "num_steps": 1}
        config = load_config(recipe | {"engine": {"server": {"env": env}}})
        for _ in range(2):  # also where a file is there
            with RunDir(config) as run:
                assert (run.path / "config.toml").stat().st_mode & 0o777 == mode
        assert load_config(tmp_path / "config.toml") == config
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["model", "model-latest"])
def test_a_run_does_not_replace_the_model_that_it_begins_with(tmp_path: Path, name: str):
    recipe = {"run": {"dir": str(tmp_path)}, "model": {"path": f"{tmp_path}/../{tmp_path.name}/{name}"}}
    with pytest.raises(UserError, match=r"run.dir: expected another directory than that of model.path"):
        RunDir(load_config(recipe | {"data": {"train": "t"}, "num_steps": 1}))
    assert not (tmp_path / "config.toml").exists()


def test_fewer_steps_than_are_done_are_refused_before_anything_is_written(tmp_path: Path):
    recipe = {"run": {"dir": str(tmp_path)}, "model": {"path": "m"}, "data": {"train": "t"}, "num_steps": 6}
    with RunDir(load_config(recipe)) as run:
        checkpoint_in_name(run.path, 5)
    before = (tmp_path / "config.toml").read_text()
    with pytest.raises(UserError, match=r"num_steps: expected at least the 5 steps .* got 4; nearest: 5"):
        RunDir(load_config(recipe | {"num_steps": 4}))
    assert (tmp_path / "config.toml").read_text() == before
    with RunDir(load_config(recipe | {"num_steps": 5})):
        pass
